"""The frozen blocks at the coordinator: at each LoRA module they ask the device that has it.

A pass (one micro-batch of one device) runs in its own thread, which waits in the midst of a block until the device has
answered; meanwhile other passes compute. Forward, a site's input goes out and what its modules add comes back.
Backward, the gradient of what they added goes out and the gradient by the input comes back. Only some rows cross: those
up to the last predicted position of a sequence, which no later position can influence.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.split.lora.sites import Layout, LoraModule, Site
from isthmus.split.models.precision import autocast
from isthmus.split.models.stage import Stage
from isthmus.split.resources.ledger import Ledger

Ask = Callable[[Site, bool, Tensor, bool], "Tensor | None"]
"""Function of (site, whether backward, tensor, whether an answer is wanted) that returns the answer.

Tensor and answer are (rows, width), float32; the tensor is on the CPU.
"""


@dataclass(frozen=True)
class Active:
    """What the modules do in a pass, by their numbers. All other modules do nothing.

    trained: the device computes and trains them.
    applied: the device computes them, with those that train.
    merged: A and B of frozen modules that are computed here.
    """

    trained: frozenset[int]
    applied: frozenset[int]
    merged: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Turn:
    """The right to compute on all cores, which one pass has at a time; who waits for a device gives it away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        with self._lock:
            yield

    @contextmanager
    def left(self) -> Iterator[None]:
        """Lets the others go on while the thread that has the turn waits."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()


class Pass:
    """One batch's way through the blocks and back."""

    def __init__(self, cut: int, active: Active, seen: Tensor | None, ask: Ask, turn: Turn, *, training: bool) -> None:
        """Begins a pass.

        cut: the block at which it enters.
        seen: (batch, sequence) bool, the positions that cross; None for all.
        ask: asks the pass's device.
        training: whether a backward pass follows.
        """
        self.cut, self.active, self._ask, self._turn = cut, active, ask, turn
        self._rows = None if seen is None else seen.reshape(-1).nonzero().flatten()
        self._training = training
        self._site: Site | None = None  # the site that was asked last, its input, and what its modules add
        self._input: Tensor | None = None
        self._added: dict[int, Tensor] = {}
        self.waited = 0.0  # seconds of waiting for the device
        self.inputs: Tensor | None = None  # the blocks' inputs and outputs, kept from forward to backward
        self.outputs: Tensor | None = None

    def added(self, site: Site, number: int, x: Tensor, scale: float) -> Tensor | None:
        """What a module adds to its base's output, (batch, sequence, outputs); None if it adds nothing."""
        if number in self.active.merged:
            a, b = self.active.merged[number]
            return F.linear(F.linear(x, a.to(x.device)), b.to(x.device)) * scale
        if number not in self.active.applied:
            return None
        if self._site is not site:
            self._site, self._input = site, x
            trains = self._training and bool(site.among(self.active.trained))
            anchor = x.new_zeros((), requires_grad=trains)  # brings backward here, even if the input needs none
            asked = _Asked.apply(x, anchor, self, site)  # type: ignore[no-untyped-call]
            self._added = {module.number: one for module, one in zip(self._asked_of(site), asked, strict=True)}
        assert x is self._input, "modules of a site were given different inputs"
        return self._added.pop(number)

    def _asked_of(self, site: Site) -> list[LoraModule]:
        return site.among(self.active.applied)

    def ask_outputs(self, site: Site, x: Tensor) -> tuple[Tensor, ...]:
        answer = self._asked(site, False, self._packed(x), True)
        assert answer is not None
        widths = [module.outputs for module in self._asked_of(site)]
        return tuple(self._unpacked(part, x) for part in answer.split(widths, dim=1))

    def ask_gradient(self, site: Site, gradients: tuple[Tensor, ...], like: Tensor, wanted: bool) -> Tensor | None:
        packed = torch.cat([self._packed(gradient) for gradient in gradients], dim=1)
        answer = self._asked(site, True, packed, wanted)
        return None if answer is None else self._unpacked(answer, like)

    def _asked(self, site: Site, backward: bool, packed: Tensor, wanted: bool) -> Tensor | None:
        start = time.perf_counter()
        with self._turn.left():
            answer = self._ask(site, backward, packed.cpu(), wanted)
        self.waited += time.perf_counter() - start
        return answer

    def _packed(self, x: Tensor) -> Tensor:
        """Takes the rows that cross from (batch, sequence, width), as (rows, width)."""
        rows = x.detach().float().reshape(-1, x.shape[-1])
        return rows if self._rows is None else rows[self._rows.to(rows.device)]

    def _unpacked(self, rows: Tensor, like: Tensor) -> Tensor:
        """Puts rows that crossed, (rows, width), into (batch, sequence, width), where `like` is; zeros elsewhere."""
        rows = rows.to(like.device)
        if self._rows is not None:
            whole = rows.new_zeros(like.shape[0] * like.shape[1], rows.shape[1])
            rows = whole.index_copy_(0, self._rows.to(rows.device), rows)
        return rows.reshape(*like.shape[:2], -1)

    @property
    def row_count(self) -> int | None:
        """Number of rows that cross; None for all."""
        return None if self._rows is None else len(self._rows)


