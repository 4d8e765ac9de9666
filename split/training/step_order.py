"""The order of a device's frames where devices do each step together: what its next frame has to be."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.coding import Plan
from isthmus.split.link.session import Frame, Phase


@dataclass
class StepOrder:
    """What a device's next training frames have to be.

    Every part of a step comes once and in order: its micro-batches forward, backward (with labels on the device), STEP,
    and AGGREGATE where one is due. `forward` and `backward` are (step, micro-batch) of the next ones.
    """

    plan: Plan
    step: int  # that STEP has not come for
    forward: tuple[int, int]
    backward: tuple[int, int]
    aggregates: bool = False  # AGGREGATE of the step before `step` is due

    @classmethod
    def at(cls, step: int, plan: Plan) -> StepOrder:
        """Of a device that begins with this step."""
        return cls(plan, step, (step, 0), (step, 0))

    def answered(self, frame: Frame) -> None:
        """The device has got this answer."""
        if frame.plan is not None:
            self.plan = frame.plan

    def take(self, device: str, frame: Frame, config: TrainingConfig) -> None:
        """Checks that a training frame is one that is due, and moves on. Raises BadFrame."""
        at, u_shaped = (frame.step, frame.micro_batch), config.devices.labels == "device"
        if frame.phase == Phase.AGGREGATE and self.aggregates and at == (self.step - 1, 0):
            self.aggregates = False
        elif self.aggregates or frame.step >= config.steps:
            raise self._not_due(device, frame)
        elif frame.phase == Phase.FORWARD and at == self.forward and self._may_go_ahead(config):
            self.forward = self._next(self.forward)
            if not u_shaped:  # FORWARD brings the gradient, there is no BACKWARD
                self.backward = self.forward
        elif (
            frame.phase == Phase.BACKWARD
            and at == self.backward
            and at < self.forward
            and config.devices.labels == "device"
        ):
            self.backward = self._next(self.backward)
        elif frame.phase == Phase.STEP and at == (self.step, 0) and self.backward >= (self.step + 1, 0):
            self.step += 1
            self.aggregates = config.aggregates_after(self.step)
        else:
            raise self._not_due(device, frame)
        if frame.phase != Phase.STEP and frame.tensor is None:
            raise BadFrame(f"{Phase.Name(frame.phase)} without its tensor")

    def check_evaluates(self, frame: Frame, config: TrainingConfig) -> None:
        """An evaluation is of the model after `step` steps, before the next one. Raises BadFrame elsewhere."""
        between = self.forward == (self.step, 0) and not self.aggregates and frame.step == self.step
        if not between or not config.evaluates_after(frame.step):
            raise BadFrame(f"{Phase.Name(frame.phase)} after step {frame.step}, where no evaluation is due")

    def _may_go_ahead(self, config: TrainingConfig) -> bool:
        """Whether the next forward may come: not deeper than planned, and not before a step that it has to wait for."""
        step, number = self.forward
        if step == self.step:
            return config.devices.labels == "server" or number - self._backward_in(step) < self.plan.depth
        ahead = config.link.stale and step == self.step + 1 and not config.aggregates_after(step)
        return ahead and self.backward >= (step, 0) and number - self._backward_in(step) < self.plan.depth

    def _backward_in(self, step: int) -> int:
        return self.backward[1] if self.backward[0] == step else 0

    def _next(self, place: tuple[int, int]) -> tuple[int, int]:
        step, number = place
        return (step, number + 1) if number + 1 < self.plan.micro_batches else (step + 1, 0)

    def _not_due(self, device: str, frame: Frame) -> BadFrame:
        if self.aggregates:
            due = self._named(Phase.AGGREGATE, self.step - 1, 0)
        elif self.backward < self.forward:
            due = self._named(Phase.BACKWARD, *self.backward)
        elif self.forward > (self.step, 0) and self.forward[1] == 0:
            due = self._named(Phase.STEP, self.step, 0)
        else:
            due = self._named(Phase.FORWARD, *self.forward)
        given = self._named(frame.phase, frame.step, frame.micro_batch)
        return BadFrame(f"{given}; due from {device} is {due}")

    def _named(self, phase: stage_pb2.Phase, step: int, micro_batch: int) -> str:
        part = f", micro-batch {micro_batch}" if micro_batch or self.plan.micro_batches > 1 else ""
        return f"{Phase.Name(phase)} of step {step}{part}"
