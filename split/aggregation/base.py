"""What an aggregation of LoRA adapters is: products B A of several ranks made one. One method a file, by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Factors:
    """A module's adapter, without its scale: its product is B A. a: (rank, in); b: (out, rank); float32."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def full_rank(self) -> int:
        """More than that no product of this shape can have."""
        return min(self.a.shape[1], self.b.shape[0])

    def product(self) -> Tensor:
        """(out, in)."""
        return self.b @ self.a

    def first(self, rank: int) -> Factors:
        return Factors(self.a[:rank], self.b[:, :rank])

    def after(self, rank: int) -> Factors:
        """What `first` leaves out."""
        return Factors(self.a[rank:], self.b[:, rank:])

    def times(self, weight: float) -> Factors:
        return Factors(self.a, self.b * weight)

    def padded(self, rank: int) -> Factors:
        """With zeros."""
        return Factors(pad(self.a, (0, 0, 0, rank - self.rank)), pad(self.b, (0, rank - self.rank)))


Part = tuple[Factors, float]  # what one holder has, and its weight; weights add up to 1


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
    def merge(self, parts: Sequence[Part], rank: int) -> Factors:
        """The result for one module. rank: of the job; the result has it, or any other where it starts anew."""


def stacked(parts: Sequence[Part]) -> Factors:
    """Exactly the weighted average of the products: side by side, so the ranks add up."""
    return Factors(
        torch.cat([factors.a for factors, _ in parts]),
        torch.cat([factors.b * weight for factors, weight in parts], dim=1),
    )


def norm_squared(factors: Factors) -> float:
    """Squared Frobenius norm of the product, from two Gram matrices (rank, rank): the product itself is large."""
    a, b = factors.a.double(), factors.b.double()
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def difference_squared(one: Factors, other: Factors) -> float:
    """Squared Frobenius norm of the difference of the products.

    Of orthogonal factors of a joint basis, and not from Gram matrices of the differences: those would lose half of
    the digits where the two are nearly the same.
    """
    both = Factors(torch.cat([one.a, other.a]).double(), torch.cat([one.b, -other.b], dim=1).double())
    core, _, _ = core_of(both)
    return float(core.square().sum())


def core_of(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """B A = Q_b C Q_a^T with orthonormal columns: (C, Q_b, Q_a). C is as small as the rank."""
    q_a, r_a = torch.linalg.qr(factors.a.T)
    q_b, r_b = torch.linalg.qr(factors.b)
    return r_b @ r_a.T, q_b, q_a
