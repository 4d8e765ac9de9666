"""The side of a holder's stream that has the batches, which go out as results come in.

It is at a gateway, or at a guest, to which the gateway is the holder.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from torch import Tensor

from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.split.errors import BadFrame, IsthmusError, LinkLost
from isthmus.split.inference.chain import Cost
from isthmus.split.inference.wire import HiddenCoder, rows_to_proto
from isthmus.split.link.turns import Turns
from isthmus.split.printable import printable
from isthmus.split.runtime.base import BadPosition, Row


class RemoteHolder:
    """A Holder across the network. Whoever serves its stream sends what `messages` yields and calls `heard`.

    seed: seed of what the codec draws.
    timeout: seconds without an answer, while one is due, after which the holder counts as gone.
    """

    def __init__(self, name: str, codec: str, seed: int, hidden_size: int, *, timeout: float = 60.0) -> None:
        self.name, self.cost = name, Cost()
        self.gone = False
        self.tells_spent = False  # whether it answers AskSpent, as its hello says
        self.spent: pb.Spent | None = None  # what it has told last of its process
        self._told_spent = asyncio.Event()
        self._coder = HiddenCoder(codec, seed, hidden_size)
        self._timeout = timeout
        self._outbox: asyncio.Queue[pb.ToHolder | None] = asyncio.Queue()
        self._outbox.put_nowait(pb.ToHolder(agreed=pb.Agreed(codec=codec, seed=seed)))
        # By batch: its number of tokens, and the future of whoever waits for it.
        self._due: Turns[int, tuple[int, asyncio.Future[tuple[Tensor, float]]]] = Turns()
        self._last = self._answered = 0  # numbers of batches
        self._ended: IsthmusError | None = None
        self._watch: asyncio.TimerHandle | None = None

    async def compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        if self.gone or self._ended is not None:
            raise LinkLost(f"{self.name} has gone")
        started = time.perf_counter()
        coding = self._coder.seconds
        self._last += 1
        batch = pb.Batch(id=self._last, rows=rows_to_proto(rows), hidden=self._coder.encode(hidden))
        self.cost.coding += self._coder.seconds - coding
        self.cost.sent += batch.ByteSize()
        loop = asyncio.get_running_loop()
        result: asyncio.Future[tuple[Tensor, float]] = loop.create_future()
        self._due.ask(batch.id, (len(hidden), result))
        self._outbox.put_nowait(pb.ToHolder(batch=batch))
        if self._watch is None:
            self._watch = loop.call_later(self._timeout, self._look, self._answered)
        output, computing = await result
        self.cost.add(len(hidden), time.perf_counter() - started, computing)
        return output

    def _look(self, answered: int) -> None:
        """Ends the stream if a result is due and none has come for one timeout.

        answered: number of batches answered when the timeout began.
        """
        self._watch = None
        if self._due and self._answered == answered:
            self.end(LinkLost(f"it did not answer for {self._timeout:.0f} s"))
        elif self._due:
            self._watch = asyncio.get_running_loop().call_later(self._timeout, self._look, self._answered)

    def forget(self, sequences: Iterable[int]) -> None:
        if not self.gone:
            self._outbox.put_nowait(pb.ToHolder(forget=pb.Forget(sequences=sequences)))

    async def ask_spent(self, patience: float) -> None:
        """Brings `spent` up to date, if the holder answers within `patience` seconds."""
        if not self.tells_spent or self.gone:
            return
        self._told_spent.clear()
        self._outbox.put_nowait(pb.ToHolder(ask_spent=pb.AskSpent()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._told_spent.wait()

    async def messages(self) -> AsyncIterator[pb.ToHolder]:
        """Messages to send, until the end."""
        while (message := await self._outbox.get()) is not None:
            yield message

    def heard(self, message: pb.FromHolder) -> None:
        """Takes a message from the holder.

        Raises BadFrame or BadTensor for what was not agreed, with which the stream has to end.
        """
        kind = message.WhichOneof("kind")
        if kind == "leaving":
            self.gone = True
            self._close_if_done()
            return
        if kind == "spent" and self.tells_spent:
            self.spent = message.spent
            self._told_spent.set()
            return
        result = message.result
        if kind != "result":
            raise BadFrame(f"{self.name} sent {kind} out of turn")
        tokens, waiting = self._due.next(result.id)
        self._answered += 1
        self.cost.received += message.ByteSize()
        if result.HasField("hidden"):
            coding = self._coder.seconds
            output = self._coder.decode(result.hidden, tokens)
            self.cost.coding += self._coder.seconds - coding + _seconds(result.coding_seconds)
            self._due.done()  # not before, for what cannot be decoded is lost with the stream
            if not waiting.done():
                waiting.set_result((output, _seconds(result.computing_seconds)))
        else:
            self._due.done()
            line = f"{self.name}: {printable(result.error, 500)}"
            if not waiting.done():
                waiting.set_exception(BadPosition(line) if result.bad_position else IsthmusError(line))
        self._close_if_done()

    def end(self, error: IsthmusError) -> None:
        """Notes that the stream has ended: what is under way is lost."""
        self.gone, self._ended = True, error
        while self._due:
            _, waiting = self._due.done()
            if not waiting.done():
                waiting.set_exception(LinkLost(f"{self.name}: {error}"))
        self._outbox.put_nowait(None)

    def _close_if_done(self) -> None:
        if self.gone and not self._due:
            self._outbox.put_nowait(None)


def _seconds(told: float) -> float:
    """Seconds that a holder tells of itself; 0 for an impossible value."""
    return told if 0 <= told < 1e6 else 0.0
