"""Quantisers to signed integers of few bits with one scale a block, to the nearest or without bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isthmus.split.codecs.base import Entropy
from isthmus.split.codecs.blocks import blocked, blocks_in, divided, scale_bytes, scales_from, scales_of, unblocked
from isthmus.split.codecs.payload import Reader
from isthmus.split.codecs.state import CodecState


@dataclass(frozen=True)
class Integer:
    """Integers from -n to n, n = 2^(bits-1) - 1, times the block's scale: max|block| / n, rounded up to bfloat16.

    A block is `block` values of the last dimension (the last of a row may be short), or with `row` the whole row
    (Dettmers et al. 2021, arXiv 2110.02861, section 2.1, with evenly spaced levels). A block of zeros gives zeros.

    Nearest: |x - decoded| <= scale / 2. It is biased, but never further from x than 0 is.
    stochastic: |x - decoded| < scale, and the mean of decoded is x, to 2^-17 of the scale (QSGD: Alistarh et al. 2017,
    arXiv 1610.02132). Nothing is ever clipped.

    Two bits have the levels -1, 0, 1 (TernGrad: Wen et al. 2017, arXiv 1705.07878). Four levels from -max to max would
    halve the squared error of values like a Gaussian's; but they cannot say 0, and where a block has outliers, as
    hidden states and gradients do, the many small values would come back larger than they were, which error feedback
    does not forgive.
    """

    bits: int
    block: int = 64
    row: bool = False
    stochastic: bool = False
    exact: ClassVar[bool] = False

    @property
    def name(self) -> str:
        block = ":row" if self.row else "" if self.block == 64 else f":block={self.block}"
        return f"int{self.bits}{block}{':stochastic' if self.stochastic else ''}"

    @property
    def levels(self) -> int:
        """The greatest integer."""
        return int(2 ** (self.bits - 1)) - 1

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        width = x.shape[1]
        blocks = blocked(x, self._block(width))
        written, scales = scales_of(blocks, self.levels, self.name)
        steps = divided(blocks, scales)
        if self.stochastic:
            steps = (steps + _noise(steps.shape, state.generator(x.device))).floor_()
            steps.clamp_(-self.levels, self.levels)  # against rounding in the division alone
        else:
            steps.round_()
        return written + entropy.pack(unblocked(steps.to(torch.int16), width), -self.levels, self.levels)

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        block = self._block(width)
        reader = Reader(payload)
        scales = scales_from(reader.take(scale_bytes(rows, width, block)), rows, blocks_in(width, block))
        symbols = entropy.unpack(reader.rest(), rows, width, -self.levels, self.levels)
        return unblocked(blocked(symbols.float(), block).mul_(scales), width)

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        scales = scale_bytes(rows, width, self._block(width))
        return scales + entropy.packed_bytes(rows, width, -self.levels, self.levels)

    def _block(self, width: int) -> int:
        return width if self.row else min(self.block, width)


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform in (0, 1): the middles of 2^16 equal parts, which float32 can add to integers of eight bits exactly.

    Four are drawn at once; torch.rand takes four times as long.
    """
    fours = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=generator.device)
    fours.random_(-(2**63), None, generator=generator)
    sixteen = fours.view(torch.int16)[: shape.numel()].reshape(shape)
    return sixteen.float().mul_(2.0**-16).add_(0.5 + 2.0**-17)
