"""How large each symbol of a matrix will probably be, said by what both ends know: the model of the `Range` coder.

Columns have sizes that are sent (mean |symbol| in quarters of an octave, shared by a run of columns where single ones
do not pay). Rows have sizes that are not sent: the columns are coded in bands, largest first, and how large a row was
in the bands before, against what its columns let expect, says how large it will be in the next. A symbol's class is the
sum of the two logarithms; each class has a distribution of |symbol| of its own. Everything that a decoder has to repeat
is in integers, or in float64 operations that IEEE 754 fixes to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

CLASSES = 72  # quarters of an octave of mean |symbol|, from 2 ** -9 up
_OFFSET = 36
_UNIT = 1 << 16
_SIZES = np.array([max(1, round(_UNIT * 2 ** ((c - _OFFSET) / 4))) for c in range(CLASSES)], dtype=np.int64)
_RATIO_LEVELS = 16  # a row can be 2 ** -4 to 2 ** 4 times what its columns say
_RATIOS = np.array([round(_UNIT * 2 ** ((k + 0.5) / 4)) for k in range(-_RATIO_LEVELS, _RATIO_LEVELS)], dtype=np.int64)
_CHANCES = np.array([round(_UNIT / (1 + math.exp((128 - k) / 16))) for k in range(256)]) / _UNIT
_EDGES = (_CHANCES[1:] + _CHANCES[:-1]) / 2


def column_levels(mean: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The level of each column, from its mean |symbol|: 0 for a column of zeros, else 1 + the class of that size."""
    level = np.rint(4 * np.log2(np.maximum(mean, 2.0**-20))) + _OFFSET
    return np.where(mean > 0, np.clip(level, 0, CLASSES - 1) + 1, 0).astype(np.uint8)


def bands(width: int) -> Iterator[tuple[int, int]]:
    """Cut the columns into about 18 bands, (start, end): narrow ones first, as nothing is known of the rows then."""
    start, most = 0, max(4, width // 16)
    while start < width:
        end = min(width, start + min(max(4, start), most))
        yield start, end
        start = end


class RowSizes:
    """How large each row was in the bands so far, where the last bands count most."""

    def __init__(self, rows: int) -> None:
        self._seen, self._expected = np.zeros(rows, dtype=np.int64), 0

    def classes(self, levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The class of each symbol of the next band: (columns, rows). levels: (columns,) of the band, none 0."""
        own = levels.astype(np.int16) - 1
        if not self._expected:
            return np.broadcast_to(own[:, None], (len(own), len(self._seen))).astype(np.uint8)
        ratio = (self._seen << 32) // self._expected  # in units of 1 / _UNIT, as the sizes are
        row = np.searchsorted(_RATIOS, ratio, side="right").astype(np.int16) - _RATIO_LEVELS
        classes: NDArray[np.uint8] = np.clip(own[:, None] + row, 0, CLASSES - 1).astype(np.uint8)
        return classes

    def take(self, levels: NDArray[np.uint8], size: NDArray[np.int16]) -> None:
        """Take in a band. size: (columns, rows), its |symbol|."""
        self._seen = self._seen // 2 + size.sum(0, dtype=np.int64) * 8
        self._expected = self._expected // 2 + int(_SIZES[levels.astype(np.int64) - 1].sum()) * 8


def default_shape(level: int) -> bytes:
    """The shape of a class of symbols as if these were rounded values of a Laplace distribution."""
    mean = _SIZES[level] / _UNIT
    root = (math.sqrt(1 + 4 * mean * mean) - 1) / (
        2 * mean
    )  # of the chance that a symbol that is not small is larger yet
    return _shape(1 - root, 1 - root * root, 1 - root * root)


def fitted_shape(histogram: Ints) -> bytes:
    """The shape that fits a histogram of |symbol|, from 0."""
    total, ones_up = int(histogram.sum()), int(histogram[1:].sum())
    twos_up, beyond = int(histogram[2:].sum()), int((histogram[2:] * np.arange(len(histogram) - 2)).sum())
    return _shape(histogram[0] / max(1, total), 1 - twos_up / max(1, ones_up), twos_up / max(1, twos_up + beyond))


def shape_bits(shape: bytes, histogram: Ints) -> float:
    """Bits that symbols of this histogram take, signs included."""
    weights = half_weights(shape, len(histogram) - 1)
    chance = np.maximum(weights, 1.0) / (weights[0] + 2 * weights[1:].sum())
    return float(-(histogram * np.log2(chance)).sum())


def half_weights(shape: bytes, largest: int) -> NDArray[np.float64]:
    """Weights of the symbols 0, 1, ..., (largest + 1,); -1, ... have the same.

    They are whole numbers in proportion to the chances. shape: the chances of 0, of 1 among what is larger, of k among
    what is at least k >= 2; in 256 steps of the logit.
    """
    zero, one, stop = _CHANCES[list(shape)]
    weights = np.full(largest + 1, 1 - stop)
    weights[0] = zero
    weights[1:2] = (1 - zero) * one / 2
    weights[2:3] = (1 - zero) * (1 - one) * stop / 2
    weights[2:] = np.multiply.accumulate(weights[2:])
    return np.floor(weights * 2.0**36) + 1


def _shape(*chances: float) -> bytes:
    return bytes(np.searchsorted(_EDGES, chances).astype(np.uint8))
