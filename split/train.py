"""The split training step, both sides of it. Tensors in, tensors out: nothing here knows of a network.

SplitLoRA (Lin et al. 2024, arXiv 2407.00952). With K devices whose batches have n_1..n_K predicted tokens,
N in all, the joint loss is the mean over the N tokens. The server trains on that: device i's part is weighted by
n_i / N. A device trains on the mean over its own tokens, so the gradient that it gets back is freed of the weight.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protos.v1 import stage_pb2
from split.adapters.lora import flatten, load_flat, lora_parameters
from split.checkpoint import OptimizerRecord
from split.config import TrainingConfig
from split.data import Sequences, batch_indices
from split.errors import BadFrame, BadTensor, WrongState
from split.evaluate import nll
from split.ledger import Ledger
from split.link import Frame, Link, Phase
from split.models.stage import Stage
from split.optim import Stepper
from split.precision import autocast

log = logging.getLogger(__name__)


class Cancelled(WrongState):
    """The task was told to stop."""


class ServerTrainer:
    """The coordinator's blocks and their LoRA: all devices' batches run through them as one."""

    def __init__(self, stage: Stage, config: TrainingConfig, ledger: Ledger, *, dtype: torch.dtype) -> None:
        self.stage, self.config, self.ledger = stage, config, ledger
        self.stepper = Stepper(lora_parameters([stage]), config)
        self._device = next(stage.parameters()).device
        self._dtype = dtype
        self._inputs: Tensor | None = None  # (sum of batches, sequence, hidden), leaf
        self._outputs: Tensor | None = None
        self._rows: dict[str, slice] = {}
        self._norm_squared = 0.0

    def forward(self, batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each device's hidden states at the cut (batch, sequence, hidden) -> its last hidden states, same shape."""
        outputs = self._forward(batches)
        return {device: outputs[rows].detach() for device, rows in self._rows.items()}

    def backward(self, gradients: Mapping[str, tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Each device's gradient of its own mean loss by its last hidden states, and its predicted tokens ->
        the gradient by its hidden states at the cut. A device that has gone since the forward has no part."""
        assert self._outputs is not None
        joint = torch.zeros_like(self._outputs)
        total = max(1, sum(tokens for _, tokens in gradients.values()))
        for device, (gradient, tokens) in gradients.items():
            joint[self._rows[device]] = gradient.to(self._device) * (tokens / total)
        with self.ledger.computing(("backward", self._outputs.shape)):
            self._outputs.backward(joint)
        return self._gradients_at_cut({device: tokens / total for device, (_, tokens) in gradients.items()})

    def forward_backward(
        self, batches: Mapping[str, Tensor], labels: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, tuple[float, int]]]:
        """With labels at the server: hidden states and labels (batch, sequence) -> gradients at the cut, and each
        device's summed loss and predicted tokens."""
        logits = self._forward(batches)
        sums = {device: nll(logits[rows], labels[device].to(self._device)) for device, rows in self._rows.items()}
        total = max(1, sum(tokens for _, tokens in sums.values()))
        with self.ledger.computing(("backward", logits.shape)):
            (torch.stack([loss for loss, _ in sums.values()]).sum() / total).backward()
        gradients = self._gradients_at_cut({device: tokens / total for device, (_, tokens) in sums.items()})
        return gradients, {device: (float(loss.detach()), tokens) for device, (loss, tokens) in sums.items()}

    def step(self, step: int, device_norms_squared: Mapping[str, tuple[float, int]]) -> None:
        """Applies optimiser step `step`. The whole gradient's norm is this side's and the devices' mean, by tokens."""
        total = max(1, sum(tokens for _, tokens in device_norms_squared.values()))
        of_devices = sum(norm * tokens / total for norm, tokens in device_norms_squared.values())
        self.stepper.step(step, self._norm_squared + of_devices)
        self.drop()

    @torch.no_grad()
    def evaluate(self, hidden_states: Tensor) -> Tensor:
        """(batch, sequence, hidden) -> the last hidden states, or logits where the head is here."""
        work = ("evaluate", hidden_states.shape)
        with self.ledger.computing(work):  # in float32 whatever training computes in: what is reported is exact
            outputs: Tensor = self.stage(hidden_states.to(self._device))
            return outputs

    def restore(self, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Puts back what `stepper` had. Raises WrongState when it is not of this stage."""
        parameters = self.stepper.parameters
        shapes = {name: value.shape for name, value in parameters.items()}
        if {name: value.shape for name, value in adapter.items()} != shapes:
            raise WrongState("the checkpoint is of another model, cut or rank than this job's")
        self.drop()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(adapter[name])
        self.stepper = Stepper(parameters, self.config)
        self.stepper.load_state(optimizer)

    @property
    def norm_squared(self) -> float:
        """Of this side's gradient in the step under way."""
        return self._norm_squared

    def drop(self) -> None:
        """Forgets a step under way: its graph and its gradients."""
        self._inputs = self._outputs = None
        self._rows = {}
        self._norm_squared = 0.0
        self.stepper.drop_gradients()

    def _forward(self, batches: Mapping[str, Tensor]) -> Tensor:
        self.drop()
        end = 0
        for device, batch in batches.items():
            self._rows[device] = slice(end, end + len(batch))
            end += len(batch)
        self._inputs = torch.cat([batch.to(self._device) for batch in batches.values()]).requires_grad_()
        with self.ledger.computing(("forward", self._inputs.shape)), autocast(self._dtype, self._device):
            outputs: Tensor = self.stage(self._inputs)
        self._outputs = outputs
        return outputs

    def _gradients_at_cut(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        assert self._inputs is not None
        gradient = self._inputs.grad
        assert gradient is not None
        self._norm_squared = self.stepper.gradient_norm_squared()
        # A batch without a predicted token has weight 0 and no gradient; there is nothing to free it of.
        return {device: gradient[self._rows[device]] / (weight or 1.0) for device, weight in weights.items()}


@dataclass(frozen=True)
class Progress:
    """What a device's trainer tells as it goes."""

    step: int
    steps: int
    loss: float


class DeviceTrainer:
    """A device's stages, its text and its half of every step, told to a link.

    stages: (front,) with labels at the server, (front, tail) with labels on the device.
    record: the optimiser's state on this device's disk, for a resumed job.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        config: TrainingConfig,
        train: Sequences,
        validation: Sequences | None,
        ledger: Ledger,
        *,
        dtype: torch.dtype = torch.float32,
        record: OptimizerRecord | None = None,
        stage_digest: str = "",
    ) -> None:
        self.front = stages[0]
        self.tail = stages[1] if len(stages) > 1 else None
        self.config, self.ledger = config, ledger
        self.train, self.validation = train, validation
        self.parameters = lora_parameters(stages)
        self._initial = flatten(self.parameters)
        self.stepper = Stepper(self.parameters, config)
        self._points: dict[int, dict[str, Tensor]] = {0: {}}  # the optimiser's state at the last two aggregations
        self._device = next(self.front.parameters()).device
        self._dtype = dtype
        self._record = record
        self._stage_digest = stage_digest

    def run(self, link: Link, *, cancelled: threading.Event, tell: Callable[[Progress], None] = lambda _: None) -> None:
        """Joins the job at the step that the stage names, to its end. After LinkLost it may be called again."""
        start = self._open(link)
        if start is None:
            return
        if self.config.evaluates_after(start):
            self._evaluate(link, start)
        for step in range(start, self.config.steps):
            if cancelled.is_set():
                raise Cancelled("the task was cancelled")
            loss = self._training_step(link, step)
            tell(Progress(step + 1, self.config.steps, loss))
            done = step + 1
            if self.config.aggregates_after(done):
                self._aggregate(link, step, done)
                if self.config.evaluates_after(done):
                    self._evaluate(link, done)
        link.send(Frame(Phase.REPORT, step=self.config.steps, values=_numbers(self.ledger.summary())))
        link.send(Frame(Phase.CLOSE, step=self.config.steps))
        _answer(link, Phase.CLOSE, self.config.steps)

    def _open(self, link: Link) -> int | None:
        """The step to start at; None when the job was done before this device came back."""
        adapter_values = sum(parameter.numel() for parameter in self.parameters.values())
        last = self._record.last_step() if self._record else 0
        opened = stage_pb2.Open(
            codecs=["none"],
            samples=len(self.train.input_ids),
            stage_digest=self._stage_digest,
            last_step=last,
            adapter_values=adapter_values,
        )
        link.send(Frame(Phase.OPEN, open=opened))
        answer = link.receive()
        if answer.phase == Phase.CLOSE:
            return None
        if answer.phase != Phase.OPEN or answer.agreement is None or answer.agreement.adapter_values != adapter_values:
            raise BadTensor("the coordinator's answer to OPEN does not fit this device's stage")
        load_flat(self.parameters, answer.tensor if answer.tensor is not None else self._initial)
        start = answer.agreement.start_step
        self.stepper.drop_gradients()  # of a step that a broken link ended
        self.stepper = Stepper(self.parameters, self.config)
        self.stepper.load_state(self._optimizer_state_of(start))
        return start

    def _optimizer_state_of(self, step: int) -> dict[str, Tensor]:
        """After `step` steps: from this run's memory or an earlier run's record; empty where this device was away."""
        if step in self._points:
            return self._points[step]
        if self._record is None or not step:
            return {}
        self._record.drop_after(step)
        state = self._record.load(step)
        if not state and self.config.optimizer != "sgd" and self.parameters:
            log.warning("no optimiser state of step %d on this device: its moments start anew", step)
        return state

    def _training_step(self, link: Link, step: int) -> float:
        rows = batch_indices(len(self.train.input_ids), self.config.batch_size, step, self.config.seed)
        input_ids = self.train.input_ids[rows].to(self._device)
        labels = self.train.labels[rows].to(self._device)
        with self.ledger.computing(("front", input_ids.shape)), autocast(self._dtype, self._device):
            smashed = self.front(input_ids)
        if self.tail is None:
            link.send(Frame(Phase.FORWARD, step, tensor=smashed.detach().float(), labels=labels))
            answer = _answer(link, Phase.FORWARD, step)
            loss, tokens = _value(answer, "nll"), int(_value(answer, "tokens"))
        else:
            link.send(Frame(Phase.FORWARD, step, tensor=smashed.detach().float()))
            last = _tensor(_answer(link, Phase.FORWARD, step), smashed.shape).to(self._device).requires_grad_()
            with self.ledger.computing(("tail", last.shape)):
                with autocast(self._dtype, self._device):
                    logits = self.tail(last)
                total, tokens = nll(logits, labels)
                (total / max(tokens, 1)).backward()
            del logits
            assert last.grad is not None
            link.send(Frame(Phase.BACKWARD, step, tensor=last.grad, values={"tokens": float(tokens)}))
            answer = _answer(link, Phase.BACKWARD, step)
            loss = float(total.detach())
        if self.parameters:
            gradient = _tensor(answer, smashed.shape).to(self._device, smashed.dtype)
            with self.ledger.computing(("front backward", smashed.shape)):
                smashed.backward(gradient)
        norm_squared = self.stepper.gradient_norm_squared()
        values = {"norm_squared": norm_squared, "tokens": float(tokens), "nll": loss}
        link.send(Frame(Phase.STEP, step, values=values))
        self.stepper.step(step, norm_squared + _value(answer, "norm_squared"))
        return loss / max(tokens, 1)

    def _aggregate(self, link: Link, step: int, done: int) -> None:
        # On disk before the coordinator can have a checkpoint of this step, so that the two always meet.
        state = self.stepper.state()
        if self._record and self.config.checkpoints_after(done):
            self._record.save(done, state)
        self._points = {max(self._points): self._points[max(self._points)], done: state}
        mine = flatten(self.parameters)
        link.send(Frame(Phase.AGGREGATE, step, tensor=mine))
        load_flat(self.parameters, _tensor(_answer(link, Phase.AGGREGATE, step), mine.shape))

    @torch.no_grad()
    def _evaluate(self, link: Link, done: int) -> None:
        """Sums the loss of the held-out sequences over the split and reports it."""
        if self.validation is None:
            return
        total, count = 0.0, 0
        for input_ids, labels in _batches(self.validation, self.config.batch_size):
            where = self._device
            with self.ledger.computing(("evaluate front", input_ids.shape)):
                smashed = self.front(input_ids.to(where)).float()
            if self.tail is None:
                link.send(Frame(Phase.EVALUATE, done, tensor=smashed, labels=labels))
                answer = _answer(link, Phase.EVALUATE, done)
                total, count = total + _value(answer, "nll"), count + int(_value(answer, "tokens"))
                continue
            link.send(Frame(Phase.EVALUATE, done, tensor=smashed))
            last = _tensor(_answer(link, Phase.EVALUATE, done), smashed.shape).to(where)
            with self.ledger.computing(("evaluate tail", last.shape)):
                logits = self.tail(last)
                loss, tokens = nll(logits, labels.to(where))
            total, count = total + float(loss), count + tokens
        link.send(Frame(Phase.REPORT, done, values={"evaluation_nll": total, "evaluation_tokens": float(count)}))


def _batches(sequences: Sequences, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(sequences.input_ids.split(size), sequences.labels.split(size), strict=True)


def _answer(link: Link, phase: stage_pb2.Phase, step: int) -> Frame:
    answer = link.receive()
    if answer.phase != phase or answer.step != step:
        got, want = Phase.Name(answer.phase), Phase.Name(phase)
        raise BadTensor(f"the coordinator answered {got} of step {answer.step} to {want} of step {step}")
    return answer


def _tensor(frame: Frame, shape: torch.Size) -> Tensor:
    if frame.tensor is None or frame.tensor.shape != shape or frame.tensor.dtype != torch.float32:
        raise BadTensor(f"the coordinator's {Phase.Name(frame.phase)} does not have the shape {tuple(shape)}")
    return frame.tensor


def _value(frame: Frame, name: str) -> float:
    if name not in frame.values:
        raise BadTensor(f"the coordinator's {Phase.Name(frame.phase)} has no {name}")
    return frame.values[name]


def tensor_of(frame: Frame) -> Tensor:
    """A frame's tensor. Raises BadFrame where there is none."""
    if frame.tensor is None:
        raise BadFrame(f"{Phase.Name(frame.phase)} without its tensor")
    return frame.tensor


def _numbers(summary: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a ledger's summary, for a REPORT frame; not the bytes by kind, which both sides count."""
    numbers = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
    return {**numbers, "energy_measured": float(summary["energy_source"] != "estimated")}
