"""The devices of a job as its stage sees them: who has joined, what each one's next frame has to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from protos.v1 import stage_pb2
from split.config import TrainingConfig
from split.errors import BadFrame, IsthmusError
from split.link import Frame, Phase

Deliver = Callable[[Frame | IsthmusError], None]  # also names the stream: a device that joins again has another one


@dataclass
class Member:
    """A device that has joined. `step` and `due` say what its next training frame has to be."""

    deliver: Deliver
    samples: int  # training sequences that it has
    step: int = 0
    due: stage_pb2.Phase = Phase.FORWARD
    admitted: bool = False
    answered: float = field(default_factory=time.monotonic)  # when it last got an answer, so that it is its turn

    def answer(self, frame: Frame) -> None:
        self.answered = time.monotonic()
        self.deliver(frame)

    def admit(self, step: int) -> None:
        self.admitted, self.step, self.due = True, step, Phase.FORWARD

    def take(self, device: str, frame: Frame, config: TrainingConfig) -> None:
        """Checks that a training frame is the one that is due, and moves on to the next. Raises BadFrame."""
        if (frame.step, frame.phase) != (self.step, self.due) or frame.step >= config.steps:
            raise BadFrame(
                f"{Phase.Name(frame.phase)} of step {frame.step}; due from {device} is "
                f"{Phase.Name(self.due)} of step {self.step}"
            )
        if frame.phase != Phase.STEP and frame.tensor is None:
            raise BadFrame(f"{Phase.Name(frame.phase)} without its tensor")
        if self.due == Phase.FORWARD:  # labels at the server: FORWARD brings the gradient, there is no BACKWARD
            self.due = Phase.BACKWARD if config.labels == "device" else Phase.STEP
        elif self.due == Phase.BACKWARD:
            self.due = Phase.STEP
        elif self.due == Phase.STEP and config.aggregates_after(self.step + 1):
            self.due = Phase.AGGREGATE
        else:
            self.step, self.due = self.step + 1, Phase.FORWARD

    def check_evaluates(self, frame: Frame, config: TrainingConfig) -> None:
        """An evaluation is of the model after `step` steps, before the next one. Raises BadFrame elsewhere."""
        between = self.due == Phase.FORWARD and frame.step == self.step
        if not between or not config.evaluates_after(frame.step):
            raise BadFrame(f"{Phase.Name(frame.phase)} after step {frame.step}, where no evaluation is due")
