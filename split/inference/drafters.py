"""Who guesses at the next tokens of an answer: the text so far, or a model that is faster than the one that answers.

A draft is drawn as the answer's own token will be, with the same random numbers (`Chooser`), so that the two are the
same whenever the two models' opinions allow it, and an answer with drafts is, token for token, the one without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from isthmus.split.inference.answer_state import in_common
from isthmus.split.inference.chain import Holder
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.pace import Mean
from isthmus.split.inference.sampling import Chooser
from isthmus.split.runtime.base import Row

_LONGEST, _SHORTEST = 4, 1  # tokens of the text's end that are looked for further up
_MANY = 16  # tokens that say how long reading takes
_WINDOW = 2048  # tokens of the text that are looked through


@dataclass(frozen=True)
class DraftRequest:
    """A request for `count` guesses at what follows `tokens`.

    place: the number of the answer's token that the first guess stands for. choose: how the answer chooses its tokens.
    adapter, long: as in `Row`, of the model that answers.
    """

    sequence: int
    tokens: Sequence[int]
    place: int
    count: int
    choose: Chooser
    adapter: int = 0
    long: bool = False

    @property
    def kind(self) -> tuple[int, bool]:
        """What the keys and values of two requests must have in common for the one to be of use to the other."""
        return self.adapter, self.long


class Drafter(Protocol):
    """Something that guesses at the next tokens of answers."""

    @property
    def seconds(self) -> float:
        """Seconds that one guess takes, lately."""

    @property
    def reading_seconds(self) -> float:
        """Seconds that each token of a text takes which the drafter has not read yet, lately."""

    def unread(self, ask: DraftRequest) -> int:
        """Number of the request's tokens that the drafter has not read yet."""

    async def propose(
        self, asks: Sequence[DraftRequest], enough: Callable[[], bool] = lambda: False
    ) -> list[list[int]]:
        """Guess as many tokens as are asked for, or fewer.

        enough: asked now and then; True says that the guesses are not wanted any more.
        """

    def forget(self, sequence: int) -> None: ...


class Lookup:
    """Proposes what followed the last few tokens where they stood before (prompt lookup; Saxena 2023)."""

    seconds = math.inf  # there is nothing to be gained by guessing in advance
    reading_seconds = 0.0

    def unread(self, ask: DraftRequest) -> int:
        return 0

    async def propose(
        self, asks: Sequence[DraftRequest], enough: Callable[[], bool] = lambda: False
    ) -> list[list[int]]:
        return [look_up(ask.tokens, ask.count) for ask in asks]

    def forget(self, sequence: int) -> None:
        """Do nothing: a lookup remembers nothing."""


def look_up(tokens: Sequence[int], count: int) -> list[int]:
    """The tokens after the latest place where the longest possible end of `tokens` stood before, not too far back."""
    tokens = tokens[-_WINDOW:]
    text = torch.as_tensor(tokens)
    for length in range(min(_LONGEST, len(tokens) - 1), _SHORTEST - 1, -1):
        windows = text[:-1].unfold(0, length, 1)
        places = (windows == text[-length:]).all(1).nonzero()
        if len(places):
            start = int(places[-1]) + length
            return list(tokens[start : start + count])
    return []


@dataclass
class _Line:
    """The guesses of a model for one answer. fed: how many of the tokens are in its cache; never the last one."""

    choose: Chooser
    tokens: list[int]
    kind: tuple[int, bool]  # of its asks
    fed: int = 0


class ModelDrafter:
    """A model that drafts token by token: a smaller one, or the first blocks of the same one with its head.

    The latter is self-speculation as in LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710).
    """

    def __init__(
        self,
        ends: Ends,
        blocks: Holder,
        *,
        context: int,
        first_sequence: int = 0,
        adapters: bool = False,
        chunk: int = 256,
    ) -> None:
        """Draft with these blocks and ends.

        context: the most tokens of a sequence. first_sequence: is added to the numbers of sequences, where others use
        these blocks, too. adapters: whether the blocks have the adapters of the model that answers. chunk: the most
        tokens of a sequence in one batch.
        """
        self._adapters = adapters
        self._ends, self._blocks, self._context = ends, blocks, context
        self._first, self._chunk = first_sequence, chunk
        self._lines: dict[int, _Line] = {}
        self._seconds, self._reading = Mean(0.0, 0.2), Mean(0.0, 0.2)

    @property
    def seconds(self) -> float:
        return self._seconds.value

    @property
    def reading_seconds(self) -> float:
        return self._reading.value

    def unread(self, ask: DraftRequest) -> int:
        line = self._lines.get(ask.sequence)
        if line is None or line.kind != ask.kind:
            return len(ask.tokens)
        return len(ask.tokens) - min(line.fed, in_common(line.tokens, ask.tokens))

    async def propose(
        self, asks: Sequence[DraftRequest], enough: Callable[[], bool] = lambda: False
    ) -> list[list[int]]:
        """Guess on from earlier guesses where they begin with the request's tokens, else from these tokens."""
        asks = [replace(ask, count=min(ask.count, self._context - len(ask.tokens))) for ask in asks]
        due = [(ask, self._line(ask)) for ask in asks if ask.count > 0 and max(ask.tokens) < self._ends.vocabulary]
        lines = {ask.sequence: line for ask, line in due}
        while not enough() and (due := [(a, line) for a, line in due if len(line.tokens) < len(a.tokens) + a.count]):
            await self._step(due)
        return [
            lines[ask.sequence].tokens[len(ask.tokens) :][: ask.count] if ask.sequence in lines else [] for ask in asks
        ]

    def forget(self, sequence: int) -> None:
        if self._lines.pop(sequence, None) is not None:
            self._blocks.forget([self._first + sequence])

    def _line(self, ask: DraftRequest) -> _Line:
        line = self._lines.get(ask.sequence)
        if line is None or line.kind != ask.kind:
            line = self._lines[ask.sequence] = _Line(ask.choose, [], ask.kind)
        known = in_common(line.tokens, ask.tokens)
        if line.choose is not ask.choose or known < len(ask.tokens):  # another answer, or a wrong guess
            line.choose = ask.choose
            line.fed = min(line.fed, known, len(ask.tokens) - 1)
            line.tokens = list(ask.tokens)
        return line

    async def _step(self, due: Sequence[tuple[DraftRequest, _Line]]) -> None:
        """Compute one more token for each request, or one more piece of the text before it."""
        rows: list[Row] = []
        ids: list[int] = []
        positions: list[int] = []
        for ask, line in due:
            count = min(len(line.tokens) - line.fed, self._chunk)
            adapter = ask.adapter if self._adapters else 0
            rows.append(Row(self._first + ask.sequence, line.fed, count, adapter, ask.long))
            ids += line.tokens[line.fed : line.fed + count]
            positions += range(line.fed, line.fed + count)
        started = time.perf_counter()
        hidden = await self._blocks.compute(rows, self._ends.embed(ids, positions))
        lasts = torch.tensor([row.count for row in rows]).cumsum(0) - 1
        for (ask, line), row, logits in zip(due, rows, self._ends.logits(hidden[lasts]), strict=True):
            line.fed += row.count
            if line.fed == len(line.tokens):
                line.tokens.append(line.choose(logits, ask.place + len(line.tokens) - len(ask.tokens)))
        seconds, fed = time.perf_counter() - started, sum(row.count for row in rows)
        if fed == len(rows):
            self._seconds.add(seconds)
        elif fed > _MANY:
            self._reading.add(seconds / fed)
