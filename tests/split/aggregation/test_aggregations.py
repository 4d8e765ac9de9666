"""Each aggregation against the dense computation: products as matrices, added up and, where it is due, cut by SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isthmus.split.aggregation import REGISTRY
from isthmus.split.aggregation.refactor import refactored, turned_to
from isthmus.split.aggregation.stacking import grown
from isthmus.split.lora.factors import Factors, WeightedFactors, difference_squared, norm_squared, stacked

OUT, IN = 12, 10
WEIGHTS = (0.5, 0.3, 0.2)


def _parts(ranks: tuple[int, ...]) -> list[WeightedFactors]:
    generator = torch.Generator().manual_seed(sum(ranks))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [(Factors(drawn(rank, IN), drawn(OUT, rank)), weight) for rank, weight in zip(ranks, WEIGHTS, strict=True)]


def _dense(parts: list[WeightedFactors]) -> Tensor:
    return torch.stack([weight * factors.b @ factors.a for factors, weight in parts]).sum(0)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 1), (1, 1, 8)])
def test_stacking_is_exactly_the_average_of_the_products(ranks: tuple[int, ...]) -> None:
    parts = _parts(ranks)
    merged = REGISTRY["stacking"].merge(parts, 4)
    assert merged.rank == sum(ranks)
    torch.testing.assert_close(merged.product(), _dense(parts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 1), (1, 1, 1)])
def test_svd_is_the_nearest_product_of_the_jobs_rank(ranks: tuple[int, ...]) -> None:
    parts = _parts(ranks)
    merged = REGISTRY["svd"].merge(parts, 4)
    u, values, v = torch.linalg.svd(_dense(parts))
    nearest = u[:, :4] @ torch.diag(values[:4]) @ v[:4]
    assert merged.rank == 4
    torch.testing.assert_close(merged.product(), nearest, rtol=0, atol=1e-4)
    leading = u[:, :2] @ torch.diag(values[:2]) @ v[:2]  # what a device of rank 2 gets
    torch.testing.assert_close(merged.first(2).product(), leading, rtol=0, atol=1e-4)


def test_padding_is_the_average_of_what_is_filled_up_with_zeros() -> None:
    parts = _parts((4, 2, 1))
    merged = REGISTRY["padding"].merge(parts, 4)
    a, b = torch.zeros(4, IN), torch.zeros(OUT, 4)
    for factors, weight in parts:
        a[: factors.rank] += weight * factors.a
        b[:, : factors.rank] += weight * factors.b
    torch.testing.assert_close(merged.a, a)
    torch.testing.assert_close(merged.b, b)


def test_the_average_of_factors_is_not_that_of_products_and_the_error_says_by_how_much() -> None:
    parts = _parts((4, 4, 4))
    merged = REGISTRY["average"].merge(parts, 4)
    dense = _dense(parts)
    expected = float((merged.product() - dense).norm() / dense.norm())
    error = (difference_squared(merged, stacked(parts)) / norm_squared(stacked(parts))) ** 0.5
    assert error == pytest.approx(expected, rel=1e-5)
    assert error > 0.1
    alone = [(parts[0][0], 1.0)]
    assert difference_squared(REGISTRY["average"].merge(alone, 4), stacked(alone)) < 1e-12


def test_what_is_frozen_grows_by_stacks_and_is_factorised_anew_without_loss_at_the_full_rank() -> None:
    frozen, total = None, torch.zeros(OUT, IN)
    ranks, remade = [], []
    for round_ in range(3):
        stack = stacked(_parts((2, 1, 1 + round_)))
        total += stack.product()
        frozen, anew = grown(frozen, stack)
        ranks.append(frozen.rank)
        remade.append(anew)
        torch.testing.assert_close(frozen.product(), total, rtol=0, atol=1e-4)
    assert (ranks, remade) == ([4, 9, IN], [False, False, True])


def test_turning_keeps_the_product_and_comes_as_near_to_ones_own_as_can_be() -> None:
    mine, _ = _parts((4, 4, 4))[0]
    merged = refactored(stacked(_parts((4, 4, 4))), 4)
    turned = turned_to(merged, mine.a)
    torch.testing.assert_close(turned.product(), merged.product(), rtol=0, atol=1e-4)
    assert (turned.a - mine.a).norm() < (merged.a - mine.a).norm()
    torch.testing.assert_close(turned_to(turned, mine.a).a, turned.a, rtol=0, atol=1e-4)


def test_a_direction_that_carries_nothing_yet_can_still_be_trained() -> None:
    """As LoRA begins: A has the size of its first values and B is zero, so that B's gradient is not zero."""
    untrained = Factors(torch.randn(4, IN, generator=torch.Generator().manual_seed(1)), torch.zeros(OUT, 4))
    merged = refactored(stacked([(untrained, 1.0)]), 4)
    torch.testing.assert_close(merged.a.norm(dim=1), torch.full((4,), 3**-0.5))
    assert float(merged.b.abs().max()) < 1e-6
