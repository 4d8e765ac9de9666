"""SplitLoRA at the coordinator: the same micro-batch of all devices runs through the stage's blocks as one.

Devices do every step together. The blocks and their optimiser are in server.py; what becomes of the devices' adapters
and cuts is in job_adapters.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.aggregation.averager import Share
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.order import Order
from isthmus.split.training.averages import AggregationResult
from isthmus.split.training.barrier import Place
from isthmus.split.training.checkpoint import Checkpoint
from isthmus.split.training.job_adapters import JobAdapters
from isthmus.split.training.membership import JoinedDevice
from isthmus.split.training.server import ServerTrainer
from isthmus.split.training.split_step import SplitStep
from isthmus.split.training.steps import HostSteps


class SplitLoraHost(HostSteps):
    """SplitLoRA's steps at the coordinator.

    trainer: the stage's blocks.
    adapters: the devices' adapters.
    """

    joint = frozenset({Phase.FORWARD, Phase.BACKWARD, Phase.STEP, Phase.AGGREGATE})

    def __init__(self, trainer: ServerTrainer, adapters: JobAdapters) -> None:
        self.trainer, self.adapters = trainer, adapters
        self.ledger, self.hidden_size = trainer.ledger, int(trainer.stage.model.config.hidden_size)
        self.digest = adapters.digest
        self._orders: dict[str, Order] = {}
        self._step = SplitStep(trainer, adapters)

    # ---- devices ----

    def adapter_values(self, device: str) -> int:
        return self.adapters.values_of(device)

    def adapter_shapes(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        return self.adapters.shapes_for(device)

    def check_open(self, device: str, opened: stage_pb2.Open) -> None:
        self.adapters.check_open(device, opened)

    def begin(self, device: JoinedDevice) -> Frame:
        order = self._orders[device.name] = Order(self.job.config, device.name)
        order.admit(device.step)
        return self.adapters.start(device.name, device.opened, self.job.point)

    def check(self, device: JoinedDevice, frame: Frame) -> None:
        order = self._orders[device.name]
        if frame.phase in (Phase.EVALUATE, Phase.REPORT):
            order.check_evaluation(frame)
        elif frame.phase == Phase.CLOSE:
            super().check(device, frame)
        else:
            order.take(frame)
            self.job.plans.look_at(frame, upward=True)

    def answered(self, device: JoinedDevice, frame: Frame) -> None:
        self._orders[device.name].answered(frame)

    def left(self, device: JoinedDevice) -> None:
        self._orders.pop(device.name, None)
        self._step.left(device.name)

    def take(self, device: JoinedDevice, frame: Frame) -> None:
        self._step.evaluate(self.job, device, frame)

    def run(self, place: Place, frames: Mapping[str, Frame]) -> None:
        self._step.run(self.job, place, frames)

    # ---- aggregation, and what lasts ----

    def unfit(self, shares: Mapping[str, Share], last: Tensor | None) -> set[str]:
        return self.adapters.unfit(shares, last)

    def aggregate(self, step: int, shares: Mapping[str, Share], last: Tensor | None) -> AggregationResult:
        return self.adapters.merge(step, shares, last)

    def after_aggregation(self, step: int, devices: Mapping[str, JoinedDevice]) -> Mapping[str, Frame]:
        """Moves cuts, and returns the answers that tell devices of it."""
        measured = {name: device.measured for name, device in devices.items()}
        moves, answers = self.adapters.move(step, measured, self._step.timed)
        for name, choice in moves.items():
            self.job.tell(Event(device=name, shape=choice.told(name, f"after step {step + 1} ")))
        return answers

    def stage_seconds(self) -> Mapping[str, float]:
        work, steps = self.ledger.compute_by_work, self._step.timed
        return {name: work[name] / steps for name in ("forward", "backward")} if steps else {}

    def drop(self) -> bool:
        return self._step.drop()

    def into(self, point: Checkpoint) -> Checkpoint:
        stepper = self.trainer.stepper
        server = {name: value.detach().to("cpu", copy=True) for name, value in stepper.parameters.items()}
        return self.adapters.into(replace(point, server=server, optimizer=stepper.state()))

    def restore(self, point: Checkpoint) -> None:
        self.adapters.restore(point)

    def adapter(self, point: Checkpoint) -> dict[str, Tensor]:
        return self.adapters.result(point)
