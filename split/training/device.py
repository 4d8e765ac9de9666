"""The split training step, the device's side of it (server.py has the other). Nothing here knows of a network.

A step's batch is cut into micro-batches, which are under way at the same time: while one is on the link, another is
computed (as GPipe does, Huang et al. 2019, arXiv 1811.06965). Gradients add up, so the step is that of the whole batch.

SplitLoRA (Lin et al. 2024, arXiv 2407.00952). With K devices whose batches have n_1..n_K predicted tokens,
N in all, the joint loss is the mean over the N tokens. The server trains on that: device i's part is weighted by
n_i / N. A device trains on the mean over its own tokens, so the gradient that it gets back is freed of the weight.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.func import functional_call

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import FAMILIES
from isthmus.split.data.sequences import IGNORE, Sequences, batch_indices, micro_batch_slices, seen_positions
from isthmus.split.errors import BadFrame, BadTensor, WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape
from isthmus.split.link.coding import Terms
from isthmus.split.link.device import Link
from isthmus.split.link.frames import EVALUATIONS_AHEAD, Frame, Phase
from isthmus.split.link.ladder import candidates
from isthmus.split.link.profile import LinkProfile, codec_seconds
from isthmus.split.lora.frozen import FrozenPart
from isthmus.split.lora.lora import flatten, load_flat, lora_parameters, shapes_of
from isthmus.split.models.precision import autocast
from isthmus.split.models.stage import Stage
from isthmus.split.plan.choose import DEVICE_WORK, FRONT, FRONT_BACKWARD, RECENT, TAIL
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.checkpoint import OptimizerRecord
from isthmus.split.training.loss import nll_where_wanted
from isthmus.split.training.optim import Stepper
from isthmus.split.training.server import ServerTrainer as ServerTrainer  # the other half

log = logging.getLogger(__name__)

Reshape = Callable[[Shape], tuple[Sequence[Stage], str]]

_PROBE_EVERY = 60.0  # seconds between looks at the link, unless it seems to have changed
_NOISE = 0.05  # seconds of waiting a step that tell nothing
_NEARLY_ALL = 0.97  # of the positions: then it is not worth saying which


class Cancelled(WrongState):
    """The task was told to stop."""


@dataclass(frozen=True)
class Progress:
    """What a device's trainer tells as it goes."""

    step: int
    steps: int
    loss: float


@dataclass
class _Batch:
    """A step under way on a device. Of its micro-batches, `begun` have been sent, `asked` have their loss, `done` their
    gradient; adapter: copies of the front's LoRA that it was sent with (empty: the parameters themselves)."""

    step: int
    input_ids: Tensor
    labels: Tensor
    tokens: int  # predicted ones, of the whole batch
    parts: list[slice]
    depth: int
    begun: int = 0
    asked: int = 0
    done: int = 0
    loss: float = 0.0  # summed
    norm_squared: float = 0.0  # of the stage's gradient
    smashed: dict[int, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)


