"""One direction of an emulated link: a bottleneck that all connections share, then a delay, and what is on its way."""

from __future__ import annotations

import asyncio
import math
import random
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from isthmus.coordinator.emulation.clock import Clock, wake
from isthmus.coordinator.emulation.spec import LinkSpec

PACKET = 1448  # payload of a TCP segment on Ethernet, in bytes
_MIN_QUEUE, _MAX_QUEUE, _QUEUE_SECONDS = 64 * 1024, 8 * 1024 * 1024, 0.05
_MAX_CHUNK, _CHUNK_SECONDS = 256 * 1024, 0.002
_UNLIMITED = 10e9  # bits per second by which the delay line of an unlimited link is bounded


@dataclass(slots=True)
class Chunk:
    """Bytes on the link; none: the end of a direction, by a FIN or a reset. Times in seconds of uptime."""

    data: bytes
    passed: float  # when its last bit has passed the bottleneck
    delay: float  # from there to the other end
    reset: bool = False


class Lane:
    """One direction of the link: a bottleneck on a virtual clock, so that late wake-ups do not add up."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free_at = 0.0  # uptime at which all that was admitted has passed
        self._rate = math.inf
        self.turn = asyncio.Lock()  # first come, first served: connections take turns, a chunk each
        self.pipes: set[Pipe] = set()
        self.delivered = 0

    def set(self, spec: LinkSpec, rate: float, seed: str) -> None:
        now = self._clock.uptime()
        if self._rate < math.inf:
            scale = self._rate / rate
            self._free_at = max(now, now + (self._free_at - now) * scale)
            for chunk in (chunk for pipe in self.pipes for chunk in pipe.queue if chunk.passed > now):
                chunk.passed = now + (chunk.passed - now) * scale
        self._rate, self._spec = rate, spec
        self._random = random.Random(seed)
        self._packets_until_loss = self._draw_loss()
        for pipe in self.pipes:
            pipe.resize()

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one read: few enough to be smooth, enough to be cheap."""
        return max(PACKET, int(min(_MAX_CHUNK, self._rate / 8 * _CHUNK_SECONDS)))

    @property
    def queue_bytes(self) -> int:
        return max(_MIN_QUEUE, int(min(_MAX_QUEUE, self._rate / 8 * _QUEUE_SECONDS)))

    @property
    def pipe_bytes(self) -> int:
        """Bytes that one connection may have in the queue and on its way."""
        longest = self._spec.delay + self._spec.jitter + (self._spec.recovery if self._spec.loss else 0.0)
        return self.queue_bytes + int(min(self._rate, _UNLIMITED) / 8 * longest)

    def limit_buffer(self, sender: socket.socket) -> None:
        """Bound the kernel's receive buffer, which would be a second, larger queue before the link."""
        if self._rate < math.inf:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.queue_bytes)

    async def room(self) -> None:
        await self._clock.wait(lambda: self._free_at - 8 * self.queue_bytes / self._rate)

    def admit(self, data: bytes, *, reset: bool = False) -> Chunk:
        """Give bytes their place on the link."""
        spec = self._spec
        self._free_at = max(self._free_at, self._clock.uptime()) + 8 * len(data) / self._rate
        delay = spec.delay + (self._random.uniform(-spec.jitter, spec.jitter) if spec.jitter else 0.0)
        self._packets_until_loss -= -(-len(data) // PACKET)
        if self._packets_until_loss < 0:
            self._packets_until_loss = self._draw_loss()
            delay += spec.recovery
        return Chunk(data, self._free_at, delay, reset)

    def _draw_loss(self) -> float:
        """Draw the number of packets before the next one that is lost, geometrically distributed."""
        if not self._spec.loss:
            return math.inf
        return math.floor(math.log(1 - self._random.random()) / math.log(1 - self._spec.loss))


class Pipe:
    """One direction of one emulated connection."""

    back: Pipe

    def __init__(self, source: socket.socket, sink: socket.socket, lane: Lane, clock: Clock) -> None:
        self._source, self._sink, self._lane, self._clock = source, sink, lane, clock
        self.queue: deque[Chunk] = deque()  # in the lane's queue, and on its way
        self._in_flight = 0  # bytes in it
        self._filled, self._space = asyncio.Event(), asyncio.Event()
        self._source_lost = False  # found out while sending to it: the FIN that was read of it is a reset
        self._ended = False

    @contextmanager
    def on_lane(self) -> Iterator[None]:
        self._lane.pipes.add(self)
        try:
            yield
        finally:
            self._lane.pipes.discard(self)

    def resize(self) -> None:
        """Take note that the link's rate was changed."""
        self._space.set()
        self._lane.limit_buffer(self._source)

    async def read(self) -> None:
        """Admit to the lane what the source sends, as fast as the lane takes it, up to and with the end."""
        reset = False
        while True:
            try:
                data = await self._read_chunk()
            except OSError:
                data, reset = b"", True
            self.queue.append(self._lane.admit(data, reset=reset))
            self._in_flight += len(data)
            self._filled.set()
            if not data:
                return
            await asyncio.sleep(0)  # the others' turn, on a link that nothing makes wait

    async def _read_chunk(self) -> bytes:
        while True:
            while self._in_flight >= self._lane.pipe_bytes:
                self._space.clear()
                await self._space.wait()
            async with self._lane.turn:
                await self._lane.room()
                try:
                    return self._source.recv(self._lane.chunk_bytes)
                except BlockingIOError:
                    pass
            await _ready(self._source, write=False)

    async def write(self) -> None:
        """Hands each chunk to the sink when it is due. Raises ConnectionResetError when a reset is."""
        while not self._ended:
            while not self.queue:
                self._filled.clear()
                await self._filled.wait()
            await self._clock.wait(lambda: self.queue[0].passed + self.queue[0].delay)
            chunk = self.queue[0]
            if chunk.reset or (not chunk.data and self._source_lost):
                raise ConnectionResetError
            try:
                if chunk.data:
                    await self._send(chunk.data)
                else:
                    self._sink.shutdown(socket.SHUT_WR)
                    self._ended = True
            except OSError:
                await self._sink_lost()
                return
            self.queue.popleft()
            self._in_flight -= len(chunk.data)
            self._space.set()

    async def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                sent = self._sink.send(rest)
            except BlockingIOError:
                await _ready(self._sink, write=True)
                await self._clock.wait(lambda: 0.0)  # up again, if it was cut meanwhile
                continue
            self._lane.delivered += sent
            rest = rest[sent:]

    async def _sink_lost(self) -> None:
        """The source learns of it after what the sink had sent before, as from a real reset."""
        if self.back._ended:
            lost = self.back._lane.admit(b"")
            await self._clock.wait(lambda: lost.passed + lost.delay)
            raise ConnectionResetError
        self.back._source_lost = True


async def _ready(waited: socket.socket, *, write: bool) -> None:
    """Wait until the socket can be read from, or written to."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    (loop.add_writer if write else loop.add_reader)(waited, wake, ready)
    try:
        await ready
    finally:
        (loop.remove_writer if write else loop.remove_reader)(waited)
