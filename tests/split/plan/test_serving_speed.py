"""Where blocks had best lie: by hand, and against all chains that there are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.split.link.profile import LinkProfile
from isthmus.split.plan.serving_speed import Node, Placement, ServedSizes, best_chain, best_single, token_seconds

MODEL = ServedSizes(blocks=10, block_bytes=100.0, cache_bytes=20.0, hidden_bytes=8.0, gateway_seconds=0.5)
CLOUD = Node("cloud", memory=math.inf, rate=1000.0, block_seconds=0.01, batch_seconds=0.2)
LAPTOP = Node("laptop", memory=700.0, rate=500.0, link=LinkProfile(0.3, up=80.0, down=160.0))


def test_the_seconds_of_a_token_are_those_of_every_part_one_after_the_other() -> None:
    assert token_seconds([Placement(CLOUD, 10)], MODEL) == pytest.approx(0.5 + 0.2 + 10 * (0.01 + 0.1))
    way = 0.3 + 8 / 80 + 8 / 160
    split = 0.5 + (way + 4 * 0.2) + (0.2 + 6 * 0.11)
    assert token_seconds([Placement(LAPTOP, 4), Placement(CLOUD, 6)], MODEL) == pytest.approx(split)
    assert token_seconds([Placement(Node("new", 1e9, None), 1), Placement(CLOUD, 9)], MODEL) == math.inf


def test_memory_is_that_of_weights_and_keys_and_values() -> None:
    rooms = {119.0: 0, 120.0: 1, 700.0: 5, 1200.0: 10, math.inf: 10, -1.0: 0}
    assert {memory: MODEL.room(Node("n", memory, 1.0)) for memory in rooms} == rooms


def test_one_node_that_has_the_memory_is_better_than_a_split() -> None:
    fast = Node("fast", memory=700.0, rate=1e9)
    assert best_chain([CLOUD, LAPTOP, fast], MODEL) == [Placement(CLOUD, 10)]


def test_a_device_alone_is_taken_only_if_it_is_much_faster_than_the_coordinator() -> None:
    for rate, name in ((1050.0, "cloud"), (5000.0, "desktop")):
        single = best_single([CLOUD, Node("desktop", 1e9, rate, 0.01, 0.2)], MODEL)
        assert single is not None
        assert single.node.name == name


def test_without_one_the_fastest_node_gets_as_much_as_it_has_the_memory_for() -> None:
    small = Node("cloud", memory=7 * 120.0, rate=1000.0)
    assert best_chain([small, LAPTOP], MODEL) == [Placement(small, 7), Placement(LAPTOP, 3)]
    far = Node("far", memory=1e9, rate=400.0, link=LinkProfile(50.0))
    assert best_chain([small, LAPTOP, Node("far", 360.0, 400.0, link=LinkProfile(50.0))], MODEL) == [
        Placement(small, 7),
        Placement(LAPTOP, 3),
    ]
    assert best_single([small, LAPTOP, far], MODEL) == Placement(far, 10)


def test_what_nobody_can_hold_is_no_chain() -> None:
    tiny = Node("cloud", memory=200.0, rate=1.0)
    assert best_chain([tiny, LAPTOP], MODEL) is None
    assert best_single([tiny, LAPTOP], MODEL) is None


def test_nodes_whose_speed_is_not_known_are_left_out() -> None:
    new = Node("new", memory=1e9, rate=None)
    assert best_chain([CLOUD, new], MODEL) == [Placement(CLOUD, 10)]
    assert best_chain([Node("cloud", 200.0, 1.0), new], MODEL) is None


def all_chains(nodes: Sequence[Node], served: ServedSizes) -> Iterator[list[Placement]]:
    def fill(left: int, others: Sequence[Node]) -> Iterator[list[Placement]]:
        if left == 0:
            yield []
        elif others:
            for count in range(1, min(left, served.room(others[0])) + 1):
                for rest in fill(left - count, others[1:]):
                    yield [Placement(others[0], count), *rest]

    for size in range(1, len(nodes) + 1):
        for some in permutations(nodes, size):
            yield from fill(served.blocks, some)


amounts = st.floats(0.01, 100.0)
some_nodes = st.lists(
    st.builds(
        Node,
        name=st.just("n"),
        memory=st.floats(0, 9),
        rate=amounts,
        block_seconds=amounts,
        batch_seconds=amounts,
        link=st.builds(LinkProfile, amounts, amounts, amounts),
    ),
    min_size=1,
    max_size=4,
)


@given(some_nodes, st.integers(1, 6))
def test_no_chain_at_all_is_better(nodes: list[Node], blocks: int) -> None:
    served = ServedSizes(blocks, block_bytes=0.7, cache_bytes=0.3, hidden_bytes=1.0)
    chains = list(all_chains(nodes, served))
    alone = [chain for chain in chains if len(chain) == 1]
    best = best_chain(nodes, served)
    if best is None:
        assert not chains
        return
    assert sum(part.blocks for part in best) == blocks
    assert all(part.blocks <= served.room(part.node) for part in best)
    least = min(token_seconds(chain, served) for chain in (alone or chains))
    tolerance = 1 / 0.9 if alone else 1.0
    assert token_seconds(best, served) <= least * tolerance * (1 + 1e-9)