class DeviceTrainer:
    """A device's stages, its text and its half of every step, told to a link.

    stages: (front,) with labels at the server, (front, tail) with labels on the device.
    record: the optimiser's state on this device's disk, for a resumed job. shape, reshape: of a device whose cut may
    move: what it holds, and what makes the stages, and their digest, for another shape.
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
        shape: Shape | None = None,
        reshape: Reshape | None = None,
    ) -> None:
        self.config, self.ledger = config, ledger
        self.train, self.validation = train, validation
        self._hold(stages)
        self.stepper = Stepper(self.parameters, config)
        self._profile, self._probed_at = LinkProfile(), -math.inf
        self._steps_done = 0
        self._looked_at = (0, 0.0)  # steps, and seconds of waiting for the link, at the last aggregation
        self._usual_wait: float | None = None  # for the link, a step, after the last probe
        self._recently = (0, 0.0)  # steps, and seconds of computing, at the last aggregation
        self._points: dict[int, dict[str, Tensor]] = {0: {}}  # the optimiser's state at the last two aggregations
        self._dtype = dtype
        self._record = record
        self._stage_digest = stage_digest
        self._shape, self._reshape = shape, reshape

    def _hold(self, stages: Sequence[Stage]) -> None:
        self.front = stages[0]
        self.tail = stages[1] if len(stages) > 1 else None
        self.parameters = lora_parameters(stages)
        self._initial = self._average = flatten(self.parameters)  # _average: what all devices had last
        self._front_lora = {
            name: parameter for name, parameter in self.front.named_parameters() if parameter.requires_grad
        }
        self.frozen = FrozenPart([self.front], self.config)
        self._device = next(self.front.parameters()).device

    def _move(self, link: Link, shape: Shape) -> None:
        """Holds other blocks from here on. What the optimiser knows of those that stay goes on; that of others is
        gone. Raises WrongState where this device cannot."""
        if self._reshape is None:
            raise WrongState(f"the coordinator moves this device's cut to {shape.cut}, which it cannot follow")
        log.info("this device's cut moves to %d", shape.cut)
        state = self.stepper.state()
        self.stepper.drop_gradients()
        stages, self._stage_digest = self._reshape(shape)
        self._hold(stages)
        self._shape = shape
        self.stepper = Stepper(self.parameters, self.config)
        self.stepper.load_state(self._of_mine(state))
        link.coder.reshape(shapes_of(self.parameters))

    def _of_mine(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of an optimiser's state, what is of this device's parameters: its cut may have moved since."""
        return {key: value for key, value in state.items() if key.rpartition("|")[0] in self.parameters}

    @property
    def terms(self) -> Terms:
        """Of a link for this trainer."""
        model = self.front.model.config
        shapes = shapes_of(self.parameters)
        return Terms(self.config, len(self.train), shapes, model.hidden_size, model.vocab_size)

    def run(self, link: Link, *, cancelled: threading.Event, tell: Callable[[Progress], None] = lambda _: None) -> None:
        """Joins the job at the step that the stage names, to its end. After LinkLost it may be called again."""
        start = self._open(link)
        if start is None:
            return
        if self.config.evaluates_after(start):
            self._evaluate(link, start)
        following: _Batch | None = None
        for step in range(start, self.config.steps):
            if cancelled.is_set():
                raise Cancelled("the task was cancelled")
            loss, following = self._training_step(link, following or self._begin(link, step))
            tell(Progress(step + 1, self.config.steps, loss))
            done = step + 1
            if self.config.aggregates_after(done):
                self._aggregate(link, step, done)
                if self.config.evaluates_after(done):
                    self._evaluate(link, done)
        link.send(Frame(Phase.REPORT, step=self.config.steps, values=numbers_of(self.ledger.summary())))
        link.send(Frame(Phase.CLOSE, step=self.config.steps))
        link.receive()

    def _open(self, link: Link) -> int | None:
        """The step to start at; None when the job was done before this device came back."""
        adapter_values = self._initial.numel()
        last = self._record.last_step() if self._record else 0
        opened = stage_pb2.Open(
            codecs=sorted(FAMILIES),
            samples=len(self.train.input_ids),
            stage_digest=self._stage_digest,
            last_step=last,
            adapter_values=adapter_values,
            shape=None if self._shape is None else stage_pb2.Shape(cut=self._shape.cut, rank=self._shape.rank),
        )
        link.send(Frame(Phase.OPEN, open=opened, measured=self._measured(link)))
        answer = link.receive()
        if answer.phase == Phase.CLOSE:
            return None
        if answer.phase == Phase.OPEN and answer.shape is not None:  # it moved, and this device does not know yet
            self._move(link, answer.shape)
            adapter_values = self._initial.numel()
        if answer.phase != Phase.OPEN or answer.agreement is None or answer.agreement.adapter_values != adapter_values:
            raise BadTensor("the coordinator's answer to OPEN does not fit this device's stage")
        if answer.frozen is not None:
            self.frozen.take(self.frozen.decode(answer.frozen))
        self._average = self._initial if answer.tensor is None else tensor_like(answer, self._initial.shape)
        load_flat(self.parameters, self._average)
        start = answer.agreement.start_step
        self.stepper.drop_gradients()  # of a step that a broken link ended
        self.stepper = Stepper(self.parameters, self.config)
        self.stepper.load_state(self._optimizer_state_of(start))
        return start

    def _measured(self, link: Link) -> stage_pb2.Measured:
        """For the stage's plan. The link is looked at again after some time only: it takes some round trips."""
        if time.monotonic() - self._probed_at > _PROBE_EVERY or self._link_has_changed():
            self._profile, self._probed_at = link.measure(), time.monotonic()
            self._usual_wait = None
        measured = self._profile.to_proto()
        coding = codec_seconds(candidates(self.config), self.front.model.config.hidden_size)
        slow = max(1.0, self.ledger.slow_down)
        measured.codec_seconds.update({name: slow * seconds for name, seconds in coding.items()})
        steps = max(1, self._steps_done)
        for name, seconds in self.ledger.compute_by_work.items():
            if name in DEVICE_WORK:
                measured.compute_seconds[name] = seconds / steps
        done, computed = self._recently
        if self._shape is not None and self._steps_done > done:
            measured.compute_seconds[RECENT] = (self._computed - computed) / (self._steps_done - done)
        self._recently = self._steps_done, self._computed
        return measured

    @property
    def _computed(self) -> float:
        """Seconds of training."""
        return sum(self.ledger.compute_by_work.get(name, 0.0) for name in DEVICE_WORK)

    def _link_has_changed(self) -> bool:
        """Whether the steps since the last look waited much longer or shorter for the link than those before."""
        steps, seconds = self._steps_done - self._looked_at[0], self.ledger.link_seconds - self._looked_at[1]
        self._looked_at = self._steps_done, self.ledger.link_seconds
        if not steps:
            return False
        wait, usual = seconds / steps, self._usual_wait
        self._usual_wait = wait if usual is None else usual
        return usual is not None and not usual / 2 - _NOISE < wait < 1.5 * usual + _NOISE

    def _optimizer_state_of(self, step: int) -> dict[str, Tensor]:
        """After `step` steps: from this run's memory or an earlier run's record; empty where this device was away."""
        if step in self._points:
            return self._of_mine(self._points[step])
        if self._record is None or not step:
            return {}
        self._record.drop_after(step)
        state = self._of_mine(self._record.load(step))
        moments = self.config.optimizer.name != "sgd" and not self.config.starts_anew
        if not state and moments and self.parameters:
            log.warning("no optimiser state of step %d on this device: its moments start anew", step)
        return state

    def _begin(self, link: Link, step: int) -> _Batch:
        """Sends the first hidden states of a step, as many micro-batches as may be under way."""
        plan = link.coder.plan
        rows = batch_indices(len(self.train.input_ids), self.config.batch_size, step, self.config.seed)
        input_ids = self.train.input_ids[rows].to(self._device)
        labels = self.train.labels[rows].to(self._device)
        parts = micro_batch_slices(len(rows), plan.micro_batches)
        tokens = int((labels[:, 1:] != IGNORE).sum())
        batch = _Batch(step, input_ids, labels, tokens, parts, plan.depth)
        if self.config.link.stale:  # the values of now: a step may change them before this batch comes back
            batch.adapter = {name: value.detach().clone().requires_grad_() for name, value in self._front_lora.items()}
        self._send_forwards(link, batch)
        return batch

    def _send_forwards(self, link: Link, batch: _Batch) -> None:
        while batch.begun < len(batch.parts) and batch.begun - batch.done < batch.depth:
            part = batch.parts[batch.begun]
            input_ids = batch.input_ids[part]
            with self.ledger.computing((FRONT, input_ids.shape)), autocast(self._dtype, self._device):
                smashed = functional_call(self.front, batch.adapter, (input_ids,))
            batch.smashed[batch.begun] = smashed
            hidden_states, wanted = of_use(smashed.detach().float(), batch.labels[part])
            frame = Frame(Phase.FORWARD, batch.step, batch.begun, hidden_states, wanted=wanted)
            if self.tail is None:
                values = {"tokens": float(batch.tokens)}
                frame = replace(frame, labels=batch.labels[part], wanted=None, values=values)
            batch.begun += 1
            link.send(frame)

    def _training_step(self, link: Link, batch: _Batch) -> tuple[float, _Batch | None]:
        """The rest of a step: the mean loss, and the next step's batch where it has begun already (`overlap` stale)."""
        step, following = batch.step, None
        ahead = self.config.link.stale and step + 1 < self.config.steps and not self.config.aggregates_after(step + 1)
        while batch.done < len(batch.parts):
            if ahead and following is None and self._all_sent(batch):
                following = self._begin(link, step + 1)
            answer = link.receive()
            if self.tail is not None and answer.phase == Phase.FORWARD:
                self._tail(link, batch, answer)
            else:
                self._front_backward(batch, answer)
            self._send_forwards(link, batch)
        for name, value in batch.adapter.items():
            self._front_lora[name].grad = value.grad
        norm_squared = self.stepper.gradient_norm_squared()
        values = {"norm_squared": norm_squared, "tokens": float(batch.tokens), "nll": batch.loss}
        link.send(Frame(Phase.STEP, step, values=values))
        self.stepper.step(step, norm_squared + batch.norm_squared)
        self._steps_done += 1
        return batch.loss / max(batch.tokens, 1), following

    def _all_sent(self, batch: _Batch) -> bool:
        """Whether this device has sent all of a step but its STEP."""
        return (batch.begun if self.tail is None else batch.asked) == len(batch.parts)

    def _tail(self, link: Link, batch: _Batch, answer: Frame) -> None:
        """The last hidden states of a micro-batch have come: its loss, and the gradient by them."""
        assert self.tail is not None
        number = batch.asked
        part = batch.parts[number]
        last = tensor_like(answer, batch.smashed[number].shape).to(self._device).requires_grad_()
        labels = batch.labels[part]
        with self.ledger.computing((TAIL, last.shape, int((labels != IGNORE).sum()))):
            with autocast(self._dtype, self._device):
                total, _ = nll_where_wanted(self.tail, last, labels)
            (total / max(batch.tokens, 1)).backward()
        assert last.grad is not None
        batch.loss += float(total.detach())
        batch.asked += 1
        link.send(Frame(Phase.BACKWARD, batch.step, number, last.grad, values={"tokens": float(batch.tokens)}))

    def _front_backward(self, batch: _Batch, answer: Frame) -> None:
        """The gradient at the cut of a micro-batch has come."""
        number = batch.done
        if self.tail is None:
            batch.loss += _value(answer, "nll")
            batch.asked += 1
        smashed = batch.smashed.pop(number)
        if self.parameters:
            gradient = tensor_like(answer, smashed.shape).to(self._device, smashed.dtype)
            with self.ledger.computing((FRONT_BACKWARD, smashed.shape)):
                smashed.backward(gradient)
        batch.done += 1
        if batch.done == len(batch.parts):
            batch.norm_squared = _value(answer, "norm_squared")

    def _aggregate(self, link: Link, step: int, done: int) -> None:
        # On disk before the coordinator can have a checkpoint of this step, so that the two always meet.
        state = {} if self.config.starts_anew else self.stepper.state()
        if self._record and self.config.checkpoints_after(done):
            self._record.save(done, state)
        self._points = {max(self._points): self._points[max(self._points)], done: state}
        mine = flatten(self.parameters)
        gain = mine - self._average if link.coder.adapters_differ("adapters_up") else mine
        differs = link.coder.adapters_differ("adapters_down")
        link.send(Frame(Phase.AGGREGATE, step, tensor=gain, measured=self._measured(link)))
        answer = link.receive()
        if answer.shape is not None:
            self._move(link, answer.shape)
            self._average = tensor_like(answer, self._initial.shape)
        else:
            average = tensor_like(answer, mine.shape)
            self._average = self._average + average if differs else average
        load_flat(self.parameters, self._average)
        if answer.frozen is not None:  # what was trained is in it, and training begins anew
            self.frozen.take(self.frozen.decode(answer.frozen))
            self.stepper.forget(self.parameters)

    @torch.no_grad()
    def _evaluate(self, link: Link, done: int) -> None:
        """Sums the loss of the held-out sequences over the split and reports it."""
        if self.validation is None:
            return
        total, count = 0.0, 0
        waited = self.ledger.link_seconds  # before: what is waited here says nothing of the steps
        waiting: deque[tuple[torch.Size, Tensor]] = deque()

        def take() -> None:
            nonlocal total, count
            loss, tokens = self._evaluated(link.receive(), *waiting.popleft())
            total, count = total + loss, count + tokens

        for input_ids, labels in _batches(self.validation, self.config.batch_size):
            with self.ledger.computing(("evaluate front", input_ids.shape)):
                smashed = self.front(input_ids.to(self._device)).float()
            hidden_states, wanted = of_use(smashed, labels.to(self._device))
            frame = Frame(Phase.EVALUATE, done, tensor=hidden_states, wanted=wanted)
            link.send(replace(frame, labels=labels, wanted=None) if self.tail is None else frame)
            waiting.append((smashed.shape, labels))
            if len(waiting) > EVALUATIONS_AHEAD:
                take()
        while waiting:
            take()
        self._looked_at = self._looked_at[0], self._looked_at[1] + self.ledger.link_seconds - waited
        link.send(Frame(Phase.REPORT, done, values={"evaluation_nll": total, "evaluation_tokens": float(count)}))

    def _evaluated(self, answer: Frame, shape: torch.Size, labels: Tensor) -> tuple[float, int]:
        if self.tail is None:
            return _value(answer, "nll"), int(_value(answer, "tokens"))
        last = tensor_like(answer, shape).to(self._device)
        with self.ledger.computing(("evaluate tail", last.shape, int((labels != IGNORE).sum()))):
            loss, tokens = nll_where_wanted(self.tail, last, labels.to(self._device))
        return float(loss), tokens


def of_use(hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """What has to cross for a loss on `labels` (rows, sequence): hidden states (rows, sequence, hidden) with zeros
    behind the last predicted position of each row, which nothing before them can see, and the positions whose last
    hidden states are of use, (rows, sequence) bool; None where that is nearly all."""
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORE  # position t predicts labels[:, t + 1]
    if wanted.float().mean() > _NEARLY_ALL:
        return hidden_states, None
    return hidden_states * seen_positions(wanted).unsqueeze(-1), wanted


def _batches(sequences: Sequences, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(sequences.input_ids.split(size), sequences.labels.split(size), strict=True)


def tensor_like(frame: Frame, shape: torch.Size) -> Tensor:
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


def numbers_of(summary: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a ledger's summary, for a REPORT frame; not the bytes by kind, which both sides count."""
    numbers = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
    return {**numbers, "energy_measured": float(summary["energy_source"] != "estimated")}
