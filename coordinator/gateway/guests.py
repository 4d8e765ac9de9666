"""Devices that use the chain themselves: the text stays there, and hidden states come by Chain.Use.

To such a device the gateway is one holder of all blocks after the device's own. Each stream has some of the sequences
that every holder keeps free for guests. What a device sends is checked here, before it reaches a span: nothing that it
sends may cost a holder its stream, or touch another's sequence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.split.codecs import FAMILIES
from isthmus.split.errors import BadFrame, BadRequest, BadTensor, IsthmusError, LinkLost, NotAllowed
from isthmus.split.inference.chain import Span
from isthmus.split.inference.request import Busy
from isthmus.split.inference.serving import ServingConfig
from isthmus.split.inference.wire import ComputingEnd, Forget, HiddenBatch, Limits
from isthmus.split.runtime.base import BadPosition, Row
from isthmus.split.tls import check_name

log = logging.getLogger(__name__)

_GREATEST = 1e15  # of a hidden state: its square, summed up over any width, is still a float32
_STEP = 32  # tokens of one sequence that may come at once, however small the served model's own batches are
LAST_WORD = 2.0  # seconds in which whoever is sent away may read why
_IDLE = 600.0  # seconds without a message after which a stream ends, and its sequences are free; it may dial again
_RETRY = 5.0  # seconds after which it is worth asking again for a sequence


class Guests:
    """Who uses the chain now. digests: by number of blocks that a device may have itself, of its tensors."""

    def __init__(
        self, job: str, serving: ServingConfig, spans: Sequence[Span], hidden_size: int, digests: Mapping[int, str]
    ) -> None:
        self._job, self._serving, self._spans, self._hidden_size = job, serving, spans, hidden_size
        self._digests = digests
        self._free = deque(range(serving.limits.sequences, serving.room))
        self._open: dict[tuple[str, str], Guest] = {}  # by device and its session

    @property
    def load(self) -> dict[str, int]:
        return {"streams": len(self._open), "free": len(self._free)}

    @asynccontextmanager
    async def admitted(self, device: str, first: pb.ToHolder) -> AsyncIterator[Guest]:
        """A stream's guest, with sequences of its own until the end.

        Raises NotAllowed, BadFrame for a hello that does not fit, Busy when too few sequences are free.
        """
        spans = self._spans_for(device, first)
        hello, key = first.user, (device, first.user.session)
        while (earlier := self._open.get(key)) is not None:  # which has dialled again
            earlier.end(LinkLost("it has come by another stream"))
            await earlier.closed.wait()
        if hello.sequences > len(self._free):
            line = f"too few sequences for devices are free ({len(self._free)}; {hello.sequences} asked for)"
            raise Busy(f"{line}: try again later, or serve the model with more --guests", _RETRY)
        sequences = [self._free.popleft() for _ in range(hello.sequences)]
        most = max(self._serving.chain.chunk, _STEP * hello.sequences)
        guest = Guest(spans, sequences, self._serving, self._hidden_size, most)
        guest.hello = pb.Hello(
            job=self._job,
            first=hello.first,
            last=spans[-1].last,
            digest=hello.digest,
            sequences=hello.sequences,
            tokens=self._serving.limits.context,
            codecs=sorted(FAMILIES),
        )
        self._open[key] = guest
        log.info("%s uses the chain from block %d on, with %d sequences", device, hello.first, hello.sequences)
        try:
            yield guest
        finally:
            guest.close()
            self._free += sequences
            del self._open[key]
            guest.closed.set()

    def drop(self, device: str, error: IsthmusError) -> None:
        """Ends this device's streams; of no name: all."""
        for (name, _), guest in self._open.items():
            if device in ("", name):
                guest.end(error)

    def _spans_for(self, device: str, first: pb.ToHolder) -> list[Span]:
        if first.WhichOneof("kind") != "user":
            raise BadFrame("the first message of a device that uses the chain has to be its hello")
        hello = first.user
        if hello.job != self._job or device not in self._serving.may_use:
            raise NotAllowed(f"device {device} may not use job {hello.job[:32]}: it is not among its --users")
        if hello.first not in self._digests:
            starts = ", ".join(map(str, self._digests))
            raise BadRequest(f"no span begins at block {hello.first}: choose {starts}")
        if hello.digest != self._digests[hello.first]:
            raise BadFrame(f"the tensors at {device} are not the coordinator's")
        if not hello.sequences:
            raise BadFrame("a hello without sequences")
        check_name(hello.session, "a session's id")
        return [span for span in self._spans if span.first >= hello.first]


