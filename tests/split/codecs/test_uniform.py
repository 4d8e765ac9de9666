"""Quantiser `uniform`: its error is bounded whatever comes, and no payload does harm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.split.codecs.base import Codec, Entropy
from isthmus.split.codecs.entropy import Range, Zstd
from isthmus.split.codecs.plain import PLAIN
from isthmus.split.codecs.state import CodecState
from isthmus.split.codecs.uniform import Uniform
from isthmus.split.errors import CodecError
from tests.examples import examples

ENTROPIES: list[Entropy] = [PLAIN, Zstd(), Range()]


def codec(quantiser: Uniform, entropy: Entropy = PLAIN) -> Codec:
    return Codec(f"{quantiser.name},{entropy.name}", quantiser, entropy)


def through(x: Tensor, quantiser: Uniform, entropy: Entropy = PLAIN) -> tuple[Tensor, int]:
    """What comes out, and how many bytes it took."""
    one = codec(quantiser, entropy)
    payload = one.encode(x, CodecState(0))
    assert len(payload) <= one.wire_bytes(x.shape)
    return one.decode(payload, x.shape, CodecState(0)), len(payload)


def bound(x: Tensor, quantiser: Uniform) -> Tensor:
    square = x.double().square()
    rms = square.mean(1, keepdim=True).sqrt() if quantiser.per == "row" else square.mean().sqrt()
    return (0.5 + quantiser.deadzone) * quantiser.step * rms * (1 + 1e-5) + 2.0**-100


@pytest.mark.parametrize("entropy", ENTROPIES, ids=lambda entropy: entropy.name)
@settings(max_examples=examples(60), deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 3, 40]),
    width=st.sampled_from([1, 5, 64, 256]),
    step=st.sampled_from([0.001, 0.02, 0.13, 0.5, 1.0, 16.0]),
    per=st.sampled_from(["row", "tensor"]),
    deadzone=st.sampled_from([0.0, 0.2, 0.45]),
    size=st.sampled_from([1e-25, 1e-8, 1.0, 1e25]),
    outliers=st.integers(0, 3),
    seed=st.integers(0, 2**20),
)
def test_the_error_is_at_most_half_a_step(
    entropy: Entropy,
    rows: int,
    width: int,
    step: float,
    per: str,
    deadzone: float,
    size: float,
    outliers: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.randn(rows, 1, generator=generator).exp() * size
    x[torch.rand(rows, generator=generator) < 0.3] = 0
    for place in torch.randint(x.numel(), (outliers,), generator=generator):
        x.view(-1)[place] = 1e6 * size
    quantiser = Uniform(step, per, deadzone)  # type: ignore[arg-type]
    decoded, _ = through(x, quantiser, entropy)
    assert decoded.dtype == torch.float32
    assert ((decoded.double() - x.double()).abs() <= bound(x, quantiser)).all()


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_an_outlier_comes_back_itself_and_spoils_only_what_shares_its_step(per: str) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    x[5, 7] = 1e6
    decoded, _ = through(x, Uniform(per=per))  # type: ignore[arg-type]
    assert decoded[5, 7] == 1e6
    if per == "row":
        rest = torch.arange(64) != 5
        assert (decoded - x)[rest].abs().max() < 0.13 * 1.2 / 2


@pytest.mark.parametrize("entropy", ENTROPIES, ids=lambda entropy: entropy.name)
def test_rows_of_zeros_take_a_bit_each(entropy: Entropy) -> None:
    x = torch.zeros(1000, 256)
    nothing, few = through(x, Uniform(), entropy)
    assert torch.equal(nothing, x)
    assert few < 10
    x[17] = torch.randn(256, generator=torch.Generator().manual_seed(2))
    decoded, more = through(x, Uniform(), entropy)
    assert torch.equal(decoded[18:], x[18:])
    assert more < 125 + 256 + 64


def test_gradients_too_small_for_float16_keep_their_precision() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    ordinary, _ = through(x, Uniform(0.25))
    for exponent in (-80, -40, 40, 80):
        scaled, _ = through(x * 2.0**exponent, Uniform(0.25))
        assert torch.equal(scaled, ordinary * 2.0**exponent)


def test_values_near_the_largest_float_come_back_or_are_refused() -> None:
    x = torch.full((4, 8), torch.finfo(torch.float32).max)
    decoded, _ = through(x, Uniform(0.3))
    assert torch.isfinite(decoded).all()
    assert ((decoded.double() - x.double()).abs() <= bound(x, Uniform(0.3))).all()
    with pytest.raises(CodecError, match="diverged"):
        through(x, Uniform(2.0))


def test_a_deadzone_loses_less_for_as_many_bits() -> None:
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(400, 256, generator=torch.Generator().manual_seed(4)))
    x = x.clamp(-20, 20)
    plain, plain_size = through(x, Uniform(1.0), Range())
    dead, dead_size = through(x, Uniform(0.9, deadzone=0.1), Range())
    assert dead_size < 1.01 * plain_size
    assert (dead - x).square().mean() < 0.93 * (plain - x).square().mean()


def mixed(seed: int) -> Tensor:
    """(40, 64): some rows and columns loud, some quiet, some zero, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 64, generator=generator) * torch.logspace(0, -3, 64) * torch.logspace(0.5, -2, 40).unsqueeze(1)
    x[7] = 0
    return x


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_stochastic_rounding_has_the_value_as_its_mean_and_an_error_below_a_step(per: str) -> None:
    x, quantiser = mixed(0), Uniform(0.7, per, stochastic=True)
    one, encoder, decoder = codec(quantiser), CodecState(3), CodecState(3)
    draws = torch.stack([one.decode(one.encode(x, encoder), x.shape, decoder) for _ in range(1500)])
    step = 2 * bound(x, quantiser)
    assert ((draws - x).abs() <= step).all()
    off = (draws.mean(0) - x) / (step / 2 / 1500**0.5)  # in standard errors, or less
    assert off.abs().max() < 5
    assert abs(float(off.sum())) < 5 * off.numel() ** 0.5
    quiet = (x.abs() < step / 50) & (x != 0)  # what rounding to the nearest would always lose
    assert quiet.sum() > 500
    assert float(draws.mean(0)[quiet].abs().sum()) == pytest.approx(float(x[quiet].abs().sum()), rel=0.5)
    assert (draws[:, 7] == 0).all()


