"""A SplitLoRA step at the stage: what is computed from all devices' frames, and what each device is answered."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from isthmus.split.codecs.finite import DIVERGED, is_finite
from isthmus.split.errors import BadTensor
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.training.barrier import Place
from isthmus.split.training.frames import tensor_of, where_wanted
from isthmus.split.training.job_adapters import JobAdapters
from isthmus.split.training.loss import nll
from isthmus.split.training.membership import JoinedDevice
from isthmus.split.training.server import ServerTrainer

if TYPE_CHECKING:
    from isthmus.split.training.hosted_job import HostedJob


class SplitStep:
    """Runs the steps of a job's stage.

    timed: number of steps that this stage has computed in all.
    """

    def __init__(self, trainer: ServerTrainer, adapters: JobAdapters) -> None:
        self._trainer, self._adapters, self._config = trainer, adapters, trainer.config
        self._norms: dict[str, tuple[float, int]] = {}  # of the devices' gradients in the last step
        self._stepped_ahead = False  # with overlap stale: this side has done a step before all its STEP frames
        self.timed = 0

    def left(self, device: str) -> None:
        """Forgets a device that has gone."""
        self._norms.pop(device, None)

    def drop(self) -> bool:
        """Forgets a step under way. Returns whether this side has applied it already."""
        self._trainer.drop()
        applied, self._stepped_ahead = self._stepped_ahead, False
        return applied

    def evaluate(self, job: HostedJob, device: JoinedDevice, frame: Frame) -> None:
        """Evaluates a held-out batch, which waits for no other device. Raises BadTensor where its numbers overflow."""
        outputs = self._trainer.evaluate(tensor_of(frame), device.name)
        if not is_finite(outputs):
            raise BadTensor(f"{device.name}: held-out text gives values that float32 does not hold: {DIVERGED}")
        answer = Frame(Phase.EVALUATE, frame.step)
        if frame.labels is None:
            answer = replace(answer, tensor=where_wanted(outputs.float(), frame.wanted))
        else:
            loss, tokens = nll(outputs, frame.labels.to(outputs.device))
            answer = replace(answer, values={"nll": float(loss), "tokens": float(tokens)})
        job.answer(device.name, answer)

    def run(self, job: HostedJob, place: Place, frames: Mapping[str, Frame]) -> None:
        """Runs all devices' frames of one phase and micro-batch."""
        if place.phase == Phase.STEP:
            self._apply(place.step, frames)
        elif place.phase == Phase.BACKWARD:
            self._backward(job, place, frames)
        elif self._config.devices.labels == "device":
            self._forward(job, place, frames)
        else:
            self._forward_backward(job, place, frames)

    def _forward(self, job: HostedJob, place: Place, frames: Mapping[str, Frame]) -> None:
        batches = {device: tensor_of(frame) for device, frame in frames.items()}
        outputs = self._trainer.forward(batches, micro_batch=place.micro_batch)
        for device, output in outputs.items():
            tensor = where_wanted(output.float(), frames[device].wanted)
            self._answer(job, device, Frame(Phase.FORWARD, place.step, place.micro_batch, tensor))
        job.refuse(frames.keys() - outputs.keys(), frames, f"hidden states of step {place.step}")

    def _forward_backward(self, job: HostedJob, place: Place, frames: Mapping[str, Frame]) -> None:
        """Runs forward and backward, with the labels and so the loss at the stage."""
        batches = {device: tensor_of(frame) for device, frame in frames.items()}
        labels = {device: frame.labels for device, frame in frames.items() if frame.labels is not None}
        tokens = {device: int(frame.values["tokens"]) for device, frame in frames.items()}
        last = self._is_last(job, place, frames)
        gradients, sums = self._trainer.forward_backward(
            batches, labels, tokens, micro_batch=place.micro_batch, last=last
        )
        for device, gradient in gradients.items():
            loss, count = sums[device]
            values = {"nll": loss, "tokens": float(count)}
            self._answer_gradient(
                job, device, Frame(Phase.FORWARD, place.step, place.micro_batch, gradient, values=values)
            )
        self._end_backward(job, place.step, frames, gradients, last=last)

    def _backward(self, job: HostedJob, place: Place, frames: Mapping[str, Frame]) -> None:
        gradients = {device: (tensor_of(frame), int(frame.values["tokens"])) for device, frame in frames.items()}
        last = self._is_last(job, place, frames)
        at_cut = self._trainer.backward(gradients, micro_batch=place.micro_batch, last=last)
        for device, gradient in at_cut.items():
            self._answer_gradient(job, device, Frame(Phase.BACKWARD, place.step, place.micro_batch, gradient))
        self._end_backward(job, place.step, frames, at_cut, last=last)

    def _end_backward(
        self, job: HostedJob, step: int, frames: Collection[str], answered: Collection[str], *, last: bool
    ) -> None:
        if answered and last and self._config.link.stale:  # the devices' norms are not known: it clips by their last
            self._trainer.step(step, self._norms)
            self._stepped_ahead = True
        job.refuse(set(frames) - set(answered), frames, f"gradients of step {step}")

    def _apply(self, step: int, frames: Mapping[str, Frame]) -> None:
        norms = {name: (frame.values["norm_squared"], int(frame.values["tokens"])) for name, frame in frames.items()}
        if not self._config.link.stale:
            self._trainer.step(step, norms)
        self._stepped_ahead = False
        self._norms = norms
        self.timed += 1

    @staticmethod
    def _is_last(job: HostedJob, place: Place, frames: Mapping[str, Frame]) -> bool:
        return place.micro_batch + 1 == job.members.joined[next(iter(frames))].plan.micro_batches

    def _answer_gradient(self, job: HostedJob, device: str, frame: Frame) -> None:
        trains = self._adapters.values_of(device) > 0  # else the device has no use for the gradient
        tensor = tensor_of(frame).float() if trains else None
        values = {**frame.values, "norm_squared": self._trainer.norm_squared(device)}
        self._answer(job, device, replace(frame, tensor=tensor, values=values))

    @staticmethod
    def _answer(job: HostedJob, device: str, frame: Frame) -> None:
        job.plans.look_at(frame, upward=False)
        job.answer(device, frame)
