"""The order of a training session: which frame of a device is due next, as its stage keeps it."""

from __future__ import annotations

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.coding import Plan
from isthmus.split.link.frames import Frame, Phase


class Order:
    """Which frames of a device are due: every part of a step comes once and in order.

    A step is its micro-batches forward and backward (unless the server has the labels), then STEP, and AGGREGATE where
    one is due. A device may be ahead by as many micro-batches as its plan says.

    step: the step whose STEP has not come yet.
    forward, backward: (step, micro-batch) of the next FORWARD and the next BACKWARD.
    """

    def __init__(self, config: TrainingConfig, device: str) -> None:
        self._config, self._device = config, device
        self.plan = Plan()
        self.admit(0)

    def admit(self, step: int) -> None:
        """Begins the order anew: the device goes on with this step."""
        self.step, self.forward, self.backward = step, (step, 0), (step, 0)
        self.aggregates = False  # whether AGGREGATE of the step before `step` is due
        self.averaging = False  # it waits for its answer: nothing else may come, for the plan may change

    def take(self, frame: Frame) -> None:
        """Moves on past a frame that is due; raises BadFrame for one that is not."""
        at = frame.step, frame.micro_batch
        if frame.phase == Phase.AGGREGATE and self.aggregates and at == (self.step - 1, 0):
            self.aggregates, self.averaging = False, True
        elif self.aggregates or self.averaging or frame.step >= self._config.steps:
            raise self._not_due(frame)
        elif frame.phase == Phase.FORWARD and at == self.forward and self._may_go_ahead():
            self.forward = self._next(self.forward)
            if self._config.devices.labels == "server":  # the answer to FORWARD brings the gradient: no BACKWARD
                self.backward = self.forward
        elif frame.phase == Phase.BACKWARD and at == self.backward and at < self.forward:
            self.backward = self._next(self.backward)
        elif frame.phase == Phase.STEP and at == (self.step, 0) and self.backward >= (self.step + 1, 0):
            self.step += 1
            self.aggregates = self._config.aggregates_after(self.step)
        else:
            raise self._not_due(frame)

    def passed(self) -> None:
        """Moves on past one whole micro-batch of DLoRA, whose frames in between the pass itself has checked."""
        self.backward = self._next(self.backward)

    def repeat_step(self, step: int) -> None:
        """Makes only STEP of this step due again: the device has done it, and its STEP was lost with a link."""
        self.admit(step)
        self.forward = self.backward = (step + 1, 0)

    def end(self) -> None:
        """Notes that the device does no further step."""
        self.admit(self._config.steps)

    def answered(self, frame: Frame) -> None:
        """Notes a frame with which the stage answers: from there on its plan counts."""
        if frame.plan is not None:
            self.plan = frame.plan
        if frame.phase == Phase.AGGREGATE:
            self.averaging = False

    def check_evaluation(self, frame: Frame) -> None:
        """Checks that a frame evaluates the model after `step` steps, before the next one begins.

        Raises BadFrame where no evaluation is due.
        """
        if not self.between_steps or frame.step != self.step or not self._config.evaluates_after(frame.step):
            raise BadFrame(f"{Phase.Name(frame.phase)} after step {frame.step}, where no evaluation is due")

    @property
    def between_steps(self) -> bool:
        """Whether no part of a step is under way."""
        return self.forward == (self.step, 0) and not self.aggregates and not self.averaging

    def _may_go_ahead(self) -> bool:
        """Whether the next FORWARD may come: not deeper than planned, and not before a step that it has to wait for."""
        step, number = self.forward
        under_way = number - (self.backward[1] if self.backward[0] == step else 0)
        if step == self.step:
            return self._config.devices.labels == "server" or under_way < self.plan.depth
        ahead = self._config.link.stale and step == self.step + 1 and not self._config.aggregates_after(step)
        return ahead and self.backward >= (step, 0) and under_way < self.plan.depth

    def _next(self, place: tuple[int, int]) -> tuple[int, int]:
        step, number = place
        return (step, number + 1) if number + 1 < self.plan.micro_batches else (step + 1, 0)

    def _not_due(self, frame: Frame) -> BadFrame:
        if self.averaging:
            due = f"nothing until AGGREGATE of step {self.step - 1} is answered"
        elif self.aggregates:
            due = self._named(Phase.AGGREGATE, self.step - 1, 0)
        elif self.backward < self.forward:
            due = self._named(Phase.BACKWARD, *self.backward)
        elif self.forward > (self.step, 0) and self.forward[1] == 0:
            due = self._named(Phase.STEP, self.step, 0)
        else:
            due = self._named(Phase.FORWARD, *self.forward)
        given = self._named(frame.phase, frame.step, frame.micro_batch)
        return BadFrame(f"{given}; due from {self._device} is {due}")

    def _named(self, phase: stage_pb2.Phase, step: int, micro_batch: int) -> str:
        part = f", micro-batch {micro_batch}" if micro_batch or self.plan.micro_batches > 1 else ""
        return f"{Phase.Name(phase)} of step {step}{part}"
