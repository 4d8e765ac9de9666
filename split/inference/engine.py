"""The decoding loop: requests join and leave at any token, and the chain's spans work on several batches at once.

As many batches go round as the chain has spans, each through one span after the other, so that with enough requests no
span is idle; or fewer, where that is faster (`InFlight`). A batch is either the next tokens of some answers or a piece
of some prompts; the two take turns. A sequence is in one batch at most. Sequences of ended answers keep their keys and
values until their room is needed: a request whose prompt begins like one of them, under the same adapter, goes on from
there.

A drafter, if there is one, guesses at the next tokens of each answer, and a batch verifies them together with the token
that is due; it drafts on while the batch is under way. With a rule for early exits, tokens that the first span is sure
of do not go through the other spans, until one comes that has to: these get all that they missed together with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.split.errors import BadRequest, IsthmusError
from isthmus.split.inference.chain import Span
from isthmus.split.inference.drafting import Drafting
from isthmus.split.inference.drafts import Drafter
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.exits import ExitRule
from isthmus.split.inference.in_flight import InFlight
from isthmus.split.inference.request import Busy, Logprob, Request, Timing, Token
from isthmus.split.inference.sampling import check_sampling
from isthmus.split.inference.stream import Stream, in_common
from isthmus.split.runtime.base import Row

log = logging.getLogger(__name__)

_MAX_LOGPROBS = 20


class Answer(Protocol):
    """Of one request. Iterate over it for the tokens; a request is given up by `cancel` (also when it is done)."""

    timing: Timing

    def __aiter__(self) -> AsyncIterator[Token]: ...

    async def prompt_logprobs(self) -> list[Logprob | None]:
        """One for each token of the prompt, None for the first; only of a request that asked for them."""

    def cancel(self) -> None: ...


class Generator(Protocol):
    """What answers requests, in the event loop where it was started."""

    context: int  # most tokens of prompt and answer together
    capacity: int  # most requests at the same time, those that wait included

    def submit(self, request: Request) -> Answer:
        """Raises Busy when the queue is full, BadRequest for a prompt that does not fit or is empty.

        Where a client has more requests waiting than whoever comes, the latest of them that is alone ends with Busy
        instead.
        """


class Engine:
    """Start it with `async with`. sequences: that are in the chain at the same time, ended ones included; queue:
    requests that may wait for room. chunk: most tokens of prompts in one batch.
    """

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
        """Raises BadRequest for a drafter and exits at the same time, and for exits from a chain of one span."""
        if exits is not None and (drafter is not None or len(spans) < 2):
            raise BadRequest("an early exit needs two spans at least, and no drafts")
        self._exits = exits
        self._drafting = None if drafter is None else Drafting(drafter, ends, self._waiting_time)
        self._totals = dict.fromkeys(("tokens", "rounds", "drafted", "accepted", "exited"), 0)
        self.context, self.spans, self.capacity = context, list(spans), sequences + queue
        self._ends, self._sequences, self._queue, self._chunk = ends, sequences, queue, chunk
        self._waiting: deque[Stream] = deque()
        self._turns: dict[str, float] = {}  # of the clients that are here: the number of each one's last admission
        self._admitted = 0
        self._prompts: deque[Stream] = deque()  # ready for their next piece
        self._answers: deque[Stream] = deque()  # ready for their next token
        self._at_work: set[Stream] = set()  # all that have a sequence
        # Of ended answers, oldest first: sequence -> adapter and `Row.long`, tokens that all spans have.
        self._kept: dict[int, tuple[tuple[int, bool], tuple[int, ...]]] = {}
        self._free = list(reversed(range(sequences)))
        self._news = asyncio.Event()
        self._prompts_next = True
        self._in_flight = InFlight(len(self.spans))
        self._decoding = 0  # batches of next tokens that are under way
        self._lanes: list[asyncio.Task[None]] = []
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
        for stream in [*self._at_work, *self._waiting]:
            stream.end(IsthmusError("the model is not served any more"))

    @property
    def load(self) -> dict[str, int]:
        return {"waiting": len(self._waiting), "running": len(self._at_work), "kept": len(self._kept)}

    def stats(self) -> dict[str, Any]:
        """load; answers: sums of what `Timing` has of those that have ended; in_flight: batches of next tokens that may
        be under way; hops: for each holder of each span what it has cost so far (`Cost`); the last recoveries."""
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
        check_sampling(request.sampling, self._ends.vocabulary)
        if not request.prompt:
            raise BadRequest("the prompt is empty: give at least one token")
        bad = next((token for token in request.prompt if not 0 <= token < self._ends.vocabulary), None)
        if bad is not None:
            raise BadRequest(f"token {bad} is not in the vocabulary of {self._ends.vocabulary}")
        if request.max_tokens < 0 or not 0 <= (request.logprobs or 0) <= _MAX_LOGPROBS:
            raise BadRequest(f"max_tokens has to be 0 or more, logprobs 0 to {_MAX_LOGPROBS}")
        if len(request.prompt) + request.max_tokens > self.context:
            raise BadRequest(
                f"{len(request.prompt)} tokens of prompt and {request.max_tokens} of answer are more than the "
                f"context of {self.context}"
            )
        self._waiting = deque(stream for stream in self._waiting if not self._given_up(stream))
        stream = Stream(request)
        self._turns.setdefault(request.client, self._admitted - 0.5)  # after those that wait, before who had a turn now
        self._waiting.append(stream)
        self._admit()
        if len(self._waiting) > self._queue:
            refused = self._one_too_many()
            self._waiting.remove(refused)
            self._turns = {client: turn for client, turn in self._turns.items() if client in self._clients()}
            busy = Busy(f"{len(self._waiting)} requests are waiting already; try again later", self._retry_after())
            if refused is stream:
                raise busy
            refused.end(busy)
        self._news.set()
        return stream

    def _one_too_many(self) -> Stream:
        """The newest; or the latest of a client that has more requests waiting than the newest's, and most of all."""
        counts = Counter(stream.request.client for stream in self._waiting)
        newest = self._waiting[-1]
        most = counts[newest.request.client]
        fuller = [s for s in self._waiting if s.request.alone and counts[s.request.client] > most]
        return max(reversed(fuller), key=lambda stream: counts[stream.request.client], default=newest)

    def _clients(self) -> set[str]:
        return {stream.request.client for stream in (*self._at_work, *self._waiting)}

    def _given_up(self, stream: Stream) -> bool:
        if stream.cancelled:
            stream.end()
        return stream.cancelled

    def _retry_after(self) -> float:
        return max(1.0, self._seconds * (1 + len(self._waiting) / self._sequences))

    # ---- batches ----

    async def _lane(self) -> None:
        while True:
            batch: list[Stream] = []
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
                for stream in batch:
                    self._leave(stream, known)
            if worked:
                self._news.set()
            else:
                self._news.clear()
                await self._news.wait()

    def _admit(self) -> None:
        while self._waiting and (self._free or self._kept):
            stream = self._next_waiting()
            if self._given_up(stream):
                continue
            stream.long = self._is_long(stream)
            stream.sequence, stream.fed = self._room_for(stream)
            stream.sent = stream.timing.cached_tokens = stream.fed
            if self._drafting is not None:
                self._drafting.begin(stream)
            self._at_work.add(stream)
            self._prompts.append(stream)

    def _is_long(self, stream: Stream) -> bool:
        boundary = self._ends.rotary_boundary
        return boundary is not None and len(stream.tokens) > boundary

    def _next_waiting(self) -> Stream:
        """Clients take turns, one with many requests like one with few; each one's own in their order."""
        stream = min(self._waiting, key=lambda one: self._turns.get(one.request.client, 0))  # the first of equals
        self._waiting.remove(stream)
        if not stream.cancelled:
            self._admitted += 1
            self._turns[stream.request.client] = self._admitted
        here = self._clients() | {stream.request.client}
        self._turns = {client: turn for client, turn in self._turns.items() if client in here}
        return stream

    def _room_for(self, stream: Stream) -> tuple[int, int]:
        """A sequence, and how many of the prompt's tokens it has already."""
        known = {
            sequence: in_common(tokens, stream.request.prompt) if kind == (stream.request.adapter, stream.long) else 0
            for sequence, (kind, tokens) in self._kept.items()
        }
        best = max(known, key=lambda sequence: known[sequence], default=-1)
        if best < 0 or 2 * known[best] < len(self._kept[best][1]):  # most of that one would be lost
            if self._free:
                return self._free.pop(), 0
            best = next(iter(self._kept))  # the oldest
        del self._kept[best]
        # The last token of a prompt is computed again: its logits are needed. So are those of all for its logprobs.
        return best, 0 if stream.wants_prompt else min(known[best], len(stream.request.prompt) - 1)

    def _take(self) -> list[Stream]:
        """Of those that are ready: pieces of prompts and next tokens by turns, so that neither waits for long."""
        for ready in (self._prompts, self._answers):
            for stream in [one for one in ready if one.cancelled]:
                self._leave(stream)
        turn, self._prompts_next = self._prompts_next, not self._prompts_next
        # With early exits only the lanes are a limit: who waits for the other spans keeps nobody from going on.
        may_decode = bool(self._answers) and (self._exits is not None or self._decoding < self._in_flight.value)
        if self._prompts and (turn or not may_decode):
            batch, room = [], self._chunk
            while self._prompts and room > 0:
                batch.append(self._prompts.popleft())
                room -= batch[-1].goal - batch[-1].fed
            return batch
        if not may_decode:
            return []
        share = -(-self._answering // self._in_flight.value)
        return [self._answers.popleft() for _ in range(min(share, len(self._answers)))]

    @property
    def _answering(self) -> int:
        return len([one for one in self._at_work if not one.prefilling])

    async def _decode(self, batch: list[Stream]) -> None:
        """One batch of next tokens; how long it took is heard by who says how many there shall be."""
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

    async def _advance(self, batch: list[Stream]) -> None:
        """Answers that go on without the whole chain are taken out of the list: what becomes of it is not theirs."""
        prompts = batch[0].prefilling  # then all are
        drafting = None if prompts else self._drafting
        if drafting is not None:
            await drafting.prepare(batch)
        rows: list[Row] = []
        ids: list[int] = []
        positions: list[int] = []
        room = self._chunk
        for stream in batch:
            due = [*stream.tokens[stream.fed :], *stream.drafts]
            if prompts:
                due = due[: max(1, room)]
                room -= len(due)
            rows.append(Row(stream.sequence, stream.fed, len(due), stream.request.adapter, stream.long))
            ids += due
            positions += range(stream.fed, stream.fed + len(due))
        started = time.perf_counter()
        async with contextlib.nullcontext() if drafting is None else drafting.going_on(batch):
            hidden = await self.spans[0].compute(rows, self._ends.embed(ids, positions))
            if self._exits is not None and not prompts:
                batch[:], rows, hidden = self._exit(self._exits, batch, rows, hidden)
            if batch:
                for span in self.spans[1:]:
                    hidden = await span.compute(rows, hidden)
        if batch:
            self._hear(batch, rows, hidden)
        if drafting is not None:
            drafting.took(len(ids), time.perf_counter() - started)

    def _exit(
        self, exits: ExitRule, batch: Sequence[Stream], rows: Sequence[Row], hidden: Tensor
    ) -> tuple[list[Stream], list[Row], Tensor]:
        """Of a batch after the first span: those that have to go on, with what they owe the other spans."""
        logits = self._ends.logits(hidden)
        owing = sum(len(stream.owed) for stream in self._at_work) + len(batch)  # which may all come in one batch
        going: list[Stream] = []
        owed: list[Tensor] = []
        for stream, sure, x, scores in zip(batch, exits.sure(logits), hidden[:, None], logits[:, None], strict=True):
            stream.owed.append(x)
            if sure and owing < self._chunk and not stream.cancelled:
                stream.timing.exited += 1
                self._go_on(stream, stream.decoded(scores))
            else:
                going.append(stream)
                owed += stream.owed
        rows = [Row(one.sequence, one.sent, len(one.owed), one.request.adapter, one.long) for one in going]
        return going, rows, torch.cat(owed) if owed else hidden[:0]

    def _hear(self, batch: Sequence[Stream], rows: Sequence[Row], hidden: Tensor) -> None:
        wanted: list[Tensor] = []
        for stream, part in zip(batch, hidden.split([row.count for row in rows]), strict=True):
            if not stream.prefilling:
                wanted.append(part[-1 - len(stream.drafts) :])
            elif stream.wants_prompt:
                wanted.append(part)
            else:
                wanted.append(part[-1:] if stream.fed + len(part) == stream.goal else part[:0])
        sizes = [len(part) for part in wanted]
        logits = self._ends.logits(torch.cat(wanted)) if any(sizes) else torch.empty(0, self._ends.vocabulary)
        for stream, row, part in zip(batch, rows, logits.split(sizes), strict=True):
            if stream.prefilling:
                ended = stream.prefilled(row.count, part)
            else:
                stream.timing.rounds += 1
                ended = stream.decoded(part)
                stream.caught_up()
            self._go_on(stream, ended)

    def _go_on(self, stream: Stream, ended: bool) -> None:
        if ended or stream.cancelled:
            self._leave(stream)
        else:
            if not stream.long and self._is_long(stream):  # as transformers does it: all keys are rotated anew
                stream.read_again()
            (self._prompts if stream.prefilling else self._answers).append(stream)
            self._news.set()  # for lanes that have nothing to do: this one may still be on its way

    def _leave(self, stream: Stream, error: IsthmusError | None = None) -> None:
        if stream not in self._at_work:
            return
        self._at_work.remove(stream)
        if not self._at_work:
            self._in_flight.broke_off()
        for ready in (self._prompts, self._answers):
            if stream in ready:
                ready.remove(stream)
        if error is None:
            kind = stream.request.adapter, stream.long
            self._kept[stream.sequence] = kind, tuple(stream.tokens[: stream.sent])
        else:
            self._forget(stream.sequence)
            self._free.append(stream.sequence)
        stream.end(error)
        for name in self._totals:
            self._totals[name] += getattr(stream.timing, name)
        if stream.timing.tokens:
            self._seconds = 0.9 * self._seconds + 0.1 * stream.timing.total

    def _forget(self, sequence: int) -> None:
        for span in self.spans:
            span.forget([sequence])
        if self._drafting is not None:
            self._drafting.forget(sequence)

    def _waiting_time(self) -> float:
        return sum(span.waiting for span in self.spans)
