"""Zero padding (HetLoRA, Cho et al. 2024, arXiv 2401.06432): adapters of lower rank are filled up with zeros, then A
and B are averaged each for itself: an approximation, and what only some holders have is thinned out by the zeros of
the others."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.split.aggregation.average import Average
from isthmus.split.aggregation.base import Aggregation
from isthmus.split.job.shapes import PADDING
from isthmus.split.lora.factors import Factors, WeightedFactors


class Padding(Aggregation):
    name = PADDING

    def merge(self, parts: Sequence[WeightedFactors], rank: int) -> Factors:
        return Average().merge([(factors.padded(rank), weight) for factors, weight in parts], rank)
