"""The interface of aggregations: products B A of several ranks become one. Each method has a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from isthmus.split.lora.factors import Factors, WeightedFactors


class Aggregation(ABC):
    """A way to make one adapter of several.

    name: as `--aggregation` has it.
    completes: whether a device's product has to be completed by what its rank leaves out of the last result.
    starts_anew: whether the result becomes a frozen part of the model, and training begins at zero again.
    turns: whether the result is in another basis than what was merged, so that each device's copy is turned to its own.
    """

    name: str
    completes = False
    starts_anew = False
    turns = False

    @abstractmethod
    def merge(self, parts: Sequence[WeightedFactors], rank: int) -> Factors:
        """Merge what the devices have of one module.

        parts: factors and their weights, which add up to 1. rank: the job's, which the result has, or any where it
        starts anew.
        """
