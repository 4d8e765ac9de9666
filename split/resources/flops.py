"""Counts of floating-point operations, made on the operators that ran: matrix products and attention."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class FlopMeter:
    """Sums the operations of work that is done again and again: each kind is counted once, then multiplied."""

    def __init__(self) -> None:
        self.total = 0.0
        self._of_work: dict[Hashable, float] = {}

    @contextmanager
    def counting(self, work: Hashable) -> Iterator[None]:
        """Counts the operations of some work.

        work: its name, and the shapes that its number of operations depends on.
        """
        known = self._of_work.get(work)
        counter = _FlopCounter() if known is None else None
        with counter or nullcontext():
            yield
        if counter is not None:
            self._of_work[work] = known = counter.total
        self.total += known or 0.0


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _cpu_attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_aten = torch.ops.aten
_FORMULAS = {  # torch's own, and attention on a processor, which torch lacks
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class _FlopCounter(TorchDispatchMode):
    """Counts the operations that this thread runs.

    torch's own FlopCounterMode hooks every module of the process, which several trainers in one process do not survive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
