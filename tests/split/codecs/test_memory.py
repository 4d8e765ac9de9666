"""Memories: what is owed to a sample is paid in time, and both ends keep the same books."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.split.codecs.base import Codec, Memory
from isthmus.split.codecs.integers import Integer
from isthmus.split.codecs.memory import Delta, ErrorFeedback
from isthmus.split.codecs.plain import PLAIN
from isthmus.split.codecs.state import CodecState
from isthmus.split.codecs.uniform import Uniform
from isthmus.split.errors import CodecError
from tests.examples import examples

MIB = 1 << 20


def codec(memory: Memory, step: float = 1.0) -> Codec:
    return Codec("test", Uniform(step), PLAIN, None, memory)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_with_error_feedback_the_sum_of_what_comes_out_follows_what_went_in() -> None:
    one = Codec("test", Integer(2), PLAIN, None, ErrorFeedback())
    here, there = CodecState(1), CodecState(1)
    sent, came = torch.zeros(4, 3, 64), torch.zeros(4, 3, 64)
    farthest = []
    for i in range(60):
        x = noise(4, 3, 64, seed=i) + 0.2
        sent += x
        came += one.decode(one.encode(x, here, range(4)), x.shape, there, range(4))
        farthest.append(float((sent - came).abs().max()))
    assert max(farthest) < 12
    assert max(farthest[40:]) < 1.5 * max(farthest[:40])
    store = here.parts["ef"].tensors
    owed = torch.stack([store[key, (3, 64)] for key in range(4)])
    assert torch.allclose(owed, sent - came, atol=1e-3)


def test_error_feedback_owes_both_residuals_of_a_sample_that_is_there_twice() -> None:
    memory, state = ErrorFeedback(), CodecState(1)
    x = noise(3, 8, seed=1)
    given_ = memory.before(x, [7, 7, 8], state)
    assert torch.equal(given_, x)
    memory.coded(given_, torch.zeros_like(x), [7, 7, 8], state)
    again = memory.before(torch.zeros(3, 8), [7, 7, 8], state)
    assert torch.equal(again, torch.stack([x[0] + x[1], torch.zeros(8), x[2]]))


def test_delta_costs_less_and_loses_less_as_tensors_settle() -> None:
    one = codec(Delta(), 0.5)
    here, there = CodecState(1), CodecState(1)
    base = noise(6, 5, 32, seed=2)
    errors = []
    for epoch in range(5):
        for keys in ([0, 1, 2], [3, 4, 5]):
            x = base[keys] + 0.1**epoch * noise(3, 5, 32, seed=10 + epoch)
            decoded = one.decode(one.encode(x, here, keys), x.shape, there, keys)
            errors.append(float((decoded - x).norm() / x.norm()))
    assert errors[-1] < 0.02 * errors[0]


@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(
    batches=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=4), st.sampled_from([(300, 64), (64, 300), (450, 64)])
        ),
        min_size=1,
        max_size=12,
    )
)
def test_both_ends_of_delta_know_the_same_whatever_comes(batches: list[tuple[list[int], tuple[int, int]]]) -> None:
    """With a limit that holds 13 tensors or fewer, samples that are there twice and shapes that change."""
    one = codec(Delta(limit=1))
    here, there = CodecState(1), CodecState(1)
    for i, (keys, inner) in enumerate(batches):
        x = noise(len(keys), *inner, seed=i)
        decoded = one.decode(one.encode(x, here, keys), x.shape, there, keys)
        mine, theirs = here.parts[one.memory.name], there.parts[one.memory.name]  # type: ignore[union-attr]
        assert list(mine.tensors) == list(theirs.tensors)
        assert all(torch.equal(mine.tensors[key], theirs.tensors[key]) for key in mine.tensors)
        assert mine.bytes == theirs.bytes == here.memory_bytes == there.memory_bytes <= MIB
        assert torch.equal(mine.tensors[keys[-1], inner], decoded[-1])


@pytest.mark.parametrize("memory", [ErrorFeedback(limit=1), Delta(limit=1)], ids=lambda memory: memory.name)
def test_what_was_put_longest_ago_is_forgotten_first(memory: Memory) -> None:
    one, state = codec(memory), CodecState(1)
    for key in (0, 1, 2, 0, 3, 4):  # each is 256 KiB
        one.encode(noise(1, 1024, 64, seed=key), state, [key])
    assert [key for key, _ in state.parts[memory.name].tensors] == [2, 0, 3, 4]
    assert state.memory_bytes == MIB
    one.encode(noise(1, 8192, 64, seed=9), state, [9])
    assert state.memory_bytes == 0


@pytest.mark.parametrize("memory", [ErrorFeedback(), Delta()], ids=lambda memory: memory.name)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (1, 2, 3, 4), (0, 4), (3, 0)])
def test_tensors_of_any_shape(memory: Memory, shape: tuple[int, ...]) -> None:
    one = codec(memory, 0.01)
    here, there = CodecState(1), CodecState(1)
    for i in range(3):
        x = noise(*shape, seed=i) if shape else torch.tensor(1.5 + i)
        decoded = one.decode(one.encode(x, here), x.shape, there)
        assert decoded.shape == x.shape
        assert torch.allclose(decoded, x, atol=0.1)


def test_without_keys_a_sample_is_known_by_its_place() -> None:
    memory, state = Delta(), CodecState(1)
    codec(memory).encode(noise(3, 8, seed=1), state)
    assert [key for key, _ in state.parts["delta"].tensors] == [0, 1, 2]


@pytest.mark.parametrize("memory", [ErrorFeedback(), Delta()], ids=lambda memory: memory.name)
def test_equal_seeds_and_tensors_give_equal_bytes(memory: Memory) -> None:
    one = Codec("test", Integer(3, stochastic=True), PLAIN, None, memory)
    runs = []
    for _ in range(2):
        state = CodecState(3)
        runs.append([one.encode(noise(4, 64, seed=i), state, [i % 3, 5, 6, 7]) for i in range(8)])
    assert runs[0] == runs[1]


def test_names_and_limits() -> None:
    assert [ErrorFeedback().name, ErrorFeedback(64).name] == ["ef", "ef:limit=64"]
    assert [Delta().name, Delta(64).name] == ["delta", "delta:limit=64"]
    for memory in (ErrorFeedback, Delta):
        with pytest.raises(CodecError, match="choose"):
            memory(0)
