"""Lossless coding of symbols and bytes: `Zstd`, which is fast, and `Range`, which comes nearer to the entropy.

Symbols that would take more than their plain bits are sent as these, so that neither ever takes more than the plain
bits and three bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.split.codecs import frames, pieces, range_coder
from isthmus.split.codecs.payload import Reader
from isthmus.split.codecs.plain import PLAIN
from isthmus.split.errors import CodecError

_HEAD = struct.Struct("<Bh")  # whether coded, and what was subtracted from the symbols
_LEVELS = range(1, 20)


@dataclass(frozen=True)
class Range:
    """The range coder of range_coder.py."""

    name: ClassVar[str] = "range"
    codes_bytes: ClassVar[bool] = False

    def pack(self, symbols: Tensor, low: int, high: int) -> bytes:
        return _pack(symbols, low, high, range_coder.encode)

    def unpack(self, payload: bytes, rows: int, width: int, low: int, high: int) -> Tensor:
        return _unpack(payload, rows, width, low, high, range_coder.decode)

    def packed_bytes(self, rows: int, width: int, low: int, high: int) -> int:
        return _packed_bytes(rows, width, low, high)

    def squeeze(self, data: bytes) -> bytes:
        _no_bytes()

    def expand(self, payload: bytes, size: int) -> bytes:
        _no_bytes()

    def squeezed_bytes(self, size: int) -> int:
        _no_bytes()


@dataclass(frozen=True)
class Zstd:
    """Symbols as in pieces.py; bytes as one frame of zstd. level: 1 (fast) to 19."""

    level: int = 1
    codes_bytes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.level not in _LEVELS:
            raise CodecError(f"zstd level {self.level}: choose {_LEVELS[0]} to {_LEVELS[-1]}")

    @property
    def name(self) -> str:
        return "zstd" if self.level == 1 else f"zstd:level={self.level}"

    def pack(self, symbols: Tensor, low: int, high: int) -> bytes:
        return _pack(symbols, low, high, lambda values: pieces.encode(values, self.level))

    def unpack(self, payload: bytes, rows: int, width: int, low: int, high: int) -> Tensor:
        return _unpack(payload, rows, width, low, high, pieces.decode)

    def packed_bytes(self, rows: int, width: int, low: int, high: int) -> int:
        return _packed_bytes(rows, width, low, high)

    def squeeze(self, data: bytes) -> bytes:
        return frames.compress(data, self.level)

    def expand(self, payload: bytes, size: int) -> bytes:
        return frames.decompress(payload, size)

    def squeezed_bytes(self, size: int) -> int:
        return frames.bound(size)


def _pack(symbols: Tensor, low: int, high: int, encode: Callable[[NDArray[np.int32]], bytes]) -> bytes:
    if not symbols.numel():
        return b""
    values = symbols.cpu().numpy().astype(np.int32)
    centre = 0 if low < 0 else int(np.median(values))
    coded = encode(values - centre if centre else values)
    if len(coded) < PLAIN.packed_bytes(len(values), values.shape[1], low, high):
        return _HEAD.pack(1, centre) + coded
    return _HEAD.pack(0, 0) + PLAIN.pack(symbols, low, high)


def _unpack(
    payload: bytes,
    rows: int,
    width: int,
    low: int,
    high: int,
    decode: Callable[[Reader, int, int], NDArray[np.int32]],
) -> Tensor:
    reader = Reader(payload)
    if not rows * width:
        reader.done()
        return torch.empty(rows, width, dtype=torch.int16)
    coded, centre = _HEAD.unpack(reader.take(_HEAD.size))
    if not coded:
        return PLAIN.unpack(reader.rest(), rows, width, low, high)
    values = decode(reader, rows, width)
    if values.min() + centre < low or values.max() + centre > high:
        raise CodecError(f"symbols from {values.min() + centre} to {values.max() + centre}; {low} to {high} can be")
    return torch.from_numpy(np.ascontiguousarray(values + centre, dtype=np.int16))


def _packed_bytes(rows: int, width: int, low: int, high: int) -> int:
    return _HEAD.size + PLAIN.packed_bytes(rows, width, low, high) if rows * width else 0


def _no_bytes() -> NoReturn:
    raise CodecError("range codes symbols, not bytes; for bytes choose zstd")
