"""The largest values of each row: which they are, what they take, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from isthmus.split.codecs import parse
from isthmus.split.codecs.sparse import _with_others
from isthmus.split.errors import CodecError
from tests.split.codecs.every import round_trip, state, tensor


def expected(x: torch.Tensor, k: int) -> torch.Tensor:
    places = x.abs().topk(k, dim=1).indices
    return torch.zeros_like(x).scatter_(1, places, x.gather(1, places).bfloat16().float())


@pytest.mark.parametrize(
    ("rows", "width", "share", "k"), [(5, 100, 0.05, 5), (5, 7, 0.05, 1), (3, 64, 0.5, 32), (2, 9, 1, 9)]
)
def test_the_largest_values_come_back_and_the_others_are_zero(rows: int, width: int, share: float, k: int) -> None:
    x = tensor((rows, width))
    assert torch.equal(round_trip(parse(f"topk:{share}"), x), expected(x, k))


@pytest.mark.parametrize(
    ("width", "share", "values", "size"),
    [
        (256, 0.05, "bfloat16", math.ceil(3 * 13 * 8 / 8) + 3 * 13 * 2),
        (100, 0.05, "bfloat16", math.ceil(3 * 5 * 7 / 8) + 3 * 5 * 2),
        (256, 0.25, "bfloat16", 3 * 256 // 8 + 3 * 64 * 2),
        (256, 0.05, "float16", 3 * 13 + 3 * 13 * 2 + 1),
        (256, 0.05, "int8", 3 * 13 + 3 * 13 + 3 * 2),
        (1, 0.05, "bfloat16", 1 + 3 * 2),
        (768, 0.01, "bfloat16", math.ceil(3 * 8 * 10 / 8) + 3 * 8 * 2),
    ],
)
def test_sizes(width: int, share: float, values: str, size: int) -> None:
    for name in (f"topk:{share}:values={values}", f"randtopk:{share}:values={values}"):
        assert len(parse(name).encode(tensor((3, width)), state())) == size == parse(name).wire_bytes((3, width))


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_values_can_be_sent_in_other_ways(values: str) -> None:
    x = tensor((5, 100))
    decoded = round_trip(parse(f"topk:0.1:values={values}"), x)
    assert (decoded != 0).sum() == 50
    assert torch.allclose(decoded, expected(x, 10), atol=0.02)


def test_random_others_take_the_share_alpha_of_the_places() -> None:
    rows, width, k, alpha = 400, 50, 10, 0.3
    x = tensor((rows, width))
    largest = x.abs().topk(k, dim=1).indices
    places = _with_others(largest, width, alpha, torch.Generator().manual_seed(3))
    taken = torch.zeros(rows, width).scatter_(1, places, 1.0)
    assert (taken.sum(1) == k).all()
    among = torch.zeros(rows, width).scatter_(1, largest, 1.0)
    others = float((taken * (1 - among)).sum()) / (rows * k)
    assert others == pytest.approx(alpha, abs=4 * math.sqrt(alpha * (1 - alpha) / (rows * k)))
    # Of the largest, and of the others, each is as likely as the next.
    rank = torch.zeros(rows, width).scatter_(1, largest, torch.arange(1.0, k + 1).expand(rows, k))
    chosen = torch.stack([(taken * (rank == r)).sum() for r in range(1, k + 1)]) / rows
    assert ((chosen - (1 - alpha)).abs() < 4.5 * math.sqrt(alpha * (1 - alpha) / rows)).all()


def test_without_random_others_it_is_topk() -> None:
    x = tensor((9, 80))
    assert torch.equal(round_trip(parse("randtopk:0.1:alpha=0"), x), round_trip(parse("topk:0.1"), x))


@pytest.mark.parametrize("width", [5, 6, 7])
def test_where_the_others_do_not_suffice_the_largest_fill_up(width: int) -> None:
    x = tensor((50, width)) + 3
    share = 4 / width
    assert ((round_trip(parse(f"randtopk:{share}:alpha=1"), x) != 0).sum(1) == 4).all()


def test_random_others_differ_from_tensor_to_tensor() -> None:
    codec, sender, x = parse("randtopk:0.2:alpha=0.5"), state(), tensor((6, 60))
    assert codec.encode(x, sender) != codec.encode(x, sender)


def test_with_a_memory_everything_arrives_in_the_end() -> None:
    """Error feedback: the sum of what was decoded follows the sum of what was to be sent."""
    codec, sender, receiver, x = parse("ef,topk:0.2"), state(), state(), tensor((4, 50))
    total = torch.zeros_like(x)
    for _ in range(60):
        total += codec.decode(codec.encode(x, sender), x.shape, receiver)
    assert float((total / 60 - x).norm() / x.norm()) < 0.1
    assert float((round_trip(parse("topk:0.2"), x) - x).norm() / x.norm()) > 0.3


@pytest.mark.parametrize(
    ("name", "shape", "places"),
    [
        ("topk:0.02", (1, 100), b"\x64"),  # 100 of 0 to 99
        ("topk:0.2", (1, 10), b"\x33"),  # 3 twice
        ("topk:0.2", (1, 10), b"\x23"),  # 3, then 2
        ("topk:0.5", (1, 8), b"\x07"),  # three of a row's four
        ("topk:0.5", (1, 8), b"\x1f"),  # five
    ],
)
def test_places_that_cannot_be_are_refused(name: str, shape: tuple[int, int], places: bytes) -> None:
    codec = parse(name)
    payload = places + bytes(codec.wire_bytes(shape) - len(places))
    with pytest.raises(CodecError, match=r"do(es)? not"):
        codec.decode(payload, shape, state())
