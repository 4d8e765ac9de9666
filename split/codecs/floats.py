"""Quantisers to shorter floats, and float32 itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from isthmus.split.codecs.base import Entropy
from isthmus.split.codecs.blocks import blocked, divided, scale_bytes, scales_from, scales_of, unblocked
from isthmus.split.codecs.packing import Unsigned, byte_planes, from_byte_planes
from isthmus.split.codecs.payload import Reader, Writer
from isthmus.split.codecs.plain import Plain
from isthmus.split.codecs.state import CodecState
from isthmus.split.errors import CodecError

_GREATEST_BFLOAT16 = torch.finfo(torch.bfloat16).max
_GREATEST_FP8 = 448


@dataclass(frozen=True)
class Raw:
    """float32 as it is, bit for bit, whatever the entropy coder."""

    name: ClassVar[str] = "none"
    exact: ClassVar[bool] = True

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        return x.cpu().numpy().astype("<f4", copy=False).tobytes()

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        data = Plain().expand(payload, 4 * rows * width)
        return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32)).reshape(rows, width)

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        return 4 * rows * width


@dataclass(frozen=True)
class Shuffle:
    """float32 bit for bit: all lowest bytes, then all second ones, ... so that an entropy coder finds what is alike.

    Signs and exponents are where it saves; the mantissas are noise. Worth nothing without an entropy coder.
    """

    name: ClassVar[str] = "shuffle"
    exact: ClassVar[bool] = True

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        return _write_planes(x.cpu().numpy().reshape(-1).view(np.uint32), entropy)

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        words = _read_planes(payload, rows * width, 4, entropy)
        return torch.from_numpy(words.view(np.float32)).reshape(rows, width)

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        return _planes_size(rows * width, 4, entropy)


@dataclass(frozen=True)
class Float16:
    """float16 of the tensor times one power of two, which brings its largest value to between 2^14 and 2^15.

    So nothing overflows and gradients of 1e-8 keep all their digits.
    |x - decoded| <= 2^-11 |x| + 2^-39 max|x|.
    """

    name: ClassVar[str] = "float16"
    exact: ClassVar[bool] = False

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        shift = power_of_two(x)
        return shift.to_bytes(1, "little", signed=True) + _write_halves((x * 2.0**shift).half(), entropy)

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        reader = Reader(payload)
        shift = shift_from(reader.take(1))
        return _read_halves(reader.rest(), rows, width, torch.float16, entropy) * 2.0**-shift

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        return 1 + _planes_size(rows * width, 2, entropy)


@dataclass(frozen=True)
class BFloat16:
    """bfloat16, to nearest. |x - decoded| <= 2^-8 |x| (and 2^-134, for subnormal numbers)."""

    name: ClassVar[str] = "bfloat16"
    exact: ClassVar[bool] = False

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        rounded = x.bfloat16().clamp_(-_GREATEST_BFLOAT16, _GREATEST_BFLOAT16)  # float32 goes a little further
        return _write_halves(rounded, entropy)

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        return _read_halves(payload, rows, width, torch.bfloat16, entropy)

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        return _planes_size(rows * width, 2, entropy)


@dataclass(frozen=True)
class Fp8:
    """Eight bits, 4 of exponent and 3 of mantissa (e4m3: Micikevicius et al. 2022, arXiv 2209.05433), with one bfloat16
    scale a block of the last dimension, which makes the block's largest value 448.

    |x - decoded| <= max(2^-4 |x|, 2^-10 scale), where scale <= (1 + 2^-7) max|block| / 448.
    """

    block: int = 64
    exact: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "fp8" if self.block == 64 else f"fp8:block={self.block}"

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        blocks = blocked(x, min(self.block, x.shape[1]))
        written, scales = scales_of(blocks, _GREATEST_FP8, self.name)
        codes = unblocked(divided(blocks, scales).to(torch.float8_e4m3fn).view(torch.uint8), x.shape[1])
        return written + entropy.squeeze(codes.cpu().numpy().tobytes())

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        block = min(self.block, width)
        reader = Reader(payload)
        scales = scales_from(reader.take(scale_bytes(rows, width, block)), rows, -(-width // block))
        codes = np.frombuffer(entropy.expand(reader.rest(), rows * width), np.uint8)
        values = torch.from_numpy(_FP8_VALUES.take(codes)).reshape(rows, width)  # the code of NaN is found out later
        return unblocked(blocked(values, block).mul_(scales), width)

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        return scale_bytes(rows, width, min(self.block, width)) + entropy.squeezed_bytes(rows * width)


_FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def power_of_two(x: Tensor) -> int:
    """The shift that brings the largest of |x| * 2^shift to [2^14, 2^15); -113 to 126, so that 2^-shift exists."""
    least, greatest = x.aminmax()
    largest = max(-float(least), float(greatest))
    return min(15 - math.frexp(largest)[1], 126) if largest else 0


def shift_from(data: bytes) -> int:
    shift = int.from_bytes(data, "little", signed=True)
    if not -113 <= shift <= 126:
        raise CodecError(f"a payload with a scale of 2^{shift}; -113 to 126 can be there")
    return shift


def _write_halves(halves: Tensor, entropy: Entropy) -> bytes:
    words = halves.view(torch.int16).cpu().numpy().reshape(-1).view(np.uint16)
    if isinstance(entropy, Plain):
        return words.astype("<u2", copy=False).tobytes()
    return _write_planes(words, entropy)


def _read_halves(payload: bytes, rows: int, width: int, dtype: torch.dtype, entropy: Entropy) -> Tensor:
    if isinstance(entropy, Plain):
        words = np.frombuffer(entropy.expand(payload, 2 * rows * width), "<i2").astype(np.int16)
    else:
        words = _read_planes(payload, rows * width, 2, entropy).view(np.int16)
    return torch.from_numpy(words).view(dtype).float().reshape(rows, width)


def _write_planes(words: Unsigned, entropy: Entropy) -> bytes:
    """Each plane is squeezed on its own: one table of byte frequencies for all would fit none."""
    data, count = byte_planes(words), len(words)
    if isinstance(entropy, Plain):
        return data
    writer, highest = Writer(), len(data) - count
    for start in range(0, highest, count):
        writer.section(entropy.squeeze(data[start : start + count]))
    writer.rest(entropy.squeeze(data[highest:]))
    return writer.done()


def _read_planes(payload: bytes, count: int, size: int, entropy: Entropy) -> Unsigned:
    if isinstance(entropy, Plain):
        return from_byte_planes(payload, count, size)
    reader, most = Reader(payload), entropy.squeezed_bytes(count)
    planes = [entropy.expand(reader.section(most), count) for _ in range(size - 1)]
    planes.append(entropy.expand(reader.rest(), count))
    return from_byte_planes(b"".join(planes), count, size)


def _planes_size(count: int, size: int, entropy: Entropy) -> int:
    if isinstance(entropy, Plain):
        return count * size
    squeezed = entropy.squeezed_bytes(count)
    return (size - 1) * Writer.section_bytes(squeezed) + squeezed
