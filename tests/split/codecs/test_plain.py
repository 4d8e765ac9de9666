"""Packed bits: exact sizes, every width, and no value that was not written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from isthmus.split.codecs.packing import bits_for, byte_planes, from_byte_planes, pack, packed_size, unpack
from isthmus.split.codecs.plain import PLAIN
from isthmus.split.errors import CodecError


@pytest.mark.parametrize("bits", range(1, 33))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 200])
def test_numbers_of_any_width_come_back_and_take_their_bits(bits: int, count: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, count).astype(np.uint32)
    data = pack(values, bits)
    assert len(data) == math.ceil(count * bits / 8) == packed_size(count, bits)
    assert (unpack(data, count, bits) == values).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_first_value_lies_in_the_lowest_bits(bits: int) -> None:
    count = 8 // bits
    values = np.arange(count, dtype=np.uint8) & np.uint8(2**bits - 1)
    assert pack(values, bits) == bytes([sum(int(value) << bits * place for place, value in enumerate(values))])


def test_a_wrong_length_is_refused() -> None:
    with pytest.raises(CodecError, match="2 bytes; 8 values of 3 bits take 3"):
        unpack(b"ab", 8, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_byte_planes_come_back(dtype: type[np.uint16] | type[np.uint32]) -> None:
    values = np.arange(0, 60_000, 997, dtype=dtype)
    data = byte_planes(values)
    assert data[: len(values)] == bytes(int(value) & 255 for value in values)
    assert (from_byte_planes(data, len(values), values.itemsize) == values).all()


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-1, 1),
        (-7, 7),
        (0, 1),
        (0, 0),
        (3, 3),
        (-127, 127),
        (-128, 127),
        (0, 4),
        (-500, 37),
        (-32768, 32767),
        (5, 32767),
    ],
)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 64)])
def test_symbols_come_back_and_take_the_bits_that_tell_them_apart(low: int, high: int, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    symbols = torch.randint(low, high + 1, (rows, width), generator=generator).to(torch.int16)
    symbols[0, 0], symbols[-1, -1] = low, high
    data = PLAIN.pack(symbols, low, high)
    bits = max(1, math.ceil(math.log2(high - low + 1)))
    assert len(data) == math.ceil(rows * width * bits / 8) == PLAIN.packed_bytes(rows, width, low, high)
    back = PLAIN.unpack(data, rows, width, low, high)
    assert back.dtype == torch.int16
    assert torch.equal(back, symbols)


def test_a_symbol_beyond_the_highest_is_refused() -> None:
    assert PLAIN.unpack(b"\xee", 1, 2, -7, 7).tolist() == [[7, 7]]
    with pytest.raises(CodecError, match="symbols above 7"):
        PLAIN.unpack(b"\xef", 1, 2, -7, 7)


def test_bytes_stay_as_they_are_and_have_the_right_number() -> None:
    assert PLAIN.expand(PLAIN.squeeze(b"abc"), 3) == b"abc"
    assert PLAIN.squeezed_bytes(3) == 3
    with pytest.raises(CodecError, match="3 bytes in a payload where 4 have to be"):
        PLAIN.expand(b"abc", 4)


@pytest.mark.parametrize(("values", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (65536, 16)])
def test_how_many_bits_tell_values_apart(values: int, bits: int) -> None:
    assert bits_for(values) == bits
