"""Blocks of the last dimension, and one bfloat16 scale for each.

A scale is rounded up, so that the largest value of a block is never clipped, and bfloat16 because gradients are so
small that float16 scales become 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isthmus.split.errors import CodecError

_LARGEST = 0x7F7F  # the greatest finite bfloat16, as bits


def blocks_in(width: int, block: int) -> int:
    return -(-width // block)


def blocked(x: Tensor, block: int) -> Tensor:
    """Cut rows into blocks, filled up with zeros: (rows, width) -> (rows, blocks, block)."""
    rows, width = x.shape
    if width % block:
        x = torch.nn.functional.pad(x, (0, -width % block))
    return x.reshape(rows, blocks_in(width, block), block)


def unblocked(blocks: Tensor, width: int) -> Tensor:
    """Undo `blocked`: (rows, blocks, block) -> (rows, width)."""
    flat = blocks.reshape(len(blocks), -1)
    return flat if flat.shape[1] == width else flat[:, :width].contiguous()


def scales_of(blocks: Tensor, steps: int, name: str) -> tuple[bytes, Tensor]:
    """The scale of each block: its largest absolute value / steps. Returns it as bytes, and (rows, blocks, 1) float32.

    A scale is 0 only where the block is all 0. Raises CodecError where the largest value would come back as infinity.
    """
    largest = blocks.abs().amax(-1)
    codes = ((largest / steps).view(torch.int32) + 0xFFFF) >> 16
    codes = torch.maximum(codes, (largest > 0).int())  # the quotient of a subnormal number can be 0
    scales = (codes << 16).view(torch.float32)
    if not torch.isfinite(scales.amax() * steps):
        raise CodecError(f"values above 3e38 cannot be coded by {name}: if training has diverged, lower learning_rate")
    return codes.to(torch.int16).cpu().numpy().astype("<i2", copy=False).tobytes(), scales.unsqueeze(-1)


def scales_from(data: bytes, rows: int, blocks: int) -> Tensor:
    """Read scales, (rows, blocks, 1) float32. Raises CodecError for what is no scale: negative, infinite, NaN."""
    codes = np.frombuffer(data, "<i2")
    if codes.min() < 0 or codes.max() > _LARGEST:
        raise CodecError("a payload with a scale that is negative, infinite or NaN")
    return torch.from_numpy(codes.astype(np.int32) << 16).view(torch.float32).reshape(rows, blocks, 1)


def scale_bytes(rows: int, width: int, block: int) -> int:
    """Bytes that the scales of a matrix take."""
    return 2 * rows * blocks_in(width, block)


def divided(blocks: Tensor, scales: Tensor) -> Tensor:
    """Divide blocks by their scales into a new tensor; 0 where the scale is 0."""
    return blocks / scales.where(scales > 0, 1.0)
