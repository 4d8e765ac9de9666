"""SplitLoRA on a device: the front of the model with its LoRA and, where the labels stay on the device, the tail.

Micro-batches of a step's batch are under way at the same time: while one is on the link, another is computed (as in
GPipe, Huang et al. 2019, arXiv 1811.06965). Their gradients add up, so the step is that of the whole batch.

SplitLoRA is of Lin et al. 2024, arXiv 2407.00952. With K devices whose batches have n_1 to n_K predicted tokens, N in
all, the joint loss is the mean over the N tokens. The server trains on that loss, in which device i has the weight n_i
/ N. A device trains on the mean over its own tokens, so the weight is divided out of the gradient that it gets back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.func import functional_call

from isthmus.split.data.sequences import IGNORE, Sequences
from isthmus.split.job.shapes import Shape
from isthmus.split.link.device import Link
from isthmus.split.link.frames import EVALUATIONS_AHEAD, Frame, Phase
from isthmus.split.lora.frozen import FrozenPart
from isthmus.split.lora.lora import lora_parameters
from isthmus.split.models.precision import autocast
from isthmus.split.models.stage import Stage
from isthmus.split.plan.choose import FRONT, FRONT_BACKWARD, TAIL
from isthmus.split.training.device_steps import Batch, DeviceContext, DeviceSteps, Gradients
from isthmus.split.training.frames import of_use, tensor_like, value_of
from isthmus.split.training.loss import nll_where_wanted

Reshape = Callable[[Shape], tuple[Sequence[Stage], str]]
"""Function from a shape to the stages of a device of this shape, and the digest of their files."""


@dataclass
class _OpenStep:
    """A step under way.

    begun: number of micro-batches that have been sent.
    asked: number of micro-batches whose loss is known.
    done: number of micro-batches whose gradient has come.
    loss: the loss summed so far, in nats.
    norm_squared: squared norm of the stage's gradient.
    smashed: hidden states at the cut, by micro-batch.
    adapter: copies of the front's LoRA with which they were computed; empty for the parameters themselves.
    """

    batch: Batch
    begun: int = 0
    asked: int = 0
    done: int = 0
    loss: float = 0.0
    norm_squared: float = 0.0
    smashed: dict[int, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)


class SplitLoraDevice(DeviceSteps):
    """SplitLoRA's steps on a device.

    stages: (front,) with labels at the server, (front, tail) with labels on the device.
    shape: what a device holds whose cut may move; None where it stays.
    reshape: makes the stages for another shape.
    """

    def __init__(
        self,
        context: DeviceContext,
        stages: Sequence[Stage],
        *,
        shape: Shape | None = None,
        reshape: Reshape | None = None,
    ) -> None:
        super().__init__(context)
        self._shape, self._reshape = shape, reshape
        self._following: _OpenStep | None = None  # with overlap stale: the next step, which has begun already
        self._hold(stages)

    @property
    def shape(self) -> Shape | None:
        return self._shape

    def begin(self) -> None:
        self._following = None

    def take(self, answer: Frame) -> bool:
        if answer.frozen is None:
            return False
        self.frozen.take(self.frozen.decode(answer.frozen))  # it contains what was trained
        return answer.phase == Phase.AGGREGATE

    def move(self, shape: Shape) -> str:
        if self._reshape is None:
            return super().move(shape)
        stages, digest = self._reshape(shape)
        self._hold(stages)
        self._shape = shape
        return digest

    def _hold(self, stages: Sequence[Stage]) -> None:
        self.front = stages[0]
        self.tail = stages[1] if len(stages) > 1 else None
        self.parameters = lora_parameters(stages)
        self.model = self.front.model.config
        self._front_lora = {
            name: parameter for name, parameter in self.front.named_parameters() if parameter.requires_grad
        }
        self.frozen = FrozenPart([self.front], self.config)
        self._device = next(self.front.parameters()).device

    # ---- a step ----

    def train(self, link: Link, step: int) -> Gradients:
        under_way, self._following = self._following or self._send_first(link, step), None
        batch = under_way.batch
        ahead = self.config.link.stale and step + 1 < self.config.steps and not self.config.aggregates_after(step + 1)
        while under_way.done < len(batch.slices):
            if ahead and self._following is None and self._all_sent(under_way):
                self._following = self._send_first(link, step + 1)
            answer = link.receive()
            if self.tail is not None and answer.phase == Phase.FORWARD:
                self._tail(link, under_way, answer)
            else:
                self._front_backward(under_way, answer)
            self._send_forwards(link, under_way)
        for name, value in under_way.adapter.items():
            self._front_lora[name].grad = value.grad
        return Gradients(under_way.loss, batch.tokens, under_way.norm_squared)

    def _send_first(self, link: Link, step: int) -> _OpenStep:
        """Sends the first hidden states of a step: as many micro-batches as may be under way."""
        under_way = _OpenStep(Batch.of(self.context, step, link.coder.plan, self._device))
        if self.config.link.stale:  # a step may change the values before this batch comes back
            under_way.adapter = {
                name: value.detach().clone().requires_grad_() for name, value in self._front_lora.items()
            }
        self._send_forwards(link, under_way)
        return under_way

    def _send_forwards(self, link: Link, under_way: _OpenStep) -> None:
        batch = under_way.batch
        while under_way.begun < len(batch.slices) and under_way.begun - under_way.done < batch.depth:
            number, rows = under_way.begun, batch.slices[under_way.begun]
            input_ids, labels = batch.input_ids[rows], batch.labels[rows]
            with self.ledger.computing((FRONT, input_ids.shape)), autocast(self.context.dtype, self._device):
                smashed = functional_call(self.front, under_way.adapter, (input_ids,))
            under_way.smashed[number] = smashed
            hidden_states, wanted = of_use(smashed.detach().float(), labels)
            frame = Frame(Phase.FORWARD, batch.step, number, hidden_states, wanted=wanted)
            if self.tail is None:
                frame = replace(frame, labels=labels, wanted=None, values={"tokens": float(batch.tokens)})
            under_way.begun += 1
            link.send(frame)

    def _all_sent(self, under_way: _OpenStep) -> bool:
        """Whether this device has sent all of a step but its STEP."""
        sent = under_way.begun if self.tail is None else under_way.asked
        return sent == len(under_way.batch.slices)

    def _tail(self, link: Link, under_way: _OpenStep, answer: Frame) -> None:
        """Computes the loss of a micro-batch whose last hidden states have come, and sends the gradient by them."""
        assert self.tail is not None
        number, batch = under_way.asked, under_way.batch
        last = tensor_like(answer, under_way.smashed[number].shape).to(self._device).requires_grad_()
        labels = batch.labels[batch.slices[number]]
        with self.ledger.computing((TAIL, last.shape, int((labels != IGNORE).sum()))):
            with autocast(self.context.dtype, self._device):
                total, _ = nll_where_wanted(self.tail, last, labels)
            (total / max(batch.tokens, 1)).backward()
        assert last.grad is not None
        under_way.loss += float(total.detach())
        under_way.asked += 1
        values = {"tokens": float(batch.tokens)}
        link.send(Frame(Phase.BACKWARD, batch.step, number, last.grad, values=values))

    def _front_backward(self, under_way: _OpenStep, answer: Frame) -> None:
        """Runs the front backward for a micro-batch whose gradient at the cut has come."""
        number, batch = under_way.done, under_way.batch
        if self.tail is None:
            under_way.loss += value_of(answer, "nll")
            under_way.asked += 1
        smashed = under_way.smashed.pop(number)
        if self.parameters:
            gradient = tensor_like(answer, smashed.shape).to(self._device, smashed.dtype)
            with self.ledger.computing((FRONT_BACKWARD, smashed.shape)):
                smashed.backward(gradient)
        under_way.done += 1
        if under_way.done == len(batch.slices):
            under_way.norm_squared = value_of(answer, "norm_squared")

    # ---- evaluation ----

    def evaluate(self, link: Link, step: int, held_out: Sequences) -> tuple[float, int]:
        total, count = 0.0, 0
        waiting: deque[tuple[torch.Size, Tensor]] = deque()

        def take() -> None:
            nonlocal total, count
            loss, tokens = self._evaluated(link.receive(), *waiting.popleft())
            total, count = total + loss, count + tokens

        for input_ids, labels in _batches(held_out, self.config.batch_size):
            with self.ledger.computing(("evaluate front", input_ids.shape)):
                smashed = self.front(input_ids.to(self._device)).float()
            hidden_states, wanted = of_use(smashed, labels.to(self._device))
            frame = Frame(Phase.EVALUATE, step, tensor=hidden_states, wanted=wanted)
            link.send(replace(frame, labels=labels, wanted=None) if self.tail is None else frame)
            waiting.append((smashed.shape, labels))
            if len(waiting) > EVALUATIONS_AHEAD:
                take()
        while waiting:
            take()
        return total, count

    def _evaluated(self, answer: Frame, shape: torch.Size, labels: Tensor) -> tuple[float, int]:
        if self.tail is None:
            return value_of(answer, "nll"), int(value_of(answer, "tokens"))
        last = tensor_like(answer, shape).to(self._device)
        with self.ledger.computing(("evaluate tail", last.shape, int((labels != IGNORE).sum()))):
            loss, tokens = nll_where_wanted(self.tail, last, labels.to(self._device))
        return float(loss), tokens


def _batches(sequences: Sequences, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(sequences.input_ids.split(size), sequences.labels.split(size), strict=True)
