"""Stacking (FLoRA, Wang et al. 2024, arXiv 2409.05976): adapters side by side are exactly the average of the products.

The stack becomes a frozen part of the model, which grows with every round, and training begins at zero again. Where it
would pass the rank that a matrix of its shape can have, it is factorised anew without loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isthmus.split.aggregation.base import Aggregation
from isthmus.split.aggregation.refactor import refactored
from isthmus.split.job.shapes import STACKING
from isthmus.split.lora.factors import Factors, WeightedFactors, stacked


class Stacking(Aggregation):
    name = STACKING
    starts_anew = True

    def merge(self, parts: Sequence[WeightedFactors], rank: int) -> Factors:
        return stacked(parts)


def grown(frozen: Factors | None, stack: Factors) -> tuple[Factors, bool]:
    """Add one round's stack to a module's frozen part. Returns it, and whether it was factorised anew."""
    both = stack if frozen is None else stacked([(frozen, 1.0), (stack, 1.0)])
    if both.rank <= both.full_rank:
        return both, False
    return refactored(both, both.full_rank), True


def grow(frozen: dict[str, Factors], stacks: Mapping[str, Factors]) -> bool:
    """Add a round's stacks, by module, to the frozen parts. True if one was factorised anew: then all must be sent."""
    remade = False
    for module, stack in stacks.items():
        frozen[module], anew = grown(frozen.get(module), stack)
        remade |= anew
    return remade
