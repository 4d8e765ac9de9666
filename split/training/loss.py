"""The loss that training and evaluation share: summed negative log likelihood of next tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from isthmus.split.data.sequences import IGNORE

_NEARLY_ALL = 0.97  # share of the positions from which on choosing them takes longer than it saves
_CHUNK_VALUES = 2**20  # logits made float32 at a time: 4 MiB, of which a processor's caches hold a part
_ACCELERATED = 16  # times as many on an accelerator, where starting a computation counts for more


def nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Summed negative log likelihood of next tokens, in nats, and the number of predicted tokens.

    logits: (batch, sequence, vocabulary), any float dtype.
    labels: (batch, sequence) int64 on the same device, not shifted, -100 where no loss is taken.

    Position t predicts labels[:, t + 1]; the last position predicts nothing. The sum is float32 (float64 for float64
    logits) and can be differentiated once. Beside the logits only their gradient is as large: a second copy of them in
    float32, which would take most of a device's memory, is never made.
    """
    targets = _next_tokens(labels).reshape(-1)
    rows = logits.reshape(-1, logits.shape[-1])  # a view: shifting the logits instead of the labels would copy them
    total: Tensor = _SummedNll.apply(rows, targets)  # type: ignore[no-untyped-call]
    return total, int((targets != IGNORE).sum())


def nll_where_wanted(head: Callable[[Tensor], Tensor], last: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """`nll` of head(last), computed only at positions that predict something, so not for prompts and padding.

    head: computes the logits of each position by itself.
    last: (batch, sequence, hidden).
    labels: (batch, sequence).
    """
    targets = _next_tokens(labels)
    wanted = targets != IGNORE
    if wanted.float().mean() > _NEARLY_ALL:
        return nll(head(last), labels)
    rows = F.pad(last[wanted], (0, 0, 0, 1))  # a row more, because in `nll` the last position of a row predicts nothing
    return nll(head(rows.unsqueeze(0)), F.pad(targets[wanted], (1, 0), value=IGNORE).unsqueeze(0))


def _next_tokens(labels: Tensor) -> Tensor:
    """The token that each position predicts, (batch, sequence); the last position predicts nothing."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE)], dim=1)


class _SummedNll(torch.autograd.Function):
    """Summed loss of logits (rows, vocabulary) and targets (rows), a few rows at a time.

    The forward pass keeps each row's logarithm of the sum of exponentials, and the backward pass makes the softmax
    again from it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        normalisers = torch.empty(len(rows), dtype=wide, device=rows.device)
        total = torch.zeros((), dtype=wide, device=rows.device)
        for part in _parts(rows):
            logits, wanted = rows[part].to(wide), targets[part] != IGNORE
            normalisers[part] = logits.logsumexp(-1)
            chosen = logits.gather(-1, targets[part].clamp_min(0)[:, None])[:, 0]
            total += (normalisers[part] - chosen).where(wanted, 0).sum()
        ctx.save_for_backward(rows, targets, normalisers)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor) -> tuple[Tensor, None]:
        """Softmax minus one at the target; rows without a target have no gradient."""
        rows, targets, normalisers = ctx.saved_tensors
        gradient = torch.empty_like(rows)
        for part in _parts(rows):
            wanted = (targets[part] != IGNORE)[:, None]
            softmax = (rows[part].to(normalisers.dtype) - normalisers[part][:, None]).exp_()
            minus_one = softmax.new_full((len(softmax), 1), -1)
            softmax.scatter_add_(-1, targets[part].clamp_min(0)[:, None], minus_one)
            gradient[part] = softmax.mul_(by_total).masked_fill_(~wanted, 0)
        return gradient, None


def _parts(rows: Tensor) -> list[slice]:
    values = _CHUNK_VALUES * (1 if rows.device.type == "cpu" else _ACCELERATED)
    size = max(1, values // rows.shape[-1])
    return [slice(start, start + size) for start in range(0, len(rows), size)]
