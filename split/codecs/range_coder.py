"""A range coder for matrices of symbols: the model is that of contexts.py, the coder that of constriction.

What is sent: a header, shapes of those classes for which they pay, the low bits of symbols that are too large for the
model, and the words of the range coder: first the sizes of the columns, then the symbols, by band and class.
"""

from __future__ import annotations

import struct
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from isthmus.split.codecs import contexts
from isthmus.split.codecs.packing import pack, packed_size, unpack
from isthmus.split.codecs.payload import Reader
from isthmus.split.errors import CodecError

_HEAD = struct.Struct(
    "<HBB3s9s"
)  # largest |symbol|, bits cut off below, which run of columns, two shapes' worth of bits
_RUNS = (1, 4, 16, 64, 256)  # of columns that share a level
_LEVEL_BITS = 3  # about what a level takes
_MODEL_BITS = 8  # symbols larger than this are cut


def encode(symbols: NDArray[np.int32]) -> bytes:
    """Encode symbols of 17 bits at most, (rows, width), at least one."""
    values = np.ascontiguousarray(symbols.T)
    size = np.abs(values)
    cut = max(0, int(size.max()).bit_length() - _MODEL_BITS)
    below = b""
    if cut:
        below = pack((values & ((1 << cut) - 1)).astype(np.uint16), cut)
        values >>= cut
        size = np.abs(values)
    largest = int(size.max())
    run, levels = _levels(size)
    order = _order(levels)
    values, size = values[order], size[order]

    bands = list(contexts.bands(len(order)))
    classes = np.empty(values.shape, dtype=np.uint8)
    rows = contexts.RowSizes(values.shape[1])
    for start, end in bands:
        at = levels[order[start:end]]
        classes[start:end] = rows.classes(at)
        rows.take(at, size[start:end])
    histogram = np.bincount(
        (classes.astype(np.int64) * (largest + 1) + size).ravel(), minlength=contexts.CLASSES * (largest + 1)
    ).reshape(contexts.CLASSES, largest + 1)
    shapes, fitted = _choose_shapes(histogram)

    encoder = constriction.stream.queue.RangeEncoder()
    steps = np.diff(levels[::run], prepend=np.uint8(0)).astype(np.int8).astype(np.int32)
    level_shape = contexts.fitted_shape(np.bincount(np.abs(steps), minlength=3))
    encoder.encode(steps + contexts.CLASSES, _model(level_shape, contexts.CLASSES))
    values += largest
    models: dict[int, Any] = {}
    for start, end in bands:
        by_class, counts = _by_class(classes[start:end])
        sorted_values = values[start:end].ravel()[by_class]
        done = 0
        for level in np.flatnonzero(counts).tolist():
            if level not in models:
                models[level] = _model(shapes[level], largest)
            encoder.encode(sorted_values[done : done + counts[level]], models[level])
            done += counts[level]
    head = _HEAD.pack(largest, cut, _RUNS.index(run), level_shape, _bitmap(fitted))
    words = encoder.get_compressed().astype("<u4").tobytes()
    return b"".join((head, *(shapes[level] for level in fitted), below, words))


