"""Quantisers that send a matrix as the product of two thin ones, in bfloat16.

The factors are of the tensor times a power of two (as in `float16`), so that neither overflows or vanishes. Where two
factors would take as much as the matrix itself, it goes in bfloat16 as it is. Both are biased: what is beyond the rank
is lost, unless `ef` (error feedback) sends it later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from isthmus.split.codecs.base import Entropy
from isthmus.split.codecs.floats import BFloat16, power_of_two, shift_from
from isthmus.split.codecs.payload import Reader
from isthmus.split.codecs.state import CodecState, Written, tensor_bytes
from isthmus.split.errors import CodecError

_BFLOAT16 = BFloat16()
_MORE = 8  # columns beyond the rank while looking for the best ones


@dataclass(frozen=True)
class FactorQuantiser(ABC):
    """The common part of quantisers that send factors: everything but how the factors are found."""

    exact: ClassVar[bool] = False
    rank: int

    @abstractmethod
    def _factors(self, x: Tensor, rank: int, state: CodecState) -> tuple[Tensor, Tensor]:
        """Find left (rows, rank) and right (width, rank), whose product stands for x, (rows, width)."""

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        rank = _rank(self.rank, *x.shape)
        if not rank:
            return _BFLOAT16.quantise(x, entropy, state)
        shift = power_of_two(x)
        left, right = self._factors(x * 2.0**shift, rank, state)
        return _write(left, right, shift, entropy, state)

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        return _read(payload, rows, width, _rank(self.rank, rows, width), entropy)

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        return _size(rows, width, _rank(self.rank, rows, width), entropy)


@dataclass
class _RightFactors:
    """(width, rank) of the last tensor of each shape, by (rows, width)."""

    factors: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(tensor_bytes(factor) for factor in self.factors.values())

    def written(self) -> Written:
        return Written(tensors=tuple(self.factors.items()))


@dataclass(frozen=True)
class PowerSgd(FactorQuantiser):
    """Finds factors by one power iteration from the last tensor's right factor (Vogels et al. 2019, arXiv 1905.13727).

    This is for gradients of weights and other tensors that change little from one to the next. The right factor of each
    shape is kept at the encoder; the decoder keeps nothing.
    """

    rank: int = 4

    @property
    def name(self) -> str:
        return "powersgd" if self.rank == 4 else f"powersgd:rank={self.rank}"

    def _factors(self, x: Tensor, rank: int, state: CodecState) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        kept = state.parts.setdefault(self.name, _RightFactors())
        assert isinstance(kept, _RightFactors)
        last = kept.factors.get((rows, width))
        start = _start(width, rank, state) if last is None else last
        left = torch.linalg.qr(x @ start.to(x.device))[0]
        right = kept.factors[rows, width] = x.T @ left
        return left, right

    def read(self, written: Written) -> _RightFactors:
        factors = {}
        for key, factor in written.tensors:
            if len(key) != 2 or factor.shape != (key[1], _rank(self.rank, *key)) or key in factors:
                raise CodecError(f"a state of {self.name} with a factor of {tuple(factor.shape)}")
            factors[key[0], key[1]] = factor
        return _RightFactors(factors)


@dataclass(frozen=True)
class LowRank(FactorQuantiser):
    """Finds nearly the best factors of each tensor on its own, for hidden states, which change at every step.

    Two randomised subspace iterations with 8 columns to spare (Halko et al. 2011, arXiv 0909.4061) give a subspace, of
    which the best directions are taken.
    """

    rank: int = 16

    @property
    def name(self) -> str:
        return "lowrank" if self.rank == 16 else f"lowrank:rank={self.rank}"

    def _factors(self, x: Tensor, rank: int, state: CodecState) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        basis = torch.linalg.qr(x @ _start(width, min(rank + _MORE, rows, width), state).to(x.device))[0]
        for _ in range(2):
            basis = torch.linalg.qr(x @ torch.linalg.qr(x.T @ basis)[0])[0]
        inside = basis.T @ x
        turn = torch.linalg.eigh((inside @ inside.T).double())[1].flip(1)[:, :rank].float()
        return basis @ turn, inside.T @ turn


def _rank(wanted: int, rows: int, width: int) -> int:
    """The rank that is sent; 0 where factors would not be smaller than the matrix."""
    rank = min(wanted, rows, width)
    return rank if rank * (rows + width) < rows * width else 0


def _start(width: int, rank: int, state: CodecState) -> Tensor:
    return torch.randn(width, rank, generator=state.generator(torch.device("cpu")))


def _write(left: Tensor, right: Tensor, shift: int, entropy: Entropy, state: CodecState) -> bytes:
    """Write factors. left: (rows, rank), right: (width, rank)."""
    return shift.to_bytes(1, "little", signed=True) + _BFLOAT16.quantise(torch.cat([left, right]), entropy, state)


def _read(payload: bytes, rows: int, width: int, rank: int, entropy: Entropy) -> Tensor:
    if not rank:
        return _BFLOAT16.dequantise(payload, rows, width, entropy)
    reader = Reader(payload)
    shift = shift_from(reader.take(1))
    left, right = _BFLOAT16.dequantise(reader.rest(), rows + width, rank, entropy).split([rows, width])
    product: Tensor = left @ right.T
    return product.mul_(2.0**-shift)


def _size(rows: int, width: int, rank: int, entropy: Entropy) -> int:
    if not rank:
        return _BFLOAT16.payload_bytes(rows, width, entropy)
    return 1 + _BFLOAT16.payload_bytes(rows + width, rank, entropy)
