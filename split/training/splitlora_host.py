"""SplitLoRA at the coordinator: all devices' micro-batches of one number run through the stage's blocks as one.

Devices do every step together. The blocks and their optimiser are server.py's; what becomes of the devices' adapters,
and of their cuts, is job_adapters.py's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.aggregation.averaging import Share
from isthmus.split.errors import BadTensor
from isthmus.split.finite import DIVERGED, is_finite
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.order import Order
from isthmus.split.training.averages import Aggregation
from isthmus.split.training.barrier import Place
from isthmus.split.training.checkpoint import Checkpoint
from isthmus.split.training.frames import tensor_of, where_wanted
from isthmus.split.training.job_adapters import JobAdapters
from isthmus.split.training.loss import nll
from isthmus.split.training.membership import JoinedDevice
from isthmus.split.training.server import ServerTrainer
from isthmus.split.training.steps import HostSteps


class SplitLoraHost(HostSteps):
    """trainer: of the stage's blocks. adapters: of the devices."""

    joint = frozenset({Phase.FORWARD, Phase.BACKWARD, Phase.STEP, Phase.AGGREGATE})

    def __init__(self, trainer: ServerTrainer, adapters: JobAdapters) -> None:
        self.trainer, self.adapters = trainer, adapters
        self.ledger, self.hidden_size = trainer.ledger, int(trainer.stage.model.config.hidden_size)
        self.digest = adapters.digest
        self._orders: dict[str, Order] = {}
        self._norms: dict[str, tuple[float, int]] = {}  # of the last step's gradients on the devices
        self._stepped_ahead = False  # with overlap stale: this side has done a step whose STEP frames have not all come
        self._steps_timed = 0

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
        self._norms.pop(device.name, None)

    # ---- a step ----

    def take(self, device: JoinedDevice, frame: Frame) -> None:
        """A held-out batch, which waits for nobody."""
        outputs = self.trainer.evaluate(tensor_of(frame), device.name)
        if not is_finite(outputs):
            raise BadTensor(f"{device.name}: held-out text gives values that float32 does not hold: {DIVERGED}")
        answer = Frame(Phase.EVALUATE, frame.step)
        if frame.labels is None:
            answer = replace(answer, tensor=where_wanted(outputs.float(), frame.wanted))
        else:
            loss, tokens = nll(outputs, frame.labels.to(outputs.device))
            answer = replace(answer, values={"nll": float(loss), "tokens": float(tokens)})
        self.job.answer(device.name, answer)

    def run(self, place: Place, frames: Mapping[str, Frame]) -> None:
        if place.phase == Phase.STEP:
            self._apply(place.step, frames)
        elif place.phase == Phase.BACKWARD:
            self._backward(place, frames)
        elif self.job.config.devices.labels == "device":
            self._forward(place, frames)
        else:
            self._forward_backward(place, frames)

    def _forward(self, place: Place, frames: Mapping[str, Frame]) -> None:
        batches = {device: tensor_of(frame) for device, frame in frames.items()}
        outputs = self.trainer.forward(batches, micro_batch=place.micro_batch)
        for device, output in outputs.items():
            tensor = where_wanted(output.float(), frames[device].wanted)
            self._answer(device, Frame(Phase.FORWARD, place.step, place.micro_batch, tensor))
        self.job.refuse(frames.keys() - outputs.keys(), frames, f"hidden states of step {place.step}")

    def _forward_backward(self, place: Place, frames: Mapping[str, Frame]) -> None:
        """With the labels, and so the loss, at the stage."""
        batches = {device: tensor_of(frame) for device, frame in frames.items()}
        labels = {device: frame.labels for device, frame in frames.items() if frame.labels is not None}
        tokens = {device: int(frame.values["tokens"]) for device, frame in frames.items()}
        last = self._is_last(place, frames)
        gradients, sums = self.trainer.forward_backward(
            batches, labels, tokens, micro_batch=place.micro_batch, last=last
        )
        for device, gradient in gradients.items():
            loss, count = sums[device]
            values = {"nll": loss, "tokens": float(count)}
            self._answer_gradient(device, Frame(Phase.FORWARD, place.step, place.micro_batch, gradient, values=values))
        self._end_backward(place.step, frames, gradients, last=last)

    def _backward(self, place: Place, frames: Mapping[str, Frame]) -> None:
        gradients = {device: (tensor_of(frame), int(frame.values["tokens"])) for device, frame in frames.items()}
        last = self._is_last(place, frames)
        at_cut = self.trainer.backward(gradients, micro_batch=place.micro_batch, last=last)
        for device, gradient in at_cut.items():
            self._answer_gradient(device, Frame(Phase.BACKWARD, place.step, place.micro_batch, gradient))
        self._end_backward(place.step, frames, at_cut, last=last)

    def _end_backward(self, step: int, frames: Collection[str], answered: Collection[str], *, last: bool) -> None:
        if answered and last and self.job.config.link.stale:  # the devices' norms are not known: clipped by their last
            self.trainer.step(step, self._norms)
            self._stepped_ahead = True
        self.job.refuse(set(frames) - set(answered), frames, f"gradients of step {step}")

    def _apply(self, step: int, frames: Mapping[str, Frame]) -> None:
        norms = {name: (frame.values["norm_squared"], int(frame.values["tokens"])) for name, frame in frames.items()}
        if not self.job.config.link.stale:
            self.trainer.step(step, norms)
        self._stepped_ahead = False
        self._norms = norms
        self._steps_timed += 1

    def _is_last(self, place: Place, frames: Mapping[str, Frame]) -> bool:
        return place.micro_batch + 1 == self.job.members.joined[next(iter(frames))].plan.micro_batches

    def _answer_gradient(self, device: str, frame: Frame) -> None:
        trains = self.adapters.values_of(device) > 0  # else the gradient is of no use there
        tensor = tensor_of(frame).float() if trains else None
        values = {**frame.values, "norm_squared": self.trainer.norm_squared(device)}
        self._answer(device, replace(frame, tensor=tensor, values=values))

    def _answer(self, device: str, frame: Frame) -> None:
        self.job.plans.look_at(frame, upward=False)
        self.job.answer(device, frame)

    # ---- aggregation, and what lasts ----

    def unfit(self, shares: Mapping[str, Share], last: Tensor | None) -> set[str]:
        return self.adapters.unfit(shares, last)

    def aggregate(self, step: int, shares: Mapping[str, Share], last: Tensor | None) -> Aggregation:
        return self.adapters.merge(step, shares, last)

    def after_aggregation(self, step: int, devices: Mapping[str, JoinedDevice]) -> Mapping[str, Frame]:
        """Cuts that move."""
        measured = {name: device.measured for name, device in devices.items()}
        moves, answers = self.adapters.move(step, measured, self._steps_timed)
        for name, choice in moves.items():
            self.job.tell(Event(device=name, shape=choice.told(name, f"after step {step + 1} ")))
        return answers

    def stage_seconds(self) -> Mapping[str, float]:
        work, steps = self.ledger.compute_by_work, self._steps_timed
        return {name: work[name] / steps for name in ("forward", "backward")} if steps else {}

    def drop(self) -> bool:
        self.trainer.drop()
        applied, self._stepped_ahead = self._stepped_ahead, False
        return applied

    def into(self, point: Checkpoint) -> Checkpoint:
        stepper = self.trainer.stepper
        server = {name: value.detach().to("cpu", copy=True) for name, value in stepper.parameters.items()}
        return self.adapters.into(replace(point, server=server, optimizer=stepper.state()))

    def restore(self, point: Checkpoint) -> None:
        self.adapters.restore(point)

    def adapter(self, point: Checkpoint) -> dict[str, Tensor]:
        return self.adapters.result(point)
