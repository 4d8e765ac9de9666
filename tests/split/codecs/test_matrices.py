"""An adapter is coded matrix by matrix where a codec sends factors, and in one go where it does not."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.split.codecs import CodecState, for_matrices, parse
from isthmus.split.errors import CodecError
from tests.split.codecs.every import relative_error, state, tensor

LORA = ((8, 96), (64, 8), (8, 64), (160, 8))  # two modules: A and B of each
VALUES = sum(rows * width for rows, width in LORA)


def gains(rank: int, seed: int = 0) -> torch.Tensor:
    """What LoRA matrices gain between two averages: matrices of a low rank."""
    parts = [tensor((r, rank), seed=seed + r) @ tensor((rank, w), seed=seed + w) for r, w in LORA]
    return torch.cat([part.reshape(-1) for part in parts])


def test_each_matrix_comes_back_by_its_own_factors() -> None:
    x = gains(2)
    whole, by_matrix = parse("powersgd:2"), for_matrices(parse("powersgd:2"), LORA)
    payload = by_matrix.encode(x, state())
    assert relative_error(x, by_matrix.decode(payload, x.shape, state())) < 0.01
    assert relative_error(x, whole.decode(whole.encode(x, state()), x.shape, state())) > 0.3
    assert len(payload) == by_matrix.wire_bytes(x.shape) == sum(4 + 1 + 2 * 2 * (r + w) for r, w in LORA)


def test_matrices_of_one_shape_each_keep_a_factor() -> None:
    codec, sender = for_matrices(parse("powersgd:1"), ((30, 40), (30, 40))), state()
    x = torch.cat([tensor((30 * 40,), seed=1), tensor((30 * 40,), seed=2)])
    for _ in range(12):
        decoded = codec.decode(codec.encode(x, sender), x.shape, state())
    alone = parse("powersgd:1")
    for part, back in zip(x.split(1200), decoded.split(1200), strict=True):
        mine, matrix = state(), part.reshape(30, 40)
        for _ in range(12):
            best = alone.decode(alone.encode(matrix, mine), matrix.shape, state())
        assert relative_error(matrix, back.reshape(30, 40)) == pytest.approx(relative_error(matrix, best), rel=0.02)
    assert sender.memory_bytes == 2 * 40 * 4


def test_error_feedback_sends_in_time_what_is_beyond_the_rank() -> None:
    codec, sender, receiver = for_matrices(parse("ef,powersgd:1"), LORA), state(), state()
    x, total = gains(4), torch.zeros(VALUES)
    for _ in range(60):
        total += codec.decode(codec.encode(x, sender), x.shape, receiver)
    assert relative_error(x, total / 60) < 0.1


@pytest.mark.parametrize("name", ["none", "int8", "hadamard,uniform:step=0.2,zstd"])
def test_other_codecs_take_the_vector_as_it_is(name: str) -> None:
    assert for_matrices(parse(name), LORA) is parse(name)


def test_without_matrices_the_vector_is_taken_as_it_is() -> None:
    assert for_matrices(parse("powersgd"), ()) is parse("powersgd")


def test_a_vector_of_another_length_and_nan_are_refused() -> None:
    codec = for_matrices(parse("powersgd"), LORA)
    for shape in ((VALUES + 1,), (1, VALUES), ()):
        with pytest.raises(CodecError, match=f"matrices with {VALUES} values"):
            codec.encode(torch.zeros(shape), state())
        with pytest.raises(CodecError, match=f"matrices with {VALUES} values"):
            codec.decode(b"", shape, state())
    broken = gains(1)
    broken[-1] = torch.nan
    with pytest.raises(CodecError, match="NaN or infinity"):
        codec.encode(broken, state())


@given(st.sampled_from(["powersgd:2", "hadamard,lowrank:2,zstd", "ef,powersgd:2"]), st.integers(0, 2**16), st.data())
def test_arbitrary_bytes_give_a_tensor_or_an_error(name: str, seed: int, data: st.DataObject) -> None:
    codec, chance = for_matrices(parse(name), LORA), random.Random(seed)
    payload = codec.encode(gains(3, seed), state())
    damaged = bytearray(payload)
    for _ in range(chance.randint(1, 8)):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    for tried in (bytes(damaged), payload[:-1], payload + b"\0", data.draw(st.binary(max_size=200))):
        try:
            decoded = codec.decode(tried, (VALUES,), CodecState(1))
        except CodecError:
            continue
        assert decoded.shape == (VALUES,)
        assert torch.isfinite(decoded).all()
