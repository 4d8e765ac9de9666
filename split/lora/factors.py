"""A LoRA module as a product of two factors, and what can be computed of such products without forming them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Factors:
    """A module's adapter without its scale, whose product is B A.

    a: (rank, in), b: (out, rank), float32.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def full_rank(self) -> int:
        """The largest rank that a product of this shape can have."""
        return min(self.a.shape[1], self.b.shape[0])

    def product(self) -> Tensor:
        """The product B A, (out, in)."""
        return self.b @ self.a

    def first(self, rank: int) -> Factors:
        """The leading part of this rank."""
        return Factors(self.a[:rank], self.b[:, :rank])

    def after(self, rank: int) -> Factors:
        """The part that `first` leaves out."""
        return Factors(self.a[rank:], self.b[:, rank:])

    def times(self, weight: float) -> Factors:
        """The factors of the product times a weight."""
        return Factors(self.a, self.b * weight)

    def padded(self, rank: int) -> Factors:
        """The same product with more rank: zeros are added."""
        return Factors(pad(self.a, (0, 0, 0, rank - self.rank)), pad(self.b, (0, rank - self.rank)))


WeightedFactors = tuple[Factors, float]  # what one holder has, and its weight; weights add up to 1


def stacked(parts: Sequence[WeightedFactors]) -> Factors:
    """Put factors side by side: exactly the weighted average of the products. The ranks add up."""
    return Factors(
        torch.cat([factors.a for factors, _ in parts]),
        torch.cat([factors.b * weight for factors, weight in parts], dim=1),
    )


def norm_squared(factors: Factors) -> float:
    """Squared Frobenius norm of the product.

    It comes from two Gram matrices, (rank, rank), since the product itself is large.
    """
    a, b = factors.a.double(), factors.b.double()
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def difference_squared(one: Factors, other: Factors) -> float:
    """Squared Frobenius norm of the difference of two products.

    It comes from orthogonal factors of a joint basis, and not from Gram matrices of the differences: those would lose
    half of the digits where the two are nearly the same.
    """
    both = Factors(torch.cat([one.a, other.a]).double(), torch.cat([one.b, -other.b], dim=1).double())
    core, _, _ = core_of(both)
    return float(core.square().sum())


def core_of(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Write B A as Q_b C Q_a^T with orthonormal columns. Returns (C, Q_b, Q_a); C is as small as the rank."""
    q_a, r_a = torch.linalg.qr(factors.a.T)
    q_b, r_b = torch.linalg.qr(factors.b)
    return r_b @ r_a.T, q_b, q_a
