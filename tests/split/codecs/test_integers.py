"""Signed integers with one scale a block: sizes, bounds, and no bias where none is claimed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.split.codecs import parse
from isthmus.split.errors import CodecError
from tests.examples import examples
from tests.split.codecs.every import INTEGERS, round_trip, scales, state, stated_bound, tensor


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("int8", (2, 64), 128 + 2 * 2),
        ("int4", (2, 64), 64 + 2 * 2),
        ("int3", (2, 64), 48 + 2 * 2),
        ("int2", (2, 64), 32 + 2 * 2),
        ("int4:block=16", (2, 64), 64 + 2 * 4 * 2),
        ("int4:row", (2, 640), 640 + 2 * 2),
        ("int4", (3, 65), 98 + 3 * 2 * 2),
        ("int4", (3, 1), 2 + 3 * 2),
        ("int3", (1, 7), 3 + 2),
    ],
)
def test_sizes(name: str, shape: tuple[int, ...], size: int) -> None:
    assert len(parse(name).encode(tensor(shape), state())) == size == parse(name).wire_bytes(shape)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("factor", [1e-45, 1e-40, 1e-38, 1e-8, 1e30, 3e37])
def test_the_bound_holds_at_the_ends_of_the_range_of_float32(name: str, factor: float) -> None:
    x = tensor((5, 100)).clamp(-4, 4) * factor
    bound = stated_bound(name, x)
    assert bound is not None
    assert ((round_trip(parse(name), x) - x).abs() <= bound).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_a_block_of_zeros_gives_zeros(name: str) -> None:
    x = tensor((4, 128))
    x[:2] = 0
    x[2, :64] = 0
    decoded = round_trip(parse(name), x)
    assert not decoded[:2].any()
    assert ":row" in name or not decoded[2, :64].any()


@pytest.mark.parametrize("name", INTEGERS)
def test_the_largest_value_of_a_block_is_not_clipped(name: str) -> None:
    x = tensor((8, 64), seed=2)
    decoded = round_trip(parse(name), x)
    place = x.abs().argmax(1, keepdim=True)
    largest, back = x.gather(1, place), decoded.gather(1, place)
    assert (back.abs() >= largest.abs() * (1 - 2**-7)).all() or "stochastic" in name
    assert (back * largest > 0).all()


@pytest.mark.parametrize("name", [name for name in INTEGERS if "stochastic" not in name])
def test_the_nearest_level_is_never_further_away_than_zero(name: str) -> None:
    x = tensor((20, 64), "heavy")
    assert ((round_trip(parse(name), x) - x).abs() <= x.abs() * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", [*(one for one in INTEGERS if "stochastic" in one), "hadamard,int4:stochastic"])
def test_stochastic_rounding_has_no_bias(name: str) -> None:
    codec, x, times, tensors = parse(name), tensor((3, 64), seed=4), 500, 6
    sender, receiver, many = state(), state(), x.expand(times, 3, 64)
    errors = torch.cat([codec.decode(codec.encode(many, sender), many.shape, receiver) - x for _ in range(tensors)])
    scale = scales(x, 64, 2 ** (int(name.split("int")[1][0]) - 1) - 1)
    seldom = 0.01 * scale**2  # a value near a level is seldom rounded to the other: its variance is not yet seen
    standard_error = (torch.maximum(errors.var(0), seldom) / len(errors)).sqrt()
    assert (errors.mean(0).abs() <= 5 * standard_error + 2**-16 * scale).all()
    assert abs(float(errors.mean(0).sum())) <= 4.5 * float(standard_error.square().sum().sqrt())


def test_nearest_rounding_has_a_bias_which_is_why_stochastic_exists() -> None:
    codec, x = parse("int2"), torch.tensor([[1.0, 0.3, 0.3, 0.3]])
    assert round_trip(codec, x).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_two_tensors_are_not_rounded_with_the_same_noise() -> None:
    codec, sender, x = parse("int2:stochastic"), state(), tensor((4, 64))
    assert codec.encode(x, sender) != codec.encode(x, sender)


def test_another_seed_gives_other_noise() -> None:
    codec, x = parse("int2:stochastic"), tensor((4, 64))
    assert codec.encode(x, state(1)) != codec.encode(x, state(2))


@settings(max_examples=examples(50), deadline=None, derandomize=True)
@given(step=st.integers(-7, 7), scale=st.integers(-30, 30))
def test_whole_multiples_of_the_scale_come_back_exactly(step: int, scale: int) -> None:
    x = torch.tensor([[7.0, float(step), 0.0, -7.0]]) * 2.0**scale
    for name in ("int4", "int4:stochastic"):
        assert torch.equal(round_trip(parse(name), x), x)


@pytest.mark.parametrize(
    "payload", [b"\x80\x7f\x88", b"\xc0\x7f\x88", b"\x80\xbf\x88", b"\x80\x3f\xff", b"\x7f\x7f\xee"]
)
def test_a_scale_or_symbol_that_cannot_be_is_refused(payload: bytes) -> None:
    with pytest.raises(CodecError):
        parse("int4").decode(payload, (1, 2), state())


def test_what_would_come_back_as_infinity_is_refused() -> None:
    with pytest.raises(CodecError, match="values above 3e38 cannot be coded by int4"):
        parse("int4").encode(torch.full((1, 4), torch.finfo(torch.float32).max), state())
