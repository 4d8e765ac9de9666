"""A device's part in a job, whatever its method: a session from OPEN to CLOSE, step by step.

It knows of no network. Text and labels stay on the device. The method (device_steps.py) says what a step, an evaluation
and the state consist of.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import FAMILIES
from isthmus.split.errors import BadTensor, WrongState
from isthmus.split.job.shapes import Shape
from isthmus.split.link.coding import Terms
from isthmus.split.link.device import Link
from isthmus.split.link.frames import ENDS, Frame, Phase
from isthmus.split.lora.lora import flatten, load_flat, shapes_of
from isthmus.split.training.checkpoint import DeviceRecord, DeviceState
from isthmus.split.training.device_steps import DeviceContext, DeviceSteps, Gradients
from isthmus.split.training.frames import numbers_of, tensor_like
from isthmus.split.training.measurements import Measurements
from isthmus.split.training.optim import Stepper

log = logging.getLogger(__name__)

Tell = Callable[["Progress"], None]
Keep = Callable[[Mapping[str, Tensor]], None]


class Cancelled(WrongState):
    """Ends a trainer whose task was told to stop."""


@dataclass(frozen=True)
class Progress:
    """What a device's trainer tells as it goes: steps done, steps in all, and the mean loss of the last one in nats."""

    step: int
    steps: int
    loss: float


