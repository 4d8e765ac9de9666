"""Matrices of symbols as many short frames of zstd, each of symbols that are about equally large.

zstd codes a byte in no less than one bit, and has one Huffman table a block. So columns of like size are cut out
together, rows are sorted by how large they were in the parts before (the other end can do that too) and cut into
groups, and several small symbols share a byte: five of -1, 0, 1, three up to 2, two up to 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from isthmus.split.codecs import frames
from isthmus.split.codecs.packing import byte_planes, from_byte_planes
from isthmus.split.codecs.payload import Reader, Writer
from isthmus.split.errors import CodecError

_ALPHABETS = (0, 1, 2, 3, 7, 127, 32768)  # the largest |symbol| of each
_SHARE = (0, 5, 3, 2, 2, 1, 0)  # symbols a byte
_LEVELS = 28  # of columns: octaves of mean |symbol| from 2 ** -12 up
_COLUMNS = 48  # of a part, at most, unless there are few rows
_VALUES = 4000  # of a piece, at least: about where a Huffman table of its own pays
_GROUPS = 4  # of rows, at most


def encode(symbols: NDArray[np.int32], level: int) -> bytes:
    """Encode symbols of 16 bits at most, (rows, width), at least one. level: of the compressor."""
    rows = len(symbols)
    size = np.abs(symbols)
    mean = size.sum(0, dtype=np.int64) / rows
    octave = np.clip(np.rint(np.log2(np.maximum(mean, 2.0**-20))) + 12, 0, _LEVELS - 2) + 1
    levels = np.where(mean > 0, octave, 0).astype(np.uint8)
    order = _order(levels)
    compressor = frames.compressor(level)
    table, bodies = [], []
    sorted_symbols, size = symbols[:, order].astype(np.int16), size[:, order]
    seen = np.zeros(rows, dtype=np.int64)
    for start, end in _parts(levels[order], rows):
        by_size = np.argsort(-seen, kind="stable")
        for first, last in _groups(rows, end - start):
            piece = sorted_symbols[by_size[first:last], start:end]
            largest = max(int(piece.max()), -int(piece.min()))
            alphabet = next(i for i, most in enumerate(_ALPHABETS) if largest <= most)
            body = compressor.compress(_to_bytes(piece.ravel(), alphabet)) if alphabet else b""
            table.append(len(body) * len(_ALPHABETS) + alphabet)
            bodies.append(body)
        seen = seen // 2 + size[:, start:end].sum(1, dtype=np.int64)
    writer = Writer()
    writer.section(compressor.compress(levels.tobytes()))
    writer.section(compressor.compress(byte_planes(np.array(table, dtype=np.uint32))))
    writer.rest(b"".join(bodies))
    return writer.done()


def decode(reader: Reader, rows: int, width: int) -> NDArray[np.int32]:
    """Decode symbols, (rows, width), at least one. Raises CodecError."""
    decompressor = frames.decompressor()
    levels = np.frombuffer(frames.decompress(reader.section(frames.bound(width)), width, decompressor), dtype=np.uint8)
    if levels.max() >= _LEVELS:
        raise CodecError("symbols in columns of sizes that there are not")
    order = _order(levels)
    parts = list(_parts(levels[order], rows))
    count = sum(len(list(_groups(rows, end - start))) for start, end in parts)
    packed = frames.decompress(reader.section(frames.bound(4 * count)), 4 * count, decompressor)
    table = iter(from_byte_planes(packed, count, 4).tolist())
    symbols = np.zeros((rows, width), dtype=np.int32)
    sorted_symbols = np.empty((rows, len(order)), dtype=np.int16)
    seen = np.zeros(rows, dtype=np.int64)
    for start, end in parts:
        by_size = np.argsort(-seen, kind="stable")
        for first, last in _groups(rows, end - start):
            length, alphabet = divmod(next(table), len(_ALPHABETS))
            values = (last - first) * (end - start)
            if alphabet:
                data = frames.decompress(reader.take(length), _byte_count(values, alphabet), decompressor)
                piece = _from_bytes(data, values, alphabet)
            elif length:
                raise CodecError("bytes for symbols that are all zero")
            else:
                piece = np.zeros(values, dtype=np.int16)
            sorted_symbols[by_size[first:last], start:end] = piece.reshape(last - first, end - start)
        seen = seen // 2 + np.abs(sorted_symbols[:, start:end].astype(np.int32)).sum(1, dtype=np.int64)
    reader.done()
    symbols[:, order] = sorted_symbols
    return symbols


def _order(levels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The columns that are not all zero, the largest first."""
    order = np.argsort(_LEVELS - levels, kind="stable")
    return order[: int(np.count_nonzero(levels))]


def _parts(levels: NDArray[np.uint8], rows: int) -> Iterator[tuple[int, int]]:
    """Cut sorted columns into runs, (start, end), of one level each, unless that is fewer than make a piece."""
    least = -(-_VALUES // rows)
    start = 0
    while start < len(levels):
        of_level = int(np.count_nonzero(levels >= levels[start]))
        end = min(len(levels), max(start + least, min(of_level, start + _COLUMNS)))
        yield start, end
        start = end


def _groups(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Cut rows into groups, (first, last), of about equally many."""
    groups = min(_GROUPS, rows, max(1, rows * columns // _VALUES))
    edges = [rows * i // groups for i in range(groups + 1)]
    yield from pairwise(edges)


def _byte_count(values: int, alphabet: int) -> int:
    share = _SHARE[alphabet]
    return -(-values // share) if share else 2 * values


def _to_bytes(symbols: NDArray[np.int16], alphabet: int) -> bytes:
    most, share = _ALPHABETS[alphabet], _SHARE[alphabet]
    if not share:
        return byte_planes((symbols.astype(np.int32) + most).astype(np.uint16))
    digits = (symbols + np.int16(most)).astype(np.uint8)
    if share == 1:
        return digits.tobytes()
    if len(digits) % share:
        digits = np.concatenate((digits, np.full(-len(digits) % share, most, dtype=np.uint8)))
    digits = digits.reshape(-1, share)
    number = digits[:, 0].copy()
    for place in range(1, share):
        number *= np.uint8(2 * most + 1)
        number += digits[:, place]
    return number.tobytes()


def _from_bytes(data: bytes, values: int, alphabet: int) -> NDArray[np.int16]:
    """Undo `_to_bytes`. Bytes that it cannot have made give some symbols or other."""
    most, share = _ALPHABETS[alphabet], _SHARE[alphabet]
    if not share:
        return (from_byte_planes(data, values, 2).astype(np.int32) - most).astype(np.int16)
    return _DIGITS[alphabet][np.frombuffer(data, dtype=np.uint8)].reshape(-1)[:values]


def _digits(alphabet: int) -> NDArray[np.int16]:
    """The symbols that each byte stands for: (256, symbols a byte)."""
    most, share = _ALPHABETS[alphabet], _SHARE[alphabet]
    base = 2 * most + 1
    places = [np.arange(256) // base**place % base for place in reversed(range(share))]
    return (np.stack(places, axis=1) - most).astype(np.int16)


_DIGITS = {alphabet: _digits(alphabet) for alphabet, share in enumerate(_SHARE) if share}
