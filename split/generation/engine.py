"""The decoding loop: requests join and leave at any token, and the chain's spans work on several batches at once.

As many batches go round as the chain has spans, each through one span after the other, so that with enough requests no
span is idle. A batch is either the next tokens of some answers or a piece of some prompts; the two take turns. A
sequence is in one batch at most. Sequences of ended answers keep their keys and values until their room is needed: a
request whose prompt begins like one of them goes on from there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from split.errors import BadRequest, IsthmusError
from split.generation.chain import Span
from split.generation.ends import Ends
from split.generation.request import Busy, Logprob, Request, Timing, Token
from split.generation.sampling import Chooser, check_sampling, logprob_of
from split.runtime.base import Row

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
        """Raises Busy when the queue is full, BadRequest for a prompt that does not fit or is empty."""


class _Stream:
    """One request at work: an Answer."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.sequence = -1
        self.fed = 0  # tokens whose keys and values are in the chain
        self.choose = Chooser(request.sampling)
        self.timing = Timing(prompt_tokens=len(request.prompt))
        self.cancelled = False
        self._came = time.perf_counter()
        self._out: asyncio.Queue[Token | IsthmusError | None] = asyncio.Queue()
        self._prompt_logprobs: list[Logprob | None] = [None]
        self._prompt_known: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._all()

    async def prompt_logprobs(self) -> list[Logprob | None]:
        await asyncio.shield(self._prompt_known)
        return self._prompt_logprobs

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def prefilling(self) -> bool:
        return self.fed < len(self.request.prompt)

    @property
    def wants_prompt(self) -> bool:
        return self.request.prompt_logprobs

    def heard(self, logits: Tensor) -> bool:
        """logits: (tokens, vocabulary), after each token that was fed, or after the last one. True: it has ended."""
        if self.wants_prompt and len(self._prompt_logprobs) < len(self.request.prompt):
            self._hear_prompt(logits)
        if self.prefilling:
            return False
        if self.wants_prompt and not self._prompt_known.done():
            self._prompt_known.set_result(None)
        return self.request.max_tokens == 0 or self._next(logits[-1])

    def end(self, error: IsthmusError | None = None) -> None:
        self.timing.total = time.perf_counter() - self._came
        if not self._prompt_known.done():
            if error is None:
                self._prompt_known.set_result(None)
            else:
                self._prompt_known.set_exception(error)
                self._prompt_known.exception()  # it may be that nobody asks
        self._out.put_nowait(error)

    def _hear_prompt(self, logits: Tensor) -> None:
        first = self.fed - len(logits)
        for place, row in enumerate(logits, start=first + 1):
            if place < len(self.request.prompt):
                self._prompt_logprobs.append(logprob_of(row, self.request.prompt[place], self.request.logprobs or 0))

    def _next(self, logits: Tensor) -> bool:
        place = len(self.tokens) - len(self.request.prompt)
        token = self.choose(logits, place)
        self.tokens.append(token)
        if not place:
            self.timing.first_token = time.perf_counter() - self._came
        self.timing.tokens = place + 1
        last = "stop" if token in self.request.stop_tokens else ""
        if not last and place + 1 == self.request.max_tokens:
            last = "length"
        asked = self.request.logprobs
        self._out.put_nowait(Token(token, None if asked is None else logprob_of(logits, token, asked), last))
        return bool(last)

    async def _all(self) -> AsyncIterator[Token]:
        while (token := await self._out.get()) is not None:
            if isinstance(token, IsthmusError):
                raise token
            yield token


