"""Drafts of the answers of a batch: how many are worth it, asking for them, and going on while they are verified.

All answers of a batch get as many: a batch whose rows are alike is computed together. The number is the one that
promises the most tokens a second, 0 included, from what batches, drafts and reading have cost lately.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import takewhile

from isthmus.split.inference.answer_state import AnswerState
from isthmus.split.inference.drafters import Drafter, DraftRequest
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.pace import BatchCost, Mean, Pace, shared_mean

log = logging.getLogger(__name__)

_MOST = 10  # drafts of an answer in a batch
_LEAST_LEFT = 8  # tokens that an answer still has to have for its first drafts
_WORTH = 1.03  # drafts have to promise so much more
_FIRST_REST, _LONGEST_REST = 8, 256  # batches without drafts until some are tried again, doubled each time in vain
_TRIAL = 2  # drafts of such a try
_TRIAL_SHARE = 0.03  # of the time of the rest before it that a try may take
_CAUGHT_UP = 16  # tokens: a drafter that has more to read is not timed


class DraftScheduler:
    """Decides how many drafts the answers of one engine get, and has the drafter make them."""

    def __init__(self, drafter: Drafter, ends: Ends, waiting: Callable[[], float]) -> None:
        """Begin without experience. waiting: gives the seconds of a batch, lately, in which nobody computed."""
        self._drafter: Drafter | None = drafter
        self._ends, self._waiting = ends, waiting
        self._cost, self._per_draft = BatchCost(), Mean(0.0, 0.2)
        self._shared = shared_mean()
        self._rest = _FIRST_REST
        self._without = 0  # batches since there were drafts

    def begin(self, answer: AnswerState) -> None:
        """Give a new answer its own estimate of how often drafts are right."""
        answer.pace = Pace(self._shared)

    def forget(self, sequence: int) -> None:
        if self._drafter is not None:
            self._drafter.forget(sequence)

    def took(self, tokens: int, seconds: float) -> None:
        """Note how long a batch of so many tokens took. seconds: without the time for its drafts."""
        self._cost.add(tokens, seconds)

    async def prepare(self, batch: Sequence[AnswerState]) -> None:
        """Give the answers of the next batch their drafts."""
        chosen, count = self._choose(batch)
        if not chosen or not count:
            return
        asks = [_ask(answer, min(count, self._most(answer))) for answer in chosen]
        unread = 0 if self._drafter is None else max(map(self._drafter.unread, asks))
        started = time.perf_counter()
        proposed = await self._propose(asks, lambda: False)
        seconds = time.perf_counter() - started
        for answer, drafts in zip(chosen, proposed, strict=True):
            # Two models' tables may be padded differently: what this one has not cannot be fed to it.
            answer.drafts = list(takewhile(lambda token: token < self._ends.vocabulary, drafts))
            answer.pace.proposed(len(drafts))
        longest = max(map(len, proposed))
        if longest and unread <= _CAUGHT_UP:
            self._per_draft.add(seconds / longest)

    @contextlib.asynccontextmanager
    async def going_on(self, batch: Sequence[AnswerState]) -> AsyncIterator[None]:
        """Draft on while a batch is computed, as if its drafts were right, if there is time for it."""
        asks = [
            _ask(answer, count)
            for answer in batch
            if answer.drafts and (count := min(len(answer.drafts) + 1, self._most(answer) - len(answer.drafts))) > 0
        ]
        if self._drafter is None or not asks or self._waiting() < self._drafter.seconds:
            yield
            return
        enough = asyncio.Event()
        task = asyncio.create_task(self._propose(asks, enough.is_set))
        try:
            yield
        finally:
            enough.set()
            await asyncio.gather(task, return_exceptions=True)

    async def _propose(self, asks: Sequence[DraftRequest], enough: Callable[[], bool]) -> list[list[int]]:
        """Ask the drafter. Without one, or after one has failed, there are no drafts: answers do not depend on them."""
        try:
            return [[] for _ in asks] if self._drafter is None else await self._drafter.propose(asks, enough)
        except Exception:  # too little memory, a bug
            log.exception("drafting failed; answers go on without drafts")
            self._drafter = None
            return [[] for _ in asks]

    def _most(self, answer: AnswerState) -> int:
        """The most drafts that this answer may have now: no row may cross the place where rotary tables change."""
        most = answer.left - 1
        boundary = self._ends.rotary_boundary
        if boundary is not None and len(answer.tokens) <= boundary:
            most = min(most, boundary - len(answer.tokens))
        return min(most, _MOST + len(answer.drafts))

    def _choose(self, batch: Sequence[AnswerState]) -> tuple[list[AnswerState], int]:
        """Choose which answers get drafts, and how many each."""
        able = [answer for answer in batch if not answer.pace.pauses() and self._most(answer) > 0]
        if self._drafter is None or not able:
            return [], 0
        if not self._cost.known:  # every other batch, until it is known what drafts cost
            self._without ^= 1
            ready = [answer for answer in able if answer.left >= _LEAST_LEFT or answer.timing.drafted]
            return ready, self._without * _TRIAL
        counts = range(1 + max(map(self._most, able)))
        best = max(counts, key=lambda count: self._rate(able, len(batch), count))
        if best and self._rate(able, len(batch), best) >= _WORTH * self._rate(able, len(batch), 0):
            worth = [answer for answer in able if self._gain(answer, len(batch), best) > self._reading(answer)]
            if worth:
                self._rest, self._without = _FIRST_REST, 0
                return worth, best
        self._without += 1
        if self._without <= self._rest:
            return [], 0
        spent = self._rest * self._cost(len(batch))
        self._rest, self._without = min(2 * self._rest, _LONGEST_REST), 0
        one = min(able, key=self._reading)
        extra = (
            self._reading(one)
            + _TRIAL * self._per_draft.value
            + self._cost(len(batch) + _TRIAL)
            - self._cost(len(batch))
        )
        return ([one], _TRIAL) if extra <= _TRIAL_SHARE * spent else ([], 0)

    def _rate(self, able: Sequence[AnswerState], size: int, count: int) -> float:
        """Expected tokens a second of a batch of `size` answers, of which those that are `able` get `count` drafts
        each.
        """
        tokens = size - len(able) + sum(answer.pace.expected(min(count, self._most(answer))) for answer in able)
        return tokens / self._seconds(size, len(able), count)

    def _gain(self, answer: AnswerState, size: int, count: int) -> float:
        """Seconds that `count` drafts a batch will have spared the answer by its end."""
        with_drafts = self._seconds(size, size, count) / answer.pace.expected(count)
        return answer.left * (self._cost(size) - with_drafts)

    def _seconds(self, size: int, drafted: int, count: int) -> float:
        return max(1e-9, self._cost(size + drafted * count) + count * self._per_draft.value)

    def _reading(self, answer: AnswerState) -> float:
        """Seconds that the drafter needs to read what it does not know of this answer yet."""
        if self._drafter is None or not self._drafter.reading_seconds:
            return 0.0
        return self._drafter.reading_seconds * self._drafter.unread(_ask(answer, 1))


def _ask(answer: AnswerState, count: int) -> DraftRequest:
    """Ask for drafts of what follows, as if the answer's present drafts were right."""
    place = answer.place + len(answer.drafts)
    tokens = [*answer.tokens, *answer.drafts]
    return DraftRequest(answer.sequence, tokens, place, count, answer.choose, answer.request.adapter, answer.long)
