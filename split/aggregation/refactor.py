"""The average of the products, exactly, then factorised anew by SVD to the job's rank: free of the noise of averaged
factors (as HSplitLoRA does, Lin et al. 2025, arXiv 2505.02795). What is lost is what the rank cannot hold, and nothing
else that has this rank is nearer (Eckart and Young).

A device of a lower rank gets the leading part. The factors are not balanced (square roots of the singular values on
both sides): A keeps the size that LoRA's first values have and B carries the singular values, so that training goes on
as LoRA's does, and a direction that carries nothing yet begins like a new one, with B = 0 and A not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.split.aggregation.base import Aggregation
from isthmus.split.job.shapes import SVD
from isthmus.split.lora.factors import Factors, WeightedFactors, core_of, stacked

_ROW_NORM = 1 / math.sqrt(3)  # of a row of A as LoRA draws it: uniform within 1 / sqrt(in), in of them


class Refactor(Aggregation):
    name = SVD
    completes = True
    turns = True

    def merge(self, parts: Sequence[WeightedFactors], rank: int) -> Factors:
        return refactored(stacked(parts), rank)


def refactored(stack: Factors, rank: int) -> Factors:
    """Factorise a stack anew: the nearest product of this rank, by falling singular values, with zeros where it has
    fewer.
    """
    core, q_b, q_a = core_of(Factors(stack.a.double(), stack.b.double()))
    u, values, v_t = torch.linalg.svd(core, full_matrices=False)
    kept = min(rank, len(values))
    signs = _signs(v_t[:kept] @ q_a.T)
    a = signs * (v_t[:kept] @ q_a.T) * _ROW_NORM
    b = (q_b @ u[:, :kept]) * (values[:kept] / _ROW_NORM) * signs.T
    return Factors(a.float(), b.float()).padded(rank)


def turned_to(factors: Factors, own: Tensor) -> Factors:
    """Turn factors to the basis nearest to `own`, an A of the same rank (orthogonal Procrustes); the product stays.

    So what an optimiser remembers of a holder's parameters goes on meaning about the same.
    """
    if not factors.rank:
        return factors
    left, _, right = torch.linalg.svd(own.double() @ factors.a.double().T)
    turn = left @ right
    return Factors((turn @ factors.a.double()).float(), (factors.b.double() @ turn.T).float())


def _signs(rows: Tensor) -> Tensor:
    """The sign, (rank, 1), that makes the largest value of each row positive.

    SVD leaves it open, and a rerun must give the same.
    """
    if not rows.numel():
        return torch.ones(rows.shape[0], 1, dtype=rows.dtype)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)
