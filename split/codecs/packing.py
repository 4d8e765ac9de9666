"""Unsigned integers of 1 to 32 bits as bytes, with no bit to spare.

Whole low bytes go first, a plane for each, then the 1 to 7 bits that are left of every value, eight values to as many
bytes as these are bits. Together that is ceil(count * bits / 8) bytes, as if the bits stood one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.split.errors import CodecError

Unsigned = NDArray[Any]  # uint8, uint16 or uint32


def bits_for(values: int) -> int:
    """Number of bits that tell `values` values apart; at least 1."""
    return max(1, (values - 1).bit_length())


def packed_size(count: int, bits: int) -> int:
    """Bytes that `pack` gives."""
    return (count * bits + 7) // 8


def pack(values: Unsigned, bits: int) -> bytes:
    """Pack unsigned integers. values: each below 2**bits; higher bits would spoil what stands beside them."""
    values = values.reshape(-1)
    planes, rest = divmod(bits, 8)
    parts = [_plane(values, i).tobytes() for i in range(planes)]
    if rest:
        parts.append(_pack_few(_plane(values, planes), rest))
    return b"".join(parts)


def unpack(data: bytes, count: int, bits: int) -> Unsigned:
    """Unpack `count` values of the smallest type that holds them. Raises CodecError if data is not of that length."""
    if len(data) != packed_size(count, bits):
        raise CodecError(f"{len(data)} bytes; {count} values of {bits} bits take {packed_size(count, bits)}")
    planes, rest = divmod(bits, 8)
    parts: list[NDArray[np.uint8]] = [np.frombuffer(data, np.uint8, count, i * count) for i in range(planes)]
    if rest:
        parts.append(_unpack_few(data[planes * count :], count, rest))
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return _join(parts, np.uint16)
    return _join(parts, np.uint32)


def pack_bits(flags: Tensor) -> bytes:
    """Pack flags, bool of any shape, as a bit each, the lowest first."""
    return np.packbits(flags.cpu().numpy().reshape(-1), bitorder="little").tobytes()


def unpack_bits(data: bytes, shape: Sequence[int]) -> Tensor:
    """Undo `pack_bits`. Raises CodecError when there are not as many bits as the shape has."""
    count = math.prod(shape)
    if len(data) != packed_size(count, 1):
        raise CodecError(f"{len(data)} bytes of flags; shape {tuple(shape)} takes {packed_size(count, 1)}")
    flags = np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little")
    return torch.from_numpy(flags).bool().reshape(tuple(shape))


def byte_planes(values: Unsigned) -> bytes:
    """Write the lowest byte of every value, then the next, and so on: what is alike lies together."""
    return b"".join(_plane(values, i).tobytes() for i in range(values.dtype.itemsize))


def from_byte_planes(data: bytes, count: int, size: int) -> Unsigned:
    """Undo `byte_planes`, for `count` values of `size` bytes."""
    return unpack(data, count, 8 * size)


def _plane(values: Unsigned, i: int) -> NDArray[np.uint8]:
    return (values >> (8 * i)).astype(np.uint8) if i else values.astype(np.uint8, copy=False)


def _join(planes: list[NDArray[np.uint8]], dtype: type[np.uint16] | type[np.uint32]) -> Unsigned:
    joined: Unsigned = planes[0].astype(dtype)
    for i, plane in enumerate(planes[1:], 1):
        wide: Unsigned = plane.astype(dtype)
        joined |= wide << 8 * i
    return joined


def _lanes(bits: int) -> list[tuple[int, int]]:
    """The steps that bring 8 values of `bits` bits from 8 bytes together.

    Two meet in 16 bits, twice two in 32, then all. Each step is (how far a neighbour moves, the bits that hold values
    for sure).
    """
    steps = []
    for lane, held in ((16, bits), (32, 2 * bits), (64, 4 * bits)):
        low = sum(((1 << held) - 1) << at for at in range(0, 64, lane))
        steps.append((lane // 2 - held, low))
    return steps


def _pack_few(values: NDArray[np.uint8], bits: int) -> bytes:
    size = packed_size(len(values), bits)
    if len(values) % 8:
        values = np.concatenate([values, np.zeros(-len(values) % 8, np.uint8)])
    eights = values.view("<u8")
    for (shift, low), held in zip(_lanes(bits), (bits, 2 * bits, 4 * bits), strict=True):
        eights = (eights & np.uint64(low)) | ((eights >> np.uint64(shift)) & np.uint64((low << held) % 2**64))
    if bits in (1, 2, 4):
        return eights.astype(f"<u{bits}").tobytes()[:size]
    return eights.view(np.uint8).reshape(-1, 8)[:, :bits].tobytes()[:size]


def _unpack_few(data: bytes, count: int, bits: int) -> NDArray[np.uint8]:
    groups = (count + 7) // 8
    if len(data) < groups * bits:
        data += bytes(groups * bits - len(data))
    if bits in (1, 2, 4):
        eights = np.frombuffer(data, f"<u{bits}").astype("<u8")
    else:
        bytes_ = np.zeros((groups, 8), np.uint8)
        bytes_[:, :bits] = np.frombuffer(data, np.uint8).reshape(groups, bits)
        eights = bytes_.view("<u8").reshape(-1)
    for (shift, low), held in reversed(list(zip(_lanes(bits), (bits, 2 * bits, 4 * bits), strict=True))):
        eights = (eights & np.uint64(low)) | ((eights & np.uint64((low << held) % 2**64)) << np.uint64(shift))
    return eights.view(np.uint8)[:count]
