"""Runtimes: a runtime computes a stage's blocks for several sequences at once, and keeps their keys and values.

Whoever calls says with every row how many tokens of the sequence came before. What the cache has beyond that is
forgotten, so taking back positions costs nothing; what the cache lacks is an error, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from isthmus.split.errors import BadRequest, WrongState


@dataclass(frozen=True)
class Row:
    """The next `count` tokens of one sequence, of which `position` tokens came before.

    sequence: a number that the caller has chosen, 0 or more. adapter: 0 for the base model, i for the i-th adapter.
    long: the whole text is longer than the model was first trained for, which with longrope chooses how all its keys
    are rotated. Both are the same as of what came before: who changes them begins again at position 0.
    """

    sequence: int
    position: int
    count: int
    adapter: int = 0
    long: bool = False


class BadPosition(WrongState):
    """A row whose sequence's cache does not reach up to its position: the caller has to send what came before."""


class Runtime(Protocol):
    """A stage of blocks (neither embedding nor head) with room for `sequences` sequences of up to `tokens` tokens.

    adapters: how many it has beside the base model.
    """

    sequences: int
    tokens: int
    adapters: int

    def compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        """Compute rows. hidden: (tokens of all rows in order, hidden size) float32 on the CPU. Returns the same shape.

        Each sequence is in one row at most. A sequence that is not known begins with position 0. Raises BadPosition and
        BadRequest (as `check_rows`); then nothing has changed.
        """

    def forget(self, sequences: Iterable[int]) -> None:
        """Frees the room of these sequences; unknown ones are passed over."""

    def lengths(self) -> dict[int, int]:
        """Tokens in the cache, by sequence."""


def check_rows(rows: Sequence[Row], hidden: Tensor, runtime: Runtime) -> None:
    """Raises BadPosition for a position beyond the cache, BadRequest for what else is not right."""
    lengths = runtime.lengths()
    if not rows or len({row.sequence for row in rows}) < len(rows):
        raise BadRequest("a batch needs one row for each of its sequences")
    if hidden.dim() != 2 or len(hidden) != sum(row.count for row in rows):
        raise BadRequest(f"{len(hidden)} tokens for rows of {sum(row.count for row in rows)}")
    new = sum(row.sequence not in lengths for row in rows)
    if len(lengths) + new > runtime.sequences:
        raise BadRequest(f"there is room for {runtime.sequences} sequences, and {len(lengths)} are there")
    for row in rows:
        if row.sequence < 0 or row.count < 1 or row.position < 0:
            raise BadRequest(f"{row} is not a row")
        if not 0 <= row.adapter <= runtime.adapters:
            raise BadRequest(f"adapter {row.adapter} of a row; {runtime.adapters} are here")
        if row.position + row.count > runtime.tokens:
            raise BadRequest(f"token {row.position + row.count} of a sequence; there is room for {runtime.tokens}")
        if row.position > lengths.get(row.sequence, 0):
            raise BadPosition(
                f"sequence {row.sequence} goes on at token {row.position}; {lengths.get(row.sequence, 0)} are here"
            )