def test_dither_that_is_taken_off_again_halves_the_error_where_values_are_loud() -> None:
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    decoded, _ = through(x, Uniform(0.5, "tensor", stochastic=True), Range())
    assert float((decoded - x).square().mean()) == pytest.approx(0.5**2 / 12, rel=0.05)
    quiet = 0.01 * x  # beside one loud row: the chances of rounding up are small, and so is the error
    quiet[0] = 10
    decoded, _ = through(quiet, Uniform(0.5, "tensor", stochastic=True), Range())
    delta = 0.5 * float(quiet.square().mean().sqrt())
    assert float((decoded - quiet)[1:].square().mean()) < delta**2 / 40


def test_both_ends_need_no_more_than_the_payload_to_agree_on_the_dither() -> None:
    x, one = mixed(2), codec(Uniform(0.5, "tensor", stochastic=True), Range())
    payload = one.encode(x, CodecState(5))
    assert torch.equal(one.decode(payload, x.shape, CodecState(5)), one.decode(payload, x.shape, CodecState(99)))


@pytest.mark.parametrize(
    "quantiser",
    [Uniform(), Uniform(0.5, "tensor"), Uniform(0.3, deadzone=0.2), Uniform(0.5, "tensor", stochastic=True)],
    ids=repr,
)
@pytest.mark.parametrize("entropy", ENTROPIES, ids=lambda entropy: entropy.name)
def test_damaged_payloads_give_finite_tensors_or_an_error(quantiser: Uniform, entropy: Entropy) -> None:
    draw = np.random.default_rng(5)
    x = torch.randn(20, 48, generator=torch.Generator().manual_seed(6))
    x[3:6] = 0
    x[0, 0] = 1e5
    one = codec(quantiser, entropy)
    payload = one.encode(x, CodecState(0))
    for i in range(200):
        changed = bytearray(payload)
        if i % 3 == 0:
            changed = changed[: draw.integers(len(changed))]
        for _ in range(i % 4):
            if changed:
                changed[draw.integers(min(len(changed), 60 if i % 2 else len(changed)))] = draw.integers(256)
        try:
            decoded = one.decode(bytes(changed), x.shape, CodecState(0))
        except CodecError:
            continue
        assert decoded.shape == x.shape
        assert torch.isfinite(decoded).all()


def test_names_have_only_what_is_not_the_default() -> None:
    assert Uniform().name == "uniform"
    assert Uniform(0.5, "tensor", 0.1).name == "uniform:step=0.5:per=tensor:deadzone=0.1"
    assert Uniform(0.123456789).name == "uniform:step=0.123456789"


@pytest.mark.parametrize(
    "wrong", [{"step": 0.0}, {"step": float("nan")}, {"step": 17.0}, {"per": "column"}, {"deadzone": 0.5}], ids=repr
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(CodecError, match="choose"):
        Uniform(**wrong)  # type: ignore[arg-type]


def test_equal_tensors_give_equal_bytes() -> None:
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(7))
    for entropy, per in itertools.product(ENTROPIES, ("row", "tensor")):
        one = codec(Uniform(per=per), entropy)  # type: ignore[arg-type]
        assert one.encode(x, CodecState(0)) == one.encode(x.clone(), CodecState(0))
