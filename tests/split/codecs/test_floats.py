"""Shorter floats: what they keep at the ends of the range, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from isthmus.split.codecs import parse
from isthmus.split.codecs.floats import power_of_two
from isthmus.split.errors import CodecError
from tests.examples import examples
from tests.split.codecs.every import FLOATS, round_trip, state, stated_bound, tensor

any_bits = arrays.arrays(np.uint32, arrays.array_shapes(min_dims=1, max_dims=3, max_side=9))
finite = arrays.arrays(np.float32, (3, 37), elements=st.floats(-(2.0**127), 2.0**127, width=32))


@pytest.mark.parametrize("name", ["none", "shuffle", "lossless"])
@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(bits=any_bits)
def test_exact_codecs_give_back_every_bit(name: str, bits: np.ndarray) -> None:
    x = torch.from_numpy(bits.view(np.float32))
    assert parse(name).exact
    assert torch.equal(round_trip(parse(name), x).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("name", FLOATS)
@settings(max_examples=examples(60), deadline=None, derandomize=True)
@given(values=finite)
def test_the_bound_holds_over_the_whole_range_of_float32(name: str, values: np.ndarray) -> None:
    x = torch.from_numpy(values)
    bound = stated_bound(name, x)
    assert bound is not None
    assert ((round_trip(parse(name), x) - x).abs() <= bound).all()


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("none", (3, 5), 60),
        ("shuffle", (3, 5), 60),
        ("float16", (3, 5), 31),
        ("bfloat16", (3, 5), 30),
        ("fp8", (3, 130), 3 * 130 + 3 * 3 * 2),
        ("fp8:block=16", (3, 130), 3 * 130 + 3 * 9 * 2),
        ("fp8", (3, 5), 15 + 3 * 2),
    ],
)
def test_sizes(name: str, shape: tuple[int, ...], size: int) -> None:
    assert len(parse(name).encode(tensor(shape), state())) == size == parse(name).wire_bytes(shape)


def test_float16_keeps_gradients_that_plain_float16_loses() -> None:
    x = tensor((4, 64)) * 1e-9
    assert not x.half().any()
    assert float((round_trip(parse("float16"), x) - x).norm() / x.norm()) < 2**-11


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-8, 1.0, 65504.0, 3.4e38])
def test_the_power_of_two_brings_the_largest_value_to_the_same_place(largest: float) -> None:
    shift = power_of_two(torch.tensor([[0.1 * largest, -largest]]))
    assert -113 <= shift <= 126
    if shift < 126:
        assert 2**14 <= largest * 2.0**shift < 2**15


def test_the_largest_float32_does_not_become_infinity_in_bfloat16() -> None:
    x = torch.tensor([[torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]])
    assert torch.isfinite(round_trip(parse("bfloat16"), x)).all()


def test_fp8_says_that_it_cannot_code_the_largest_float32() -> None:
    with pytest.raises(CodecError, match="values above 3e38 cannot be coded by fp8"):
        parse("fp8").encode(torch.full((1, 4), torch.finfo(torch.float32).max), state())


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("float16", b"\x00\x00\x7c"),
        ("float16", b"\x00\x01\x7e"),
        ("float16", b"\x8e\x00\x3c"),
        ("bfloat16", b"\x80\x7f"),
        ("bfloat16", b"\xc0\xff"),
        ("fp8", b"\x80\x3f\x7f"),
        ("fp8", b"\x80\x3f\xff"),
        ("fp8", b"\x80\x7f\x00"),
        ("fp8", b"\xc0\x7f\x00"),
        ("fp8", b"\x80\xbf\x01"),
        ("fp8", b"\x7f\x7f\x7e"),
    ],
)
def test_a_payload_that_stands_for_no_number_is_refused(name: str, payload: bytes) -> None:
    with pytest.raises(CodecError):
        parse(name).decode(payload, (1, 1), state())


def test_shuffled_bytes_and_zstd_save_what_signs_and_exponents_share() -> None:
    x = tensor((16, 256))
    assert len(parse("lossless").encode(x, state())) < 27.5 / 8 * x.numel()
    assert len(parse("bfloat16,zstd").encode(x, state())) < 11.5 / 8 * x.numel()
