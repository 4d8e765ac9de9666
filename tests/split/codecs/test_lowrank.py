"""Thin factors: how near they come to the best ones, and what happens at the edges."""

from __future__ import annotations

import pytest
import torch

from isthmus.split.codecs import parse
from tests.split.codecs.every import relative_error, round_trip, state, tensor


def of_rank(rank: int, rows: int, width: int, noise: float = 0.0) -> torch.Tensor:
    return tensor((rows, rank), seed=1) @ tensor((rank, width), seed=2) + noise * tensor((rows, width), seed=3)


def best_error(x: torch.Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(x.double())
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("powersgd:4", (60, 100), 1 + 2 * 4 * 160),
        ("lowrank:4", (60, 100), 1 + 2 * 4 * 160),
        ("lowrank:4", (3, 100), 2 * 300),
        ("powersgd:4", (1, 100), 2 * 100),
        ("powersgd:1", (2, 3), 1 + 2 * 5),
    ],
)
def test_sizes(name: str, shape: tuple[int, int], size: int) -> None:
    assert len(parse(name).encode(tensor(shape), state())) == size == parse(name).wire_bytes(shape)


@pytest.mark.parametrize("name", ["powersgd:4", "lowrank:4"])
@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e-8, 1.0, 1e36])
def test_a_matrix_of_the_rank_comes_back_at_any_size(name: str, factor: float) -> None:
    x = of_rank(4, 50, 70) * factor
    assert relative_error(x, round_trip(parse(name), x)) < (0.01 if factor > 1e-40 else 0.1)


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_lowrank_comes_near_the_best_of_its_rank(noise: float) -> None:
    for x in (of_rank(6, 120, 80, noise), tensor((120, 80), "heavy")):
        best = best_error(x, 8)
        assert best * 0.999 < relative_error(x, round_trip(parse("lowrank:8"), x)) < 1.02 * best + 0.005


def test_powersgd_comes_nearer_with_every_tensor_that_is_alike() -> None:
    codec, sender, receiver = parse("powersgd:4"), state(), state()
    x = of_rank(6, 120, 80, 0.5)
    errors = [relative_error(x, codec.decode(codec.encode(x, sender), x.shape, receiver)) for _ in range(12)]
    assert errors[-1] < errors[0]
    assert errors[-1] < 1.02 * best_error(x, 4)


def test_powersgd_goes_on_after_a_tensor_of_zeros() -> None:
    codec, sender, receiver = parse("powersgd:4"), state(), state()
    zeros = torch.zeros(30, 40)
    assert not codec.decode(codec.encode(zeros, sender), zeros.shape, receiver).any()
    x = of_rank(4, 30, 40)
    for _ in range(3):
        decoded = codec.decode(codec.encode(x, sender), x.shape, receiver)
    assert relative_error(x, decoded) < 0.01


def test_powersgd_keeps_a_factor_for_each_shape_and_the_decoder_none() -> None:
    codec, sender, receiver = parse("powersgd:2"), state(), state()
    for shape in ((30, 40), (20, 40), (30, 40)):
        x = tensor(shape)
        codec.decode(codec.encode(x, sender), shape, receiver)
    assert sender.memory_bytes == 2 * 40 * 2 * 4
    assert receiver.memory_bytes == 0


@pytest.mark.parametrize("name", ["powersgd:64", "lowrank:64"])
@pytest.mark.parametrize("shape", [(40, 50), (1, 9), (3, 1), (64, 64)])
def test_where_factors_would_take_as_much_the_matrix_itself_is_sent(name: str, shape: tuple[int, int]) -> None:
    x = tensor(shape)
    assert torch.equal(round_trip(parse(name), x), x.bfloat16().float())


@pytest.mark.parametrize("name", ["powersgd", "lowrank"])
def test_matrices_that_are_not_of_full_rank_are_coded(name: str) -> None:
    for x in (torch.zeros(50, 60), torch.ones(50, 60), torch.eye(50, 60), of_rank(1, 50, 60)):
        decoded = round_trip(parse(name), x)
        assert torch.isfinite(decoded).all()
        if float(torch.linalg.matrix_rank(x)) <= 4:
            assert relative_error(x, decoded) < 0.01
