"""The decoding loop: requests join and leave at any token, and the chain's spans work on several batches at once.

As many batches are in flight as the chain has spans, each going through one span after the other, so that with enough
requests no span is idle; or fewer, where that is faster (`InFlight`). A batch either decodes the next tokens of some
answers or prefills a piece of some prompts; the two take turns. A sequence is in one batch at most. Requests wait in a
`RequestQueue` for a sequence of the `SequencePool`, which keeps the keys and values of ended answers for prompts that
begin like them.

A drafter, if there is one, guesses at the next tokens of each answer. A batch verifies the drafts together with the
token that is due, and the drafter goes on while the batch is in flight. With a rule for early exits, tokens that the
first span is sure of skip the other spans; the next token that is not sure brings these spans all that they missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.split.errors import BadRequest, IsthmusError
from isthmus.split.inference.answer_state import AnswerState
from isthmus.split.inference.chain import Span
from isthmus.split.inference.draft_scheduler import DraftScheduler
from isthmus.split.inference.drafters import Drafter
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.exits import ExitRule
from isthmus.split.inference.in_flight import InFlight
from isthmus.split.inference.request import Busy, Logprob, Request, Timing, Token
from isthmus.split.inference.request_queue import RequestQueue
from isthmus.split.inference.sampling import check_sampling
from isthmus.split.inference.sequence_pool import SequencePool
from isthmus.split.runtime.base import Row

log = logging.getLogger(__name__)

_MAX_LOGPROBS = 20


class Answer(Protocol):
    """The answer to one request: iterate over it for the tokens.

    `cancel` gives the request up; it may also be called when the answer is complete.
    """

    timing: Timing

    def __aiter__(self) -> AsyncIterator[Token]: ...

    async def prompt_logprobs(self) -> list[Logprob | None]:
        """Return a log probability for each token of the prompt (None for the first), if the request asked for them."""

    def cancel(self) -> None: ...


class Generator(Protocol):
    """Something that answers requests, in the event loop where it was started.

    context: the most tokens of a prompt and its answer together. capacity: the most requests at the same time, those
    that wait included.
    """

    context: int
    capacity: int

    def submit(self, request: Request) -> Answer:
        """Begin to answer a request. Raises BadRequest for a prompt that is empty or too long, Busy for a full queue.

        Where another client has more requests waiting than this one, the latest of those that stand alone ends with
        Busy in this one's place.
        """


class Engine:
    """Generates with a chain of spans. Start it with `async with`."""

    def __init__(
        self,
        ends: Ends,
        spans: Sequence[Span],
        *,
        context: int,
        sequences: int,
        queue: int = 64,
        chunk: int = 256,
        drafter: Drafter | None = None,
        exits: ExitRule | None = None,
    ) -> None:
        """Make an engine that is not started yet.

        context: the most tokens of a prompt and its answer. sequences: how many the chain has room for, those of ended
        answers included. queue: requests that may wait for one. chunk: the most tokens of prompts in one batch.
        Raises BadRequest for a drafter together with exits, and for exits from a chain of one span.
        """
        if exits is not None and (drafter is not None or len(spans) < 2):
            raise BadRequest("an early exit needs two spans at least, and no drafts")
        self.context, self.spans, self.capacity = context, list(spans), sequences + queue
        self._ends, self._sequences, self._most_waiting, self._chunk = ends, sequences, queue, chunk
        self._exits = exits
        self._drafting = None if drafter is None else DraftScheduler(drafter, ends, self._waiting_time)
        self._queue, self._pool = RequestQueue(), SequencePool(sequences)
        self._at_work: set[AnswerState] = set()  # all that have a sequence
        self._prefills: deque[AnswerState] = deque()  # those that are ready for their prompt's next piece
        self._decodes: deque[AnswerState] = deque()  # those that are ready for their next token
        self._prefills_next = True
        self._in_flight = InFlight(len(self.spans))
        self._decoding = 0  # batches of next tokens that are in flight
        self._news = asyncio.Event()
        self._lanes: list[asyncio.Task[None]] = []
        self._totals = dict.fromkeys(("tokens", "rounds", "drafted", "accepted", "exited"), 0)
        self._seconds = 1.0  # of recent answers, for Retry-After

    async def __aenter__(self) -> Engine:
        # With early exits one more for each span: an answer that need not wait finds one that does not.
        lanes = len(self.spans) * (1 if self._exits is None else 2)
        self._lanes = [asyncio.create_task(self._lane()) for _ in range(lanes)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        for answer in [*self._at_work, *self._queue]:
            answer.end(IsthmusError("the model is not served any more"))

    @property
    def load(self) -> dict[str, int]:
        """Numbers of requests that wait and that have a sequence, and of sequences kept for prompts to come."""
        return {"waiting": len(self._queue), "running": len(self._at_work), "kept": self._pool.kept}

    def stats(self) -> dict[str, Any]:
        """Figures so far: `load`; `answers`, sums of what `Timing` has of ended answers; `in_flight`, how many batches
        of next tokens may be in flight; `hops`, the `Cost` of each holder of each span; the last `recoveries`."""
        return {
            "load": self.load,
            "answers": dict(self._totals),
            "in_flight": self._in_flight.value,
            "hops": [
                {"span": str(span), "holder": holder.name, **holder.cost.figures()}
                for span in self.spans
                for holder in span.holders
            ],
            "recoveries": [dataclasses.asdict(one) for span in self.spans for one in span.recoveries],
        }

    def submit(self, request: Request) -> Answer:
        check_request(request, self._ends.vocabulary, self.context)
        self._queue.drop_cancelled()
        answer = AnswerState(request)
        self._queue.push(answer)
        self._admit()
        if len(self._queue) > self._most_waiting:
            refused = self._queue.refuse_one(self._at_work)
            waiting = len(self._queue)
            retry_after = max(1.0, self._seconds * (1 + waiting / self._sequences))
            busy = Busy(f"{waiting} requests are waiting already; try again later", retry_after)
            if refused is answer:
                raise busy
            refused.end(busy)
        self._news.set()
        return answer

    # ---- which batch comes next ----

    async def _lane(self) -> None:
        """Take one batch after the other through the chain."""
        while True:
            batch: list[AnswerState] = []
            worked = False
            try:
                self._admit()
                batch = self._take()
                worked = bool(batch)
                if worked:
                    await (self._advance if batch[0].prefilling else self._decode)(batch)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # a span that nobody holds, a bug: these answers end with it
                if not isinstance(error, IsthmusError):
                    log.exception("a batch failed")
                known = error if isinstance(error, IsthmusError) else IsthmusError(f"{type(error).__name__}: {error}")
                self._in_flight.broke_off()
                for answer in batch:
                    self._leave(answer, known)
            if worked:
                self._news.set()
            else:
                self._news.clear()
                await self._news.wait()

    def _admit(self) -> None:
        """Give waiting requests the sequences that there are."""
        while len(self._queue) and self._pool.has_room:
            answer = self._queue.pop(self._at_work)
            if answer.cancelled:
                answer.end()
                continue
            answer.long = self._is_long(answer)
            answer.sequence, answer.fed = self._pool.take(answer)
            answer.sent = answer.timing.cached_tokens = answer.fed
            if self._drafting is not None:
                self._drafting.begin(answer)
            self._at_work.add(answer)
            self._prefills.append(answer)

    def _is_long(self, answer: AnswerState) -> bool:
        boundary = self._ends.rotary_boundary
        return boundary is not None and len(answer.tokens) > boundary

    def _take(self) -> list[AnswerState]:
        """Choose a batch: prefill and decode by turns, so that neither waits for long. Empty: nothing is ready."""
        for ready in (self._prefills, self._decodes):
            for answer in [one for one in ready if one.cancelled]:
                self._leave(answer)
        turn, self._prefills_next = self._prefills_next, not self._prefills_next
        # With early exits only the lanes are a limit: who waits for the other spans keeps nobody from going on.
        may_decode = bool(self._decodes) and (self._exits is not None or self._decoding < self._in_flight.value)
        if self._prefills and (turn or not may_decode):
            batch, room = [], self._chunk
            while self._prefills and room > 0:
                batch.append(self._prefills.popleft())
                room -= batch[-1].goal - batch[-1].fed
            return batch
        if not may_decode:
            return []
        share = -(-self._answering // self._in_flight.value)
        return [self._decodes.popleft() for _ in range(min(share, len(self._decodes)))]

    @property
    def _answering(self) -> int:
        return len([one for one in self._at_work if not one.prefilling])

    # ---- one batch ----

    async def _decode(self, batch: list[AnswerState]) -> None:
        """Compute a batch of next tokens, and tell `InFlight` how long it took."""
        everyone = list(batch)
        self._decoding += 1
        before = sum(one.timing.tokens for one in everyone)
        try:
            await self._advance(batch)
        finally:
            self._decoding -= 1
        if self._exits is None:
            tokens = sum(one.timing.tokens for one in everyone) - before
            self._in_flight.took(self._answering, tokens, time.perf_counter())

    async def _advance(self, batch: list[AnswerState]) -> None:
        """Compute a batch. Answers that exit early are taken out of the list: the batch's fate is not theirs."""
        prefilling = batch[0].prefilling  # then all are
        drafting = None if prefilling else self._drafting
        if drafting is not None:
            await drafting.prepare(batch)
        rows, ids = _due(batch, self._chunk if prefilling else None)
        positions = [row.position + place for row in rows for place in range(row.count)]
        started = time.perf_counter()
        async with contextlib.nullcontext() if drafting is None else drafting.going_on(batch):
            hidden = await self.spans[0].compute(rows, self._ends.embed(ids, positions))
            if self._exits is not None and not prefilling:
                batch[:], rows, hidden = self._exit(self._exits, batch, hidden)
            if batch:
                for span in self.spans[1:]:
                    hidden = await span.compute(rows, hidden)
        if batch:
            self._hear(batch, rows, hidden)
        if drafting is not None:
            drafting.took(len(ids), time.perf_counter() - started)

    def _exit(
        self, exits: ExitRule, batch: Sequence[AnswerState], hidden: Tensor
    ) -> tuple[list[AnswerState], list[Row], Tensor]:
        """Let the answers of a batch go on whose next token the first span is sure of.

        hidden: (answers, hidden), after the first span. Returns the other answers, with the rows and the hidden states
        (tokens, hidden) that they owe the other spans.
        """
        logits = self._ends.logits(hidden)
        owing = sum(len(answer.owed) for answer in self._at_work) + len(batch)  # which may all come in one batch
        going: list[AnswerState] = []
        owed: list[Tensor] = []
        for answer, sure, x, scores in zip(batch, exits.sure(logits), hidden[:, None], logits[:, None], strict=True):
            answer.owed.append(x)
            if sure and owing < self._chunk and not answer.cancelled:
                answer.timing.exited += 1
                self._go_on(answer, answer.decoded(scores))
            else:
                going.append(answer)
                owed += answer.owed
        rows = [Row(one.sequence, one.sent, len(one.owed), one.request.adapter, one.long) for one in going]
        return going, rows, torch.cat(owed) if owed else hidden[:0]

    def _hear(self, batch: Sequence[AnswerState], rows: Sequence[Row], hidden: Tensor) -> None:
        """Give each answer the logits of its rows. hidden: (tokens, hidden), after the last span."""
        wanted: list[Tensor] = []
        for answer, part in zip(batch, hidden.split([row.count for row in rows]), strict=True):
            if not answer.prefilling:
                wanted.append(part[-1 - len(answer.drafts) :])
            elif answer.wants_prompt:
                wanted.append(part)
            else:
                wanted.append(part[-1:] if answer.fed + len(part) == answer.goal else part[:0])
        sizes = [len(part) for part in wanted]
        logits = self._ends.logits(torch.cat(wanted)) if any(sizes) else torch.empty(0, self._ends.vocabulary)
        for answer, row, part in zip(batch, rows, logits.split(sizes), strict=True):
            if answer.prefilling:
                ended = answer.prefilled(row.count, part)
            else:
                answer.timing.rounds += 1
                ended = answer.decoded(part)
                answer.caught_up()
            self._go_on(answer, ended)

    def _go_on(self, answer: AnswerState, ended: bool) -> None:
        """Make an answer ready for its next batch, or end it."""
        if ended or answer.cancelled:
            self._leave(answer)
            return
        if not answer.long and self._is_long(answer):  # as transformers does it: all keys are rotated anew
            answer.read_again()
        (self._prefills if answer.prefilling else self._decodes).append(answer)
        self._news.set()  # for lanes that have nothing to do: this one may still be on its way

    def _leave(self, answer: AnswerState, error: IsthmusError | None = None) -> None:
        """End an answer, with an error if there is one, and take its sequence back."""
        if answer not in self._at_work:
            return
        self._at_work.remove(answer)
        if not self._at_work:
            self._in_flight.broke_off()
        for ready in (self._prefills, self._decodes):
            if answer in ready:
                ready.remove(answer)
        if error is None:
            self._pool.keep(answer)
        else:
            for span in self.spans:
                span.forget([answer.sequence])
            if self._drafting is not None:
                self._drafting.forget(answer.sequence)
            self._pool.release(answer.sequence)
        answer.end(error)
        for name in self._totals:
            self._totals[name] += getattr(answer.timing, name)
        if answer.timing.tokens:
            self._seconds = 0.9 * self._seconds + 0.1 * answer.timing.total

    def _waiting_time(self) -> float:
        """Seconds of the last batch in which no holder of this chain computed."""
        return sum(span.waiting for span in self.spans)