class Engine:
    """Start it with `async with`. sequences: that are in the chain at the same time, ended ones included; queue:
    requests that may wait for room. chunk: most tokens of prompts in one batch.
    """

    def __init__(
        self, ends: Ends, spans: Sequence[Span], *, context: int, sequences: int, queue: int = 64, chunk: int = 256
    ) -> None:
        self.context, self.spans, self.capacity = context, list(spans), sequences + queue
        self._ends, self._sequences, self._queue, self._chunk = ends, sequences, queue, chunk
        self._waiting: deque[_Stream] = deque()
        self._turns: dict[str, int] = {}  # of the clients that are here: the number of each one's last admission
        self._admitted = 0
        self._prompts: deque[_Stream] = deque()  # ready for their next piece
        self._answers: deque[_Stream] = deque()  # ready for their next token
        self._at_work: set[_Stream] = set()  # all that have a sequence
        self._kept: dict[int, tuple[int, ...]] = {}  # of ended answers, oldest first: sequence -> tokens fed
        self._free = list(reversed(range(sequences)))
        self._news = asyncio.Event()
        self._prompts_next = True
        self._lanes: list[asyncio.Task[None]] = []
        self._seconds = 1.0  # of recent answers, for Retry-After

    async def __aenter__(self) -> Engine:
        self._lanes = [asyncio.create_task(self._lane()) for _ in self.spans]
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
        """load; hops: for each holder of each span what it has cost so far (`Cost`); the last recoveries."""
        return {
            "load": self.load,
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
        stream = _Stream(request)
        self._waiting.append(stream)
        self._admit()
        if len(self._waiting) > self._queue:  # it is the last of them
            self._waiting.pop()
            raise Busy(f"{len(self._waiting)} requests are waiting already; try again later", self._retry_after())
        self._news.set()
        return stream

    def _given_up(self, stream: _Stream) -> bool:
        if stream.cancelled:
            stream.end()
        return stream.cancelled

    def _retry_after(self) -> float:
        return max(1.0, self._seconds * (1 + len(self._waiting) / self._sequences))

    # ---- batches ----

    async def _lane(self) -> None:
        while True:
            batch: list[_Stream] = []
            try:
                self._admit()
                batch = self._take()
                if batch:
                    await self._advance(batch)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # a span that nobody holds, a bug: these answers end with it
                if not isinstance(error, IsthmusError):
                    log.exception("a batch failed")
                known = error if isinstance(error, IsthmusError) else IsthmusError(f"{type(error).__name__}: {error}")
                for stream in batch:
                    self._leave(stream, known)
            if batch:
                self._news.set()
            else:
                self._news.clear()
                await self._news.wait()

    def _admit(self) -> None:
        while self._waiting and (self._free or self._kept):
            stream = self._next_waiting()
            if self._given_up(stream):
                continue
            stream.sequence, stream.fed = self._room_for(stream)
            stream.timing.cached_tokens = stream.fed
            self._at_work.add(stream)
            self._prompts.append(stream)

    def _next_waiting(self) -> _Stream:
        """Clients take turns, one with many requests like one with few; each one's own in their order."""
        stream = min(self._waiting, key=lambda one: self._turns.get(one.request.client, 0))  # the first of equals
        self._waiting.remove(stream)
        if not stream.cancelled:
            self._admitted += 1
            self._turns[stream.request.client] = self._admitted
        here = {one.request.client for one in (stream, *self._at_work, *self._waiting)}
        self._turns = {client: turn for client, turn in self._turns.items() if client in here}
        return stream

    def _room_for(self, stream: _Stream) -> tuple[int, int]:
        """A sequence, and how many of the prompt's tokens it has already."""
        known = {sequence: _in_common(tokens, stream.request.prompt) for sequence, tokens in self._kept.items()}
        best = max(known, key=lambda sequence: known[sequence], default=-1)
        if best < 0 or 2 * known[best] < len(self._kept[best]):  # most of that one would be lost
            if self._free:
                return self._free.pop(), 0
            best = next(iter(self._kept))  # the oldest
        del self._kept[best]
        # The last token of a prompt is computed again: its logits are needed. So are those of all for its logprobs.
        return best, 0 if stream.wants_prompt else min(known[best], len(stream.request.prompt) - 1)

    def _take(self) -> list[_Stream]:
        """Of those that are ready: pieces of prompts and next tokens by turns, so that neither waits for long."""
        for ready in (self._prompts, self._answers):
            for stream in [one for one in ready if one.cancelled]:
                self._leave(stream)
        turn, self._prompts_next = self._prompts_next, not self._prompts_next
        if self._prompts and (turn or not self._answers):
            batch, room = [], self._chunk
            while self._prompts and room > 0:
                batch.append(self._prompts.popleft())
                room -= len(batch[-1].request.prompt) - batch[-1].fed
            return batch
        share = -(-len([one for one in self._at_work if not one.prefilling]) // len(self.spans))
        return [self._answers.popleft() for _ in range(min(share, len(self._answers)))]

    async def _advance(self, batch: list[_Stream]) -> None:
        rows: list[Row] = []
        ids: list[int] = []
        positions: list[int] = []
        room = self._chunk
        for stream in batch:
            left = len(stream.tokens) - stream.fed
            count = left if not stream.prefilling else max(1, min(left, room))
            room -= count
            rows.append(Row(stream.sequence, stream.fed, count))
            ids += stream.tokens[stream.fed : stream.fed + count]
            positions += range(stream.fed, stream.fed + count)
        hidden = self._ends.embed(ids, positions)
        for span in self.spans:
            hidden = await span.compute(rows, hidden)
        self._hear(batch, rows, hidden)

    def _hear(self, batch: list[_Stream], rows: Sequence[Row], hidden: Tensor) -> None:
        wanted: list[Tensor] = []
        for stream, row, part in zip(batch, rows, hidden.split([row.count for row in rows]), strict=True):
            stream.fed += row.count
            whole = stream.wants_prompt and row.position < len(stream.request.prompt)
            wanted.append(part if whole else part[-1:] if not stream.prefilling else part[:0])
        sizes = [len(part) for part in wanted]
        logits = self._ends.logits(torch.cat(wanted)) if any(sizes) else torch.empty(0, self._ends.vocabulary)
        for stream, part in zip(batch, logits.split(sizes), strict=True):
            if stream.cancelled or stream.heard(part):
                self._leave(stream)
            else:
                (self._prompts if stream.prefilling else self._answers).append(stream)

    def _leave(self, stream: _Stream, error: IsthmusError | None = None) -> None:
        if stream not in self._at_work:
            return
        self._at_work.remove(stream)
        for ready in (self._prompts, self._answers):
            if stream in ready:
                ready.remove(stream)
        if error is None:
            self._kept[stream.sequence] = tuple(stream.tokens[: stream.fed])
        else:
            self._forget(stream.sequence)
            self._free.append(stream.sequence)
        stream.end(error)
        if stream.timing.tokens:
            self._seconds = 0.9 * self._seconds + 0.1 * stream.timing.total

    def _forget(self, sequence: int) -> None:
        for span in self.spans:
            span.forget([sequence])


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens they begin with that are the same."""
    most = min(len(one), len(other))
    return next((place for place in range(most) if one[place] != other[place]), most)
