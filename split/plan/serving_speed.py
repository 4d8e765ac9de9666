"""How fast a served model will answer, by where its blocks lie, and where they had best lie.

One answer at a time: the seconds of its next token are those of the gateway, and of every span the way there and back
and the computing, one after the other. Reading the weights is most of the computing. All blocks of a model are alike,
so only their number at each node matters, and the order of the nodes does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.split.link.profile import LinkProfile

_WORTH_LEAVING = 0.9
"""The first node alone is taken before another alone that needs more than this share of its time: the first is the
coordinator, where everything comes through anyhow."""


@dataclass(frozen=True)
class Node:
    """A place where blocks can lie.

    memory: bytes. rate: bytes of weights that it reads a second; None: not measured. A batch takes batch_seconds, and
    for each block block_seconds and the time to read its weights.
    """

    name: str
    memory: float
    rate: float | None
    block_seconds: float = 0.0
    batch_seconds: float = 0.0
    link: LinkProfile = field(default_factory=LinkProfile)  # to the gateway


@dataclass(frozen=True)
class ServedSizes:
    """Sizes of a model as it is served.

    block_bytes: of one block's weights. cache_bytes: of a block's keys and values for all sequences. hidden_bytes: of
    one token's hidden states on the way. gateway_seconds: of one token at both ends of the model.
    """

    blocks: int
    block_bytes: float
    cache_bytes: float
    hidden_bytes: float
    gateway_seconds: float = 0.0

    def room(self, node: Node) -> int:
        """Number of blocks that a node has the memory for."""
        return max(0, int(min(self.blocks, node.memory / (self.block_bytes + self.cache_bytes))))


@dataclass(frozen=True)
class Placement:
    """So many blocks at one node."""

    node: Node
    blocks: int


def token_seconds(chain: Sequence[Placement], served: ServedSizes) -> float:
    """Seconds of one answer's next token through a chain; infinite where a node's speed is not known."""
    return served.gateway_seconds + sum(_span_seconds(part.node, part.blocks, served) for part in chain)


def best_single(nodes: Sequence[Node], served: ServedSizes) -> Placement | None:
    """Place all blocks at the fastest node that has the memory; None if no node with a known speed has it."""
    able = [Placement(node, served.blocks) for node in nodes if node.rate and served.room(node) == served.blocks]
    if not able:
        return None
    fastest = min(able, key=lambda part: token_seconds([part], served))
    at_home = able[0].node is nodes[0]
    if at_home and token_seconds([fastest], served) > _WORTH_LEAVING * token_seconds(able[:1], served):
        return able[0]
    return fastest


def best_chain(nodes: Sequence[Node], served: ServedSizes) -> list[Placement] | None:
    """Place all blocks at the best single node, or else as the fastest split; None if the memory of all is too little.

    A split keeps the order of the nodes. Nodes whose speed is not known are left out.
    """
    single = best_single(nodes, served)
    if single is not None:
        return [single]
    # By the number of blocks that the nodes so far hold: the least seconds, and with how many blocks at each of them.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    known = [node for node in nodes if node.rate]
    for node in known:
        seconds = [_span_seconds(node, count, served) for count in range(served.room(node) + 1)]
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for held, (before, counts) in best.items():
            for count, more in enumerate(seconds[: served.blocks - held + 1]):
                if before + more < longer.get(held + count, (math.inf,))[0]:
                    longer[held + count] = (before + more, (*counts, count))
        best = longer
    if served.blocks not in best:
        return None
    return [Placement(node, count) for node, count in zip(known, best[served.blocks][1], strict=True) if count]


def _span_seconds(node: Node, blocks: int, served: ServedSizes) -> float:
    if not blocks:
        return 0.0
    if not node.rate:
        return math.inf
    way = node.link.round_trip + served.hidden_bytes / node.link.up + served.hidden_bytes / node.link.down
    return way + node.batch_seconds + blocks * (node.block_seconds + served.block_bytes / node.rate)
