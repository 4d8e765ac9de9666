"""What every codec promises: shapes, sizes, determinism, and that no bytes can do harm."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.split.codecs import CodecState, parse
from isthmus.split.codecs.entropy import Zstd
from isthmus.split.codecs.plain import Plain
from isthmus.split.errors import CodecError
from tests.examples import examples
from tests.split.codecs.every import (
    EMPTY,
    EVERY,
    OFTEN,
    QUANTISERS,
    SHAPES,
    decoded_or_refused,
    round_trip,
    state,
    stated_bound,
    tensor,
    tensors,
)

few = settings(max_examples=examples(10), deadline=None, derandomize=True)
every = pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.exhaustive) for name in EVERY]
)
SMALL = (3, 40)


@every
@few
@given(x=tensors())
def test_a_tensor_comes_back_in_its_shape_and_takes_no_more_than_was_said(name: str, x: torch.Tensor) -> None:
    codec, sender, receiver = parse(name), state(), state()
    for _ in range(2):
        payload = codec.encode(x, sender)
        decoded = codec.decode(payload, x.shape, receiver)
        assert decoded.shape == x.shape
        assert decoded.dtype == torch.float32
        assert torch.isfinite(decoded).all()
        most = codec.wire_bytes(x.shape)
        assert len(payload) <= most
        if isinstance(codec.entropy, Plain) and "klt" not in name and "uniform" not in name:
            assert len(payload) == most
        x = x * 0.9


@pytest.mark.parametrize("name", [name for name in QUANTISERS if stated_bound(name, torch.ones(1)) is not None])
@settings(max_examples=examples(60), deadline=None, derandomize=True)
@given(x=tensors())
def test_the_error_is_within_the_stated_bound(name: str, x: torch.Tensor) -> None:
    bound = stated_bound(name, x)
    assert bound is not None
    for coder in ("", ",zstd") if name != "none" else ("",):
        error = (x - round_trip(parse(name + coder), x)).abs().reshape(bound.shape)
        assert (error <= bound).all(), float((error - bound).max())


@every
def test_equal_seeds_and_tensors_give_equal_bytes_and_a_tensor_is_not_changed(name: str) -> None:
    codec, one, other = parse(name), state(), state()
    for seed in range(3):
        x = tensor((6, 100), "normal", seed)
        before = x.clone()
        assert codec.encode(x, one) == codec.encode(x.clone(), other)
        assert torch.equal(x, before)


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_or_come_back(name: str, value: float) -> None:
    codec = parse(name)
    x = tensor((4, 20))
    x[2, 3] = value
    if codec.exact:
        assert torch.equal(round_trip(codec, x).view(torch.int32), x.view(torch.int32))
    else:
        with pytest.raises(CodecError, match="NaN or infinity cannot be coded"):
            codec.encode(x, state())


@every
def test_integers_are_refused(name: str) -> None:
    with pytest.raises(CodecError, match="takes floats"):
        parse(name).encode(torch.zeros(2, 3, dtype=torch.int32), state())


@every
@pytest.mark.parametrize("shape", EMPTY)
def test_no_values_take_no_bytes(name: str, shape: tuple[int, ...]) -> None:
    codec = parse(name)
    assert codec.encode(torch.zeros(shape), state()) == b""
    assert codec.wire_bytes(shape) == 0
    assert codec.decode(b"", shape, state()).shape == shape
    with pytest.raises(CodecError):
        codec.decode(b"x", shape, state())


@every
def test_layout_and_float_type_of_the_input_do_not_matter(name: str) -> None:
    codec = parse(name)
    wide = tensor((30, 24)).half()
    x = wide.float()
    assert codec.encode(x.t(), state()) == codec.encode(x.t().contiguous(), state())
    assert codec.encode(x[::2, 1::3], state()) == codec.encode(x[::2, 1::3].clone(), state())
    assert codec.encode(wide, state()) == codec.encode(wide.double(), state()) == codec.encode(x, state())
    short = x.bfloat16()
    assert codec.encode(short, state()) == codec.encode(short.float(), state())
    learnt = x.clone().requires_grad_()
    assert codec.encode(learnt, state()) == codec.encode(x, state())


@every
@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(size=st.none() | st.integers(0, 700), seed=st.integers(0, 2**20), zeros=st.floats(0, 1))
def test_any_bytes_give_a_tensor_or_are_refused(name: str, size: int | None, seed: int, zeros: float) -> None:
    codec, chance = parse(name), random.Random(seed)
    size = codec.wire_bytes(SMALL) if size is None else size
    payload = bytes(0 if chance.random() < zeros else chance.randrange(256) for _ in range(size))
    decoded_or_refused(codec, payload, SMALL)


@every
def test_a_payload_that_was_damaged_gives_a_tensor_or_is_refused(name: str) -> None:
    codec, chance = parse(name), random.Random(5)
    payload = codec.encode(tensor(SMALL), state())
    for size in {0, 1, 2, 3, 4, 5, 8, len(payload) // 2, len(payload) - 1}:
        decoded = decoded_or_refused(codec, payload[:size], SMALL)
        if isinstance(codec.entropy, Plain):
            assert decoded is None
    with pytest.raises(CodecError):
        codec.decode(payload + bytes(codec.wire_bytes(SMALL) - len(payload) + 1), SMALL, state())
    for _ in range(30):
        damaged = bytearray(payload)
        for _ in range(chance.choice((1, 1, 1, 8))):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        decoded_or_refused(codec, bytes(damaged), SMALL)


@every
def test_decoding_takes_a_small_multiple_of_the_tensor(name: str) -> None:
    """Of what numpy and Python take, which is where payloads are read: valid ones, damaged ones and random ones."""
    codec, shape, chance = parse(name), (32, 128), random.Random(7)
    payload = codec.encode(tensor(shape), state())
    damaged = bytearray(payload)
    for place in (*range(12), *(chance.randrange(len(payload)) for _ in range(4))):
        damaged[place] ^= 1 << chance.randrange(8)
    for tried in (payload, bytes(damaged), chance.randbytes(codec.wire_bytes(shape)), b"\xff" * len(payload)):
        receiver = state()
        tracemalloc.start()
        try:
            decoded_or_refused(codec, tried, shape)
            codec.decode(payload, shape, receiver)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 12 * 4 * 32 * 128 + 500_000


@pytest.mark.parametrize(
    ("name", "start", "has_length"),
    [
        ("shuffle,zstd", 0, True),
        ("float16,zstd", 1, True),
        ("bfloat16,zstd", 0, True),
        ("topk:0.5,zstd", 0, True),
        ("fp8,zstd", 64 * 4 * 2, False),
    ],
)
def test_a_small_payload_that_would_swell_is_refused_before_it_does(name: str, start: int, has_length: bool) -> None:
    codec, shape, bomb = parse(name), (64, 256), Zstd().squeeze(bytes(20_000_000))
    length = len(bomb).to_bytes(4, "little") if has_length else b""
    payload = bytes(start) + length + bomb
    assert len(payload) < codec.wire_bytes(shape)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="20000000"):
            codec.decode(payload, shape, state())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@every
def test_gradients_of_1e_8_survive(name: str) -> None:
    codec = parse(name)
    x = tensor((16, 64), seed=3)
    error = (x - round_trip(codec, x)).norm() / x.norm()
    tiny = (x * 1e-8 - round_trip(codec, x * 1e-8)).norm() / (x * 1e-8).norm()
    assert float(tiny) == pytest.approx(float(error), rel=0.02, abs=1e-4)


@every
def test_what_comes_after_a_refused_payload_is_decoded(name: str) -> None:
    codec, sender, receiver = parse(name), state(), state()
    payload = codec.encode(tensor(SMALL), sender)
    with pytest.raises(CodecError):
        codec.decode(payload + bytes(codec.wire_bytes(SMALL)), SMALL, receiver)
    assert torch.equal(codec.decode(payload, SMALL, receiver), codec.decode(payload, SMALL, state()))


def test_the_parts_keep_what_they_say_they_keep() -> None:
    for name in EVERY:
        sender = state()
        parse(name).encode(tensor((4, 100)), sender)
        assert sender.count == 1
        assert (sender.memory_bytes > 0) == any(part in name for part in ("ef", "delta", "klt", "powersgd"))


def test_the_estimate_follows_what_was_sent() -> None:
    codec, sender = parse("int4,zstd"), state()
    assert codec.estimate((8, 64), sender) == codec.wire_bytes((8, 64))
    payload = codec.encode(torch.zeros(8, 64), sender)
    assert codec.estimate((8, 64), sender) == pytest.approx(len(payload))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every
def test_tensors_on_a_gpu_are_coded(name: str) -> None:
    codec = parse(name)
    for shape in SHAPES:
        x = tensor(shape).cuda()
        sender = CodecState(11)
        for _ in range(2):
            payload = codec.encode(x, sender)
        assert len(payload) <= codec.wire_bytes(shape)
        if "klt" not in name and "delta" not in name:
            decoded = codec.decode(payload, shape, state())
            assert decoded.device.type == "cpu"
            bound = stated_bound(name, x.cpu())
            if bound is not None:
                assert ((decoded - x.cpu()).abs().reshape(bound.shape) <= bound * (1 + 1e-5)).all()
