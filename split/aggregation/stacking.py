"""Stacking (FLoRA, Wang et al. 2024, arXiv 2409.05976): adapters side by side are exactly the average of the products.

The stack becomes a frozen part of the model, which grows with every round, and training begins at zero again. Where it
would pass the rank that a matrix of its shape can have, it is factorised anew without loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.split.aggregation.base import Aggregation
from isthmus.split.aggregation.refactor import refactored
from isthmus.split.job.shapes import STACKING
from isthmus.split.lora.factors import Factors, Part, stacked


class Stacking(Aggregation):
    name = STACKING
    starts_anew = True

    def merge(self, parts: Sequence[Part], rank: int) -> Factors:
        return stacked(parts)


def grown(frozen: Factors | None, stack: Factors) -> tuple[Factors, bool]:
    """The frozen part with one round's stack; whether it was factorised anew."""
    both = stack if frozen is None else stacked([(frozen, 1.0), (stack, 1.0)])
    if both.rank <= both.full_rank:
        return both, False
    return refactored(both, both.full_rank), True