def check_request(request: Request, vocabulary: int, context: int) -> None:
    """Raises BadRequest for a request that cannot be answered. context: most tokens of prompt and answer together."""
    check_sampling(request.sampling, vocabulary)
    if not request.prompt:
        raise BadRequest("the prompt is empty: give at least one token")
    bad = next((token for token in request.prompt if not 0 <= token < vocabulary), None)
    if bad is not None:
        raise BadRequest(f"token {bad} is not in the vocabulary of {vocabulary}")
    if request.max_tokens < 0 or not 0 <= (request.logprobs or 0) <= _MAX_LOGPROBS:
        raise BadRequest(f"max_tokens has to be 0 or more, logprobs 0 to {_MAX_LOGPROBS}")
    if len(request.prompt) + request.max_tokens > context:
        raise BadRequest(
            f"{len(request.prompt)} tokens of prompt and {request.max_tokens} of answer are more than the "
            f"context of {context}"
        )


def _due(batch: Sequence[AnswerState], chunk: int | None) -> tuple[list[Row], list[int]]:
    """The rows and token ids that are due of each answer. chunk: the most ids in all (one of each at least)."""
    rows: list[Row] = []
    ids: list[int] = []
    for answer in batch:
        due = [*answer.tokens[answer.fed :], *answer.drafts]
        if chunk is not None:
            due = due[: max(1, chunk - len(ids))]
        rows.append(Row(answer.sequence, answer.fed, len(due), answer.request.adapter, answer.long))
        ids += due
    return rows, ids