def decode(reader: Reader, rows: int, width: int) -> NDArray[np.int32]:
    """(rows, width), at least one."""
    largest, cut, run_index, level_shape, bitmap = _HEAD.unpack(reader.take(_HEAD.size))
    if largest > 1 << _MODEL_BITS or cut > 9 or run_index >= len(_RUNS):
        raise CodecError("range-coded symbols whose header cannot be right")
    run = _RUNS[run_index]
    shapes = [contexts.default_shape(level) for level in range(contexts.CLASSES)]
    for level in _from_bitmap(bitmap):
        shapes[level] = reader.take(3)
    below = unpack(reader.take(packed_size(rows * width, cut)), rows * width, cut) if cut else None
    words = reader.rest()
    if len(words) % 4:
        raise CodecError("range-coded symbols that are no whole number of words")
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))
    values = np.zeros((width, rows), dtype=np.int32)
    try:
        steps = decoder.decode(_model(level_shape, contexts.CLASSES), -(-width // run)) - contexts.CLASSES
        runs = np.cumsum(steps)
        if runs.min() < 0 or runs.max() > contexts.CLASSES or (runs.any() and not largest):
            raise CodecError("range-coded symbols with column sizes that cannot be")
        levels = np.repeat(runs.astype(np.uint8), run)[:width]
        order = _order(levels)
        seen, models = contexts.RowSizes(rows), dict[int, Any]()
        for start, end in contexts.bands(len(order)):
            at = levels[order[start:end]]
            by_class, counts = _by_class(seen.classes(at))
            sorted_values = np.empty(len(by_class), dtype=np.int32)
            done = 0
            for level in np.flatnonzero(counts).tolist():
                if level not in models:
                    models[level] = _model(shapes[level], largest)
                sorted_values[done : done + counts[level]] = decoder.decode(models[level], int(counts[level]))
                done += int(counts[level])
            band = np.empty(len(by_class), dtype=np.int32)
            band[by_class] = sorted_values
            band = band.reshape(-1, rows) - largest
            seen.take(at, np.abs(band))
            values[order[start:end]] = band
    except AssertionError as error:  # constriction's word for bytes that no encoder made
        raise CodecError("range-coded symbols that no encoder made") from error
    if below is not None:
        values = (values << cut) + below.reshape(width, rows)
    return values.T


def _levels(size: NDArray[np.int32]) -> tuple[int, NDArray[np.uint8]]:
    """Find how many columns share a level, and the level of each column. size: (width, rows), |symbol|."""
    width, rows = size.shape
    sums = size.sum(1, dtype=np.int64)
    best: tuple[float, int, NDArray[np.uint8]] | None = None
    for run in _RUNS:
        starts = np.arange(0, width, run)
        lengths = np.minimum(run, width - starts)
        mean = np.add.reduceat(sums, starts) / (lengths * rows)
        bits = float((lengths * rows * np.log2(mean + 0.05)).sum()) + _LEVEL_BITS * len(starts)
        if best is None or bits < best[0]:
            best = bits, run, np.repeat(contexts.column_levels(mean), run)[:width]
    assert best is not None
    return best[1], best[2]


def _order(levels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The columns that are not all zero, the largest first."""
    order = np.argsort(contexts.CLASSES - levels, kind="stable")
    return order[: int(np.count_nonzero(levels))]


def _by_class(classes: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of a band's symbols, class after class, and how many each class has."""
    flat = classes.ravel()
    return np.argsort(flat, kind="stable"), np.bincount(flat, minlength=contexts.CLASSES)


def _choose_shapes(histogram: contexts.Ints) -> tuple[list[bytes], list[int]]:
    """A shape for each class, and the classes whose shape is worth sending."""
    shapes, fitted = [], []
    for level, counts in enumerate(histogram):
        shape = contexts.default_shape(level)
        if counts.any():
            own = contexts.fitted_shape(counts)
            if contexts.shape_bits(shape, counts) - contexts.shape_bits(own, counts) > 8 * len(own):
                shape = own
                fitted.append(level)
        shapes.append(shape)
    return shapes, fitted


def _model(shape: bytes, largest: int) -> Any:
    half = contexts.half_weights(shape, largest)
    return constriction.stream.model.Categorical(np.concatenate((half[:0:-1], half)), perfect=False)


def _bitmap(numbers: list[int]) -> bytes:
    return sum(1 << number for number in numbers).to_bytes(contexts.CLASSES // 8, "little")


def _from_bitmap(bitmap: bytes) -> list[int]:
    bits = int.from_bytes(bitmap, "little")
    return [number for number in range(contexts.CLASSES) if bits >> number & 1]
