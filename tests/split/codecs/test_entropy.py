"""The entropy coders: every symbol comes back, sizes are kept to, and no bytes do harm."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.split.codecs.base import Entropy
from isthmus.split.codecs.entropy import Range, Zstd
from isthmus.split.codecs.plain import PLAIN
from isthmus.split.errors import CodecError
from tests.examples import examples

CODERS: list[Entropy] = [Range(), Zstd(), Zstd(level=9)]
ALL = pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
LIMITS = [(-127, 127), (-1, 1), (-7, 7), (0, 15), (0, 1), (-300, 20), (-32768, 32767), (0, 32767), (5, 9), (-9, -4)]


def random_symbols(rows: int, width: int, low: int, high: int, seed: int, kind: str) -> Tensor:
    """Of very different rows and columns (`mixed`), or as the kind says."""
    draw = np.random.default_rng(seed)
    middle = min(max(0, low), high) if low <= 0 <= high else (low + high) // 2
    if kind == "even":
        values = draw.integers(low, high + 1, (rows, width))
    elif kind == "constant":
        values = np.full((rows, width), draw.integers(low, high + 1))
    else:
        scale = np.exp(draw.normal(0, 2, width)) * np.exp(draw.normal(0, 1, (rows, 1)))
        values = np.rint(draw.laplace(0, 1, (rows, width)) * scale).clip(-40000, 40000) + middle
        if kind == "sparse":
            values = np.where(draw.random((rows, width)) < 0.98, middle, values)
        if kind == "outlier":
            values[draw.integers(rows), draw.integers(width)] = high if draw.random() < 0.5 else low
    return torch.from_numpy(values.clip(low, high).astype(np.int16))


@ALL
@settings(max_examples=examples(80), deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 7, 64, 300]),
    width=st.sampled_from([1, 3, 16, 65, 256]),
    limits=st.sampled_from(LIMITS),
    kind=st.sampled_from(["mixed", "even", "constant", "sparse", "outlier"]),
    seed=st.integers(0, 2**20),
)
def test_symbols_come_back_within_the_stated_size(
    coder: Entropy, rows: int, width: int, limits: tuple[int, int], kind: str, seed: int
) -> None:
    symbols = random_symbols(rows, width, *limits, seed, kind)
    payload = coder.pack(symbols, *limits)
    assert len(payload) <= coder.packed_bytes(rows, width, *limits)
    decoded = coder.unpack(payload, rows, width, *limits)
    assert decoded.dtype == torch.int16
    assert torch.equal(decoded, symbols)
    assert coder.pack(symbols.t().contiguous().t(), *limits) == payload


@ALL
def test_the_stated_size_is_three_bytes_more_than_plain_bits(coder: Entropy) -> None:
    assert coder.packed_bytes(100, 64, -7, 7) == PLAIN.packed_bytes(100, 64, -7, 7) + 3
    even = random_symbols(100, 64, -7, 8, 0, "even")
    assert len(coder.pack(even, -7, 8)) == coder.packed_bytes(100, 64, -7, 8)


@ALL
def test_no_symbols_take_no_bytes(coder: Entropy) -> None:
    for rows, width in ((0, 5), (5, 0)):
        assert coder.packed_bytes(rows, width, -7, 7) == 0
        payload = coder.pack(torch.empty(rows, width, dtype=torch.int16), -7, 7)
        assert payload == b""
        assert coder.unpack(payload, rows, width, -7, 7).shape == (rows, width)
        with pytest.raises(CodecError):
            coder.unpack(b"x", rows, width, -7, 7)


@ALL
def test_zeros_take_next_to_nothing(coder: Entropy) -> None:
    symbols = torch.zeros(512, 256, dtype=torch.int16)
    assert len(coder.pack(symbols, -127, 127)) < 64


def entropy_a_column(symbols: Tensor) -> float:
    """Bits a symbol if each column had its own best code, without what its tables take."""
    bits = 0.0
    for column in symbols.T:
        _, counts = column.unique(return_counts=True)
        share = counts / counts.sum()
        bits -= float((counts * share.log2()).sum())
    return bits / symbols.numel()


def test_range_comes_below_the_entropy_of_columns_where_rows_differ() -> None:
    """And zstd comes within 15 % of range."""
    draw = np.random.default_rng(3)
    scale = 12 * 0.98 ** np.arange(256) * np.exp(draw.normal(0, 0.7, (1024, 1)))
    symbols = torch.from_numpy(np.rint(draw.laplace(0, scale)).clip(-127, 127).astype(np.int16))
    by_range = len(Range().pack(symbols, -127, 127)) * 8 / symbols.numel()
    by_zstd = len(Zstd().pack(symbols, -127, 127)) * 8 / symbols.numel()
    assert by_range < 0.97 * entropy_a_column(symbols)
    assert by_zstd < 1.15 * by_range


def test_range_is_within_two_percent_of_the_entropy_of_even_rows() -> None:
    draw = np.random.default_rng(4)
    scale = 8 * 0.985 ** np.arange(256)
    values = np.rint(draw.laplace(0, np.broadcast_to(scale, (1024, 256)))).clip(-127, 127)
    symbols = torch.from_numpy(values.astype(np.int16))
    assert len(Range().pack(symbols, -127, 127)) * 8 / symbols.numel() < 1.02 * entropy_a_column(symbols)


def damaged(payload: bytes, draw: np.random.Generator) -> bytes:
    kind = draw.integers(4)
    if kind == 0:
        return payload[: draw.integers(len(payload))]
    if kind == 1:
        return payload + draw.bytes(int(draw.integers(1, 9)))
    bits = bytearray(payload)
    for _ in range(int(draw.integers(1, 4))):
        at = int(draw.integers(min(len(bits), 200) if kind == 2 else len(bits)))
        bits[at] ^= 1 << int(draw.integers(8))
    return bytes(bits)


@ALL
@pytest.mark.parametrize("limits", [(-127, 127), (-32768, 32767), (0, 15)])
def test_damaged_bytes_give_symbols_or_an_error(coder: Entropy, limits: tuple[int, int]) -> None:
    draw = np.random.default_rng(5)
    rows, width = 60, 40
    payload = coder.pack(random_symbols(rows, width, *limits, 6, "mixed"), *limits)
    refused = 0
    for _ in range(250):
        try:
            decoded = coder.unpack(damaged(payload, draw), rows, width, *limits)
        except CodecError:
            refused += 1
            continue
        assert decoded.shape == (rows, width)
        assert limits[0] <= decoded.min()
        assert decoded.max() <= limits[1]
    assert refused > 20


@ALL
def test_arbitrary_bytes_give_symbols_or_an_error(coder: Entropy) -> None:
    draw = np.random.default_rng(7)
    for i in range(300):
        payload = bytes([i % 3]) + draw.bytes(int(draw.integers(200)))
        try:
            decoded = coder.unpack(payload, 9, 33, -7, 7)
        except CodecError:
            continue
        assert decoded.abs().max() <= 7


def test_zstd_brings_bytes_back_within_the_stated_size() -> None:
    draw = np.random.default_rng(8)
    coder = Zstd()
    for size in (0, 1, 255, 256, 5000, 131073, 700_000):
        for data in (draw.bytes(size), bytes(size), b"split" * (size // 5) + bytes(size % 5)):
            payload = coder.squeeze(data)
            assert len(payload) <= coder.squeezed_bytes(size)
            assert coder.expand(payload, size) == data
            with pytest.raises(CodecError):
                coder.expand(payload, size + 1)


def test_a_frame_that_would_be_large_takes_no_memory() -> None:
    bomb = Zstd(level=19).squeeze(bytes(200_000_000))
    assert len(bomb) < 50_000
    tracemalloc.start()
    with pytest.raises(CodecError):
        Zstd().expand(bomb, 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_damaged_frames_give_the_size_or_an_error() -> None:
    draw = np.random.default_rng(9)
    frame = Zstd().squeeze(b"narrow links " * 100)
    for _ in range(500):
        try:
            data = Zstd().expand(damaged(frame, draw), 1300)
        except CodecError:
            continue
        assert len(data) == 1300


def test_range_codes_no_bytes() -> None:
    assert not Range.codes_bytes
    for call in (lambda: Range().squeeze(b""), lambda: Range().expand(b"", 0), lambda: Range().squeezed_bytes(1)):
        with pytest.raises(CodecError, match="zstd"):
            call()


def test_names_and_levels() -> None:
    assert [coder.name for coder in CODERS] == ["range", "zstd", "zstd:level=9"]
    with pytest.raises(CodecError, match="1 to 19"):
        Zstd(level=20)