class DeviceTrainer:
    """Trains one device's part of a job.

    steps: the method's steps on this device.
    record: what this device keeps on its disk; None to keep nothing.
    stage_digest: digest of the device's model files.

    The attribute `step` counts the steps done. Where adapters are averaged, the coordinator says at which step a
    session begins, and the optimiser goes on from its state at that step. Elsewhere the device itself knows.
    """

    def __init__(
        self, context: DeviceContext, steps: DeviceSteps, *, record: DeviceRecord | None = None, stage_digest: str = ""
    ) -> None:
        self.config, self.ledger, self.steps = context.config, context.ledger, steps
        self._validation, self._samples = context.validation, len(context.train.input_ids)
        self._measurements = Measurements(context.config, context.ledger, int(steps.model.hidden_size))
        self._record, self._stage_digest = record, stage_digest
        self.stepper = Stepper(steps.parameters, self.config)
        self._initial = self._average = flatten(steps.parameters)  # `_average` is what all devices had last
        self._points = {0: DeviceState(0, self._initial)}  # the states at the last two aggregations
        self._told: dict[str, float] = {}  # values of the last STEP, which a broken link may have lost
        self.step = 0
        kept = record.last() if record else None
        if kept is not None and self.config.averages:
            self.step = kept.step
        elif kept is not None:
            self._restore(kept)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that train on this device, by names in the whole model."""
        return self.steps.parameters

    @property
    def terms(self) -> Terms:
        """The terms of a link for this trainer."""
        return self.steps.terms

    def adapter(self) -> dict[str, Tensor]:
        """What this device has learnt and keeps; empty where the job's adapter is the coordinator's."""
        return self.steps.own_adapter()

    def run(
        self,
        link: Link,
        *,
        cancelled: threading.Event,
        tell: Tell = lambda progress: None,
        keep: Keep = lambda adapter: None,
    ) -> None:
        """Trains to the job's end. May be called again after LinkLost: what was cut off is done anew, and counts once.

        cancelled: once set, ends the training with Cancelled before the next step.
        tell: is called after each step.
        keep: gets the device's own adapter before the coordinator hears of the end.

        Raises LinkLost for a broken link, BadTensor or BadFrame for answers that do not fit, and WrongState where the
        device cannot go on.
        """
        if not self._open(link):
            return
        if self.config.evaluates_after(self.step):
            self._evaluate(link, self.step)
        while self.step < self.config.steps:
            if cancelled.is_set():
                raise Cancelled("the task was cancelled")
            made = self.steps.train(link, self.step)
            if made is None:
                self._end_early(link)
                break
            self._apply(link, made)
            tell(Progress(self.step, self.config.steps, made.nll / max(made.tokens, 1)))
            if self.config.aggregates_after(self.step):
                self._aggregate(link)
            if self.config.evaluates_after(self.step):
                self._evaluate(link, self.step)
        keep(self.adapter())
        link.send(Frame(Phase.REPORT, step=self.config.steps, values=numbers_of(self.ledger.summary())))
        link.send(Frame(Phase.CLOSE, step=self.config.steps))
        link.receive()

    # ---- a session ----

    def _open(self, link: Link) -> bool:
        """Opens the session. Returns whether anything is left to do."""
        shape = self.steps.shape
        opened = stage_pb2.Open(
            codecs=sorted(FAMILIES),
            samples=self._samples,
            stage_digest=self._stage_digest,
            last_step=self.step,
            adapter_values=self._initial.numel(),
            shape=None if shape is None else stage_pb2.Shape(cut=shape.cut, rank=shape.rank),
        )
        link.send(Frame(Phase.OPEN, open=opened, measured=self._measurements.take(link)))
        answer = link.receive()
        if answer.phase == Phase.CLOSE:
            return False
        if answer.phase == Phase.OPEN and answer.shape is not None:  # the cut moved, and this device does not know yet
            self._move(link, answer.shape)
        agreed = answer.agreement if answer.phase == Phase.OPEN else None
        if agreed is None or agreed.adapter_values != self._initial.numel():
            raise BadTensor("the coordinator's answer to OPEN does not fit this device's stage")
        self.steps.take(answer)
        if self.config.averages:
            average = None if answer.tensor is None else tensor_like(answer, self._initial.shape)
            self._go_to(agreed.start_step, average)
        elif agreed.start_step == self.step - 1 and self._told:
            link.send(Frame(Phase.STEP, agreed.start_step, values=self._told))
        elif agreed.start_step != self.step:
            raise BadTensor("the coordinator's answer to OPEN does not fit what this device has done")
        self.steps.begin()
        self.stepper.drop_gradients()  # those of a step that a broken link ended
        return True

    def _move(self, link: Link, shape: Shape) -> None:
        """Holds other blocks from here on, and keeps the optimiser's state of the blocks that stay.

        Raises WrongState where this device cannot.
        """
        log.info("this device's cut moves to %d", shape.cut)
        state = self.stepper.state()
        self.stepper.drop_gradients()
        self._stage_digest = self.steps.move(shape)
        self._initial = self._average = flatten(self.parameters)
        self.stepper = Stepper(self.parameters, self.config)
        self.stepper.load_state(self._of_mine(state))
        link.coder.reshape(shapes_of(self.parameters))

    def _of_mine(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of an optimiser's state that is of this device's parameters, for its cut may have moved since."""
        return {key: value for key, value in state.items() if key.rpartition("|")[0] in self.parameters}

    # ---- a step ----

    def _apply(self, link: Link, made: Gradients) -> None:
        """Does the optimiser's step, and keeps the result before anyone hears of it."""
        norm_squared = self.stepper.gradient_norm_squared()
        self.stepper.step(self.step, norm_squared + made.elsewhere)
        self._told = {"norm_squared": norm_squared, "tokens": float(made.tokens), "nll": made.nll}
        self.step += 1
        self._measurements.stepped()
        self._keep(self.step)
        link.send(Frame(Phase.STEP, self.step - 1, values=self._told))

    def _end_early(self, link: Link) -> None:
        """Ends training for this device because nothing is left that trains. Over another link this is told again."""
        log.warning("after step %d nothing is left that trains: training ends here", self.step)
        last = self.config.steps
        self._keep(last)
        link.send(Frame(Phase.STEP, self.step, values={"norm_squared": 0.0, "tokens": 0.0, "nll": 0.0, ENDS: 1.0}))
        if self.config.evaluates_after(last):
            self._evaluate(link, last)

    def _evaluate(self, link: Link, done: int) -> None:
        """Reports the loss of the held-out sequences after `done` steps."""
        if self._validation is None:
            return
        with self._measurements.not_of_steps(), torch.no_grad():
            nll, tokens = self.steps.evaluate(link, done, self._validation)
        link.send(Frame(Phase.REPORT, done, values={"evaluation_nll": nll, "evaluation_tokens": float(tokens)}))

    def _aggregate(self, link: Link) -> None:
        mine = flatten(self.parameters)
        gain = mine - self._average if link.coder.adapters_differ("adapters_up") else mine
        differs = link.coder.adapters_differ("adapters_down")
        measured = self._measurements.take(link)
        link.send(Frame(Phase.AGGREGATE, self.step - 1, tensor=gain, measured=measured))
        answer = link.receive()
        if answer.shape is not None:
            self._move(link, answer.shape)
            self._average = tensor_like(answer, self._initial.shape)
        else:
            average = tensor_like(answer, mine.shape)
            self._average = self._average + average if differs else average
        load_flat(self.parameters, self._average)
        if self.steps.take(answer):
            self.stepper.forget(self.parameters)

    # ---- what lasts ----

    def _keep(self, done: int) -> None:
        """Keeps what a later session may have to go on from: in memory at aggregations, on disk at checkpoints.

        It is on the disk before the coordinator can have a checkpoint of this step, so that the two always match.

        done: the number of steps done, or all of the job's where training ends early.
        """
        aggregates, keeps = self.config.aggregates_after(done), self.config.checkpoints_after(done)
        if not aggregates and not (keeps and self._record):
            return
        optimizer = {} if self.config.starts_anew else self.stepper.state()
        state = DeviceState(self.step, flatten(self.parameters), optimizer, self.steps.state(), self._told)
        if aggregates:
            self._points = {max(self._points): self._points[max(self._points)], self.step: state}
        if keeps and self._record:
            self._record.save(state)

    def _go_to(self, step: int, average: Tensor | None) -> None:
        """Goes to the last aggregation, whose average the coordinator has sent; None stands for the start."""
        self._average = self._initial if average is None else average
        kept = self._points.get(step) or (self._record.at(step) if self._record and step else None)
        optimizer = self._of_mine(kept.optimizer) if kept else {}
        moments = self.config.optimizer.name != "sgd" and not self.config.starts_anew and step
        if not optimizer and moments and self.parameters:
            log.warning("no optimiser state of step %d on this device: its moments start anew", step)
        self._restore(DeviceState(step, self._average, optimizer, kept.method if kept else {}))

    def _restore(self, state: DeviceState) -> None:
        load_flat(self.parameters, state.adapter)
        self.stepper = Stepper(self.parameters, self.config)
        self.stepper.load_state(state.optimizer)
        self.steps.load_state(state.method)
        self.step, self._told = state.step, dict(state.told)
