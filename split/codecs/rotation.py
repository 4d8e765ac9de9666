"""Transform `hadamard`: a random rotation, after which no value stands out and one scale a block loses less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from isthmus.split.codecs.state import CodecState
from isthmus.split.errors import CodecError

_LARGEST_BLOCK = 1024
_SMALLEST_BLOCK = 16  # a width that has only smaller ones is filled up
_PADDED_TO = 64


@dataclass(frozen=True)
class Hadamard:
    """Random signs, then the orthonormal Walsh-Hadamard transform of each block (Suresh et al. 2017, arXiv 1611.00429).

    The signs follow from the state's seed, which both ends share, so nothing is sent for them. A block is the largest
    power of two that divides the width, at most 1024; a width without a block of 16 is filled with zeros up to a
    multiple of 64. The order of a block's values after the transform is one that is quick to compute.
    """

    name: ClassVar[str] = "hadamard"

    def forward(self, x: Tensor, state: CodecState) -> tuple[bytes, Tensor]:
        rows, width = x.shape
        padded = self.width(width)
        if padded != width:
            x = torch.nn.functional.pad(x, (0, padded - width))
        first, second = (matrix.to(x.device) for matrix in _factors(_block(padded)))
        y = (x * self._signs(padded, state).to(x.device)).reshape(-1, len(first), len(second))
        y = (y @ second).transpose(1, 2) @ first if len(first) > 1 else y @ second
        return b"", y.reshape(rows, padded)

    def receive(self, side: bytes, width: int, state: CodecState) -> None:
        if side:
            raise CodecError(f"{len(side)} bytes of side information; hadamard has none")

    def inverse(self, y: Tensor, width: int, state: CodecState) -> Tensor:
        rows, padded = y.shape
        first, second = (matrix.to(y.device) for matrix in _factors(_block(padded)))
        y = y.reshape(-1, len(second), len(first))
        x = (y @ first).transpose(1, 2) @ second if len(first) > 1 else y.transpose(1, 2) @ second
        x = x.reshape(rows, padded) * self._signs(padded, state).to(y.device)
        return x if padded == width else x[:, :width].contiguous()

    def width(self, width: int) -> int:
        return width if _block(width) >= _SMALLEST_BLOCK else -(-width // _PADDED_TO) * _PADDED_TO

    def side_bytes(self, width: int) -> int:
        return 0

    def _signs(self, width: int, state: CodecState) -> Tensor:
        """(width,) of 1 and -1; the same for every tensor of this width, drawn on the CPU wherever the tensors are."""
        return _signs((state.seed * 1_000_003 + width) % 2**63, width)


@lru_cache(maxsize=256)
def _signs(seed: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.0 - 2.0 * torch.randint(2, (width,), generator=generator).float()


def _block(width: int) -> int:
    return min(width & -width, _LARGEST_BLOCK)


@cache
def _factors(block: int) -> tuple[Tensor, Tensor]:
    """Two orthonormal Hadamard matrices whose Kronecker product is the block's: cheaper than the one by their sizes."""
    second = 2 ** math.ceil(math.log2(block) / 2) if block > 64 else block
    return _hadamard(block // second), _hadamard(second)


def _hadamard(size: int) -> Tensor:
    """Sylvester's construction: symmetric, its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)
