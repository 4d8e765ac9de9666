"""Which number format pays on this processor or accelerator: measured, not assumed."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

from isthmus.split.errors import BadRequest


def pick_device(name: str = "auto") -> torch.device:
    """The torch device for `auto` (an accelerator where there is one) or for a torch name such as cpu or cuda:1."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; `auto` times both on a matrix product of a training step's size."""
    if name == "auto":
        return torch.bfloat16 if _speedup_of_bfloat16(str(device)) > 1.2 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products run in `dtype`; weights, residuals and losses stay float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


@lru_cache(maxsize=8)
def _speedup_of_bfloat16(device: str) -> float:
    return _seconds(torch.float32, device) / _seconds(torch.bfloat16, device)


def _seconds(dtype: torch.dtype, device: str) -> float:
    """The best of three products of (256, 512) and (512, 512), after one that is not counted."""
    left = torch.ones(256, 512, dtype=dtype, device=device)
    right = torch.ones(512, 512, dtype=dtype, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (left @ right).sum().item()  # item() waits for an accelerator to finish
        times.append(time.perf_counter() - start)
    return min(times[1:])
