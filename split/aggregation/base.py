"""What an aggregation of LoRA adapters is: products B A of several ranks made one. One method a file, by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from isthmus.split.lora.factors import Factors, WeightedFactors


class Aggregation(ABC):
    """name: as the user chooses it. exact: whether the result's product is the average of the products.

    completes: whether a holder's part has to come with what its rank leaves out of the last result (see Merging).
    starts_anew: whether the result becomes a frozen part of the model, and training begins at zero again.
    turns: whether the result is in another basis than what was merged, so that a holder's copy is turned to its own.
    """

    name: str
    completes = False
    starts_anew = False
    turns = False

    @abstractmethod
    def merge(self, parts: Sequence[WeightedFactors], rank: int) -> Factors:
        """The result for one module. rank: of the job; the result has it, or any other where it starts anew."""
