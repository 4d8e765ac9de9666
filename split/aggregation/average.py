"""A and B averaged each for itself, as SplitLoRA does: an approximation, for the average of products is another matrix
than the product of averages. Only for adapters of one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isthmus.split.aggregation.base import Aggregation
from isthmus.split.job.shapes import AVERAGE
from isthmus.split.lora.factors import Factors, WeightedFactors


class Average(Aggregation):
    name = AVERAGE

    def merge(self, parts: Sequence[WeightedFactors], rank: int) -> Factors:
        return Factors(
            torch.stack([factors.a * weight for factors, weight in parts]).sum(0),
            torch.stack([factors.b * weight for factors, weight in parts]).sum(0),
        )
