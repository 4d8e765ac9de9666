"""The random rotation: it loses nothing, keeps lengths, and spreads what stands out."""

from __future__ import annotations

import pytest
import torch

from isthmus.split.codecs import parse
from isthmus.split.codecs.rotation import Hadamard
from tests.split.codecs.every import relative_error, round_trip, state, tensor

WIDTHS = [1, 7, 16, 48, 63, 64, 65, 100, 128, 256, 768, 896, 1024, 2048, 3072]


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_inverted_and_keeps_lengths(width: int) -> None:
    x, here = tensor((3, width)), state()
    side, y = Hadamard().forward(x, here)
    assert side == b""
    assert y.shape == (3, Hadamard().width(width))
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-5)
    back = Hadamard().inverse(y, width, here)
    assert back.shape == x.shape
    assert back.is_contiguous()
    assert relative_error(x, back) < 1e-6


@pytest.mark.parametrize(
    ("width", "coded"), [(1, 64), (7, 64), (8, 64), (16, 16), (48, 48), (65, 128), (100, 128), (768, 768)]
)
def test_widths_without_a_block_of_16_are_filled_up(width: int, coded: int) -> None:
    assert Hadamard().width(width) == coded


def test_every_value_of_a_block_spreads_evenly_over_it() -> None:
    for width in (64, 128, 256, 1024):
        x = torch.zeros(1, width)
        x[0, 5] = 3.0
        y = Hadamard().forward(x, state())[1]
        assert torch.allclose(y.abs(), torch.full_like(y, 3.0 / width**0.5))


def test_both_ends_turn_alike_and_other_seeds_otherwise() -> None:
    x = tensor((2, 64))
    assert torch.equal(Hadamard().forward(x, state(1))[1], Hadamard().forward(x, state(1))[1])
    assert not torch.equal(Hadamard().forward(x, state(1))[1], Hadamard().forward(x, state(2))[1])


def test_outliers_cost_less_after_it() -> None:
    x = tensor((64, 256))
    x[:, 3] *= 60
    plain, turned = (relative_error(x, round_trip(parse(name), x)) for name in ("int4:row", "hadamard,int4:row"))
    small = torch.ones(256, dtype=torch.bool)
    small[3] = False
    assert turned < plain * 2
    lost = round_trip(parse("int4:row"), x)[:, small]
    kept = round_trip(parse("hadamard,int4:row"), x)[:, small]
    assert relative_error(x[:, small], kept) < 0.9 * relative_error(x[:, small], lost)