class Guest:
    """One stream's sequences, batches and answers. The device numbers its sequences from 0."""

    hello: pb.Hello
    """What the gateway answers to the device's own."""

    def __init__(
        self, spans: Sequence[Span], sequences: Sequence[int], serving: ServingConfig, hidden_size: int, most: int
    ) -> None:
        """sequences: their numbers in the chain. most: tokens of a batch."""
        self.error: IsthmusError | None = None
        self.closed = asyncio.Event()
        self.task: asyncio.Task[Any] | None = None  # that serves the stream
        self._spans, self._sequences = spans, sequences
        limits = Limits(len(sequences), most, serving.limits.context, len(serving.adapters), serving.chain.codec)
        self._end = ComputingEnd(hidden_size, limits)
        self._lengths = dict.fromkeys(sequences, 0)  # tokens that have gone through
        self._under_way: dict[int, set[int]] = {}  # by batch, until its answer is sent: its sequences
        self._answers: set[asyncio.Task[None]] = set()
        self._newest: asyncio.Task[None] | None = None
        self._outbox: asyncio.Queue[pb.Result | None] = asyncio.Queue()

    async def read(self, requests: AsyncIterator[pb.ToHolder]) -> None:
        """Until the device closes its side, or something is wrong: then `messages` end, and `error` says why."""
        try:
            while self.error is None:
                async with asyncio.timeout(_IDLE):
                    message = await anext(requests, None)
                if message is None:
                    break
                self._take(message)
            self.end(None)
        except TimeoutError:
            self.end(LinkLost(f"nothing came for {_IDLE:.0f} s"))
        except asyncio.CancelledError:
            raise
        except IsthmusError as error:
            self.end(error)
        except Exception as error:  # noqa: BLE001  # a broken stream, a bug: this device's alone
            self.end(LinkLost(f"{type(error).__name__}: {error}"))

    async def messages(self) -> AsyncIterator[pb.FromHolder]:
        yield pb.FromHolder(hello=self.hello)
        while (result := await self._outbox.get()) is not None and self.error is None:
            del self._under_way[result.id]
            yield pb.FromHolder(result=result)

    def end(self, error: IsthmusError | None) -> None:
        self.error = self.error or error
        self._outbox.put_nowait(None)
        if error is not None and self.task is not None:  # it may be waiting for somebody who does not read
            asyncio.get_running_loop().call_later(LAST_WORD, self.task.cancel)

    def close(self) -> None:
        """Nothing of this stream stays in the chain."""
        for task in self._answers:
            task.cancel()
        for span in self._spans:
            span.forget(self._sequences)

    def _take(self, message: pb.ToHolder) -> None:
        """Raises BadFrame, BadTensor or CodecError for what was not agreed."""
        asked = self._end.take(message)
        if isinstance(asked, Forget):
            for sequence in [self._number(number) for number in asked.sequences]:
                self._lengths[sequence] = 0
                for span in self._spans:
                    span.forget([sequence])
        elif isinstance(asked, HiddenBatch):
            self._start(asked)

    def _start(self, batch: HiddenBatch) -> None:
        rows = [replace(row, sequence=self._number(row.sequence)) for row in batch.rows]
        if batch.hidden.abs().max() > _GREATEST:
            raise BadTensor(f"hidden states beyond {_GREATEST:g}")
        self._under_way[batch.id] = {row.sequence for row in rows}
        self._newest = asyncio.create_task(self._answer(batch.id, rows, batch.hidden, self._newest))
        self._answers.add(self._newest)
        self._newest.add_done_callback(self._answers.discard)

    async def _answer(self, batch: int, rows: Sequence[Row], hidden: Tensor, before: asyncio.Task[None] | None) -> None:
        """before: whose answer is sent first."""
        started = time.perf_counter()
        try:
            output = await self._compute(rows, hidden)
            seconds = time.perf_counter() - started
            await _end_of(before)
            result = self._end.result(batch, output, seconds)
        except IsthmusError as error:
            result = self._end.failure(batch, error)
        except Exception as error:  # a bug: this batch's alone
            log.exception("a device's batch could not be computed")
            result = self._end.failure(batch, error, "the gateway could not compute it; its log says why")
        await _end_of(before)
        self._outbox.put_nowait(result)

    async def _compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        for row in rows:
            if row.position > self._lengths[row.sequence]:
                raise BadPosition(f"a sequence goes on at token {row.position}; {self._lengths[row.sequence]} are here")
        for row in rows:
            self._lengths[row.sequence] = row.position  # what follows counts once all of it is there
        for span in self._spans:
            hidden = await span.compute(rows, hidden, blame=False)
        for row in rows:
            self._lengths[row.sequence] = row.position + row.count
        return hidden

    def _number(self, asked: int) -> int:
        """The chain's number of a sequence. Raises BadFrame for one that is under way."""
        sequence = self._sequences[asked]
        if any(sequence in batch for batch in self._under_way.values()):
            raise BadFrame(f"sequence {asked} is under way already")
        return sequence


async def _end_of(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        await asyncio.wait({task})