class _Asked(torch.autograd.Function):
    """A site's modules as one function of its input, which the device computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, going: Pass, site: Site) -> tuple[Tensor, ...]:
        ctx.going, ctx.site = going, site
        ctx.like = x.new_empty(0).expand(*x.shape[:2], 0)  # keeps its device, batch and sequence only
        return going.ask_outputs(site, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        wanted = ctx.needs_input_grad[0]
        return ctx.going.ask_gradient(ctx.site, gradients, ctx.like, wanted), None, None, None


class _RemoteLora(nn.Module):
    """A linear module of the backbone, with what the device's LoRA adds.

    now: has the pass of the current thread as `going`.
    """

    def __init__(self, base: nn.Module, site: Site, number: int, scale: float, now: threading.local) -> None:
        super().__init__()
        self.base = base
        self._site, self._number, self._scale, self._now = site, number, scale, now

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        going: Pass = self._now.going
        added = going.added(self._site, self._number, x, self._scale)
        return result if added is None else result + added.to(result.dtype)


def _in_one_thread(device: torch.device) -> bool:
    """Whether autograd runs all backward passes on this device in one thread; on the CPU each is in its caller's."""
    return device.type != "cpu"


class Backbone:
    """The coordinator's blocks, for all devices. Nothing here changes from step to step."""

    def __init__(self, stages: Sequence[Stage], layout: Layout, ledger: Ledger, *, dtype: torch.dtype) -> None:
        """stages: consecutive segments; a pass enters at the one that begins at its device's cut."""
        self.stages, self.layout, self.ledger = list(stages), layout, ledger
        self.hidden_size = int(stages[0].model.config.hidden_size)
        self._device = next(stages[0].parameters()).device
        self._dtype = dtype
        self._now = threading.local()
        self.turn = Turn()
        self._backwards = threading.Lock() if _in_one_thread(self._device) else nullcontext()
        for stage in stages:
            local = {stage.global_name(name): name for name, _ in stage.model.named_modules()}
            for site in layout.sites:
                for module in site.modules if stage.spec.first <= site.block < stage.spec.last else ():
                    name = local[module.name]
                    base = stage.model.get_submodule(name)
                    stage.model.set_submodule(name, _RemoteLora(base, site, module.number, layout.scale, self._now))

    def forward(self, going: Pass, hidden_states: Tensor, *, needs_gradient: bool) -> Tensor:
        """Runs a pass forward.

        hidden_states: (batch, sequence, hidden), at the cut.
        needs_gradient: whether the gradient by them is needed.

        Returns the last hidden states, float32 and of the same shape.
        """
        inputs = hidden_states.to(self._device).requires_grad_(needs_gradient)
        work = ("forward", inputs.shape, going.cut, len(going.active.merged))
        with self._computing(work, going), autocast(self._dtype, self._device):
            outputs = self._through(inputs, going.cut)
        going.outputs = outputs
        going.inputs = inputs
        return outputs.detach().float()

    def backward(self, going: Pass, gradient: Tensor) -> Tensor | None:
        """Runs a pass backward.

        gradient: by the last hidden states, (batch, sequence, hidden).

        Returns the gradient at the cut, of the same shape; None where it was not needed.
        """
        outputs, inputs = going.outputs, going.inputs
        assert outputs is not None
        assert inputs is not None
        going.outputs = going.inputs = None
        work = ("backward", gradient.shape, going.cut, going.active.trained, len(going.active.merged))
        if outputs.requires_grad:
            # The lock comes before the turn: who held the turn while waiting for autograd's thread would block the pass
            # there.
            with self._backwards, self._computing(work, going):
                outputs.backward(gradient.to(self._device, outputs.dtype))
        return inputs.grad

    @torch.no_grad()
    def evaluate(self, going: Pass, hidden_states: Tensor) -> Tensor:
        """Runs a pass forward as `forward` does, but always in float32, and keeps nothing."""
        with self._computing(("evaluate", hidden_states.shape, going.cut, len(going.active.merged)), going):
            outputs = self._through(hidden_states.to(self._device), going.cut)
        return outputs.float()

    def _through(self, hidden_states: Tensor, cut: int) -> Tensor:
        for stage in self.stages:
            if stage.spec.first >= cut:
                hidden_states = stage(hidden_states)
        return hidden_states

    @contextmanager
    def _computing(self, work: tuple[object, ...], going: Pass) -> Iterator[None]:
        self._now.going = going
        with self.turn.taken():
            before = going.waited
            try:
                with self.ledger.computing(work, lambda: going.waited - before):
                    yield
            finally:
                del self._now.going
