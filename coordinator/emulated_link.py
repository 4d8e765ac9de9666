"""An emulated network link, for tests, benchmarks and the demo: a TCP proxy with a rate, delay, jitter, loss and cuts.

All connections share one bottleneck in each direction: a short queue, served in the order of arrival at the link's
rate, then a delay line. A full queue is not read into, so a slow link stops the writer. It is a model of the path and
not of TCP: congestion windows, headers and acknowledgements are not in it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn

from split.errors import BadRequest, IsthmusError, LinkLost, WrongState
from split.tls import join_address

log = logging.getLogger(__name__)

Address = tuple[str, int]
Pair = tuple[Address, Address]  # where to listen (port 0: any free one), and the target

PACKET = 1448  # payload of a TCP segment on Ethernet, in bytes
_MIN_QUEUE, _MAX_QUEUE, _QUEUE_SECONDS = 64 * 1024, 8 * 1024 * 1024, 0.05
_MAX_CHUNK, _CHUNK_SECONDS = 256 * 1024, 0.002
_MIN_RECOVERY = 0.2  # Linux waits no shorter for an acknowledgement before it sends again
_UNLIMITED = 10e9  # bits per second by which the delay line of an unlimited link is bounded
_EARLY = 0.0005  # epoll wakes up to 1 ms late: aiming half of that early, errors are as often early as late
_START_SECONDS = _STOP_SECONDS = 30.0

_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Cut:
    """The link is down from `at` on for `seconds`, both in seconds, `at` since the link's start.

    Connections hang and go on afterwards, new ones wait; with `reset` they are broken, and new ones refused.
    """

    at: float
    seconds: float
    reset: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.at < math.inf and 0 < self.seconds < math.inf):
            raise BadRequest(f"a cut at {self.at:g} s for {self.seconds:g} s: give at of 0 or more, for above 0")

    @classmethod
    def parse(cls, text: str) -> Cut:
        """`at=30s,for=5s` or `at=30s,for=5s,reset`. Raises BadRequest."""
        words = [word.strip() for word in text.split(",")]
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        if set(fields) != {"at", "for"} or len(words) - 2 != words.count("reset") or len(words) > 3:
            raise BadRequest(f"cut {text!r} is not at=TIME,for=TIME or at=TIME,for=TIME,reset, such as at=30s,for=5s")
        return cls(parse_time(fields["at"]), parse_time(fields["for"]), "reset" in words)


@dataclass(frozen=True)
class LinkSpec:
    """What a link is like. `up` is from the side that connects to the target.

    A proxy cannot lose bytes. A lost packet (of 1448 bytes) is what TCP makes of it: it, and what follows on its
    connection, arrive later by the wait for a retransmission, max(200 ms, one round trip). Loss therefore costs
    time, not rate.
    """

    up_rate: float = math.inf  # bits of TCP payload per second
    down_rate: float = math.inf
    delay: float = 0.0  # seconds one way
    jitter: float = 0.0  # seconds; the delay is uniform in delay ± jitter, the order of bytes is kept
    loss: float = 0.0  # share of packets
    cuts: tuple[Cut, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.up_rate > 0 and self.down_rate > 0):
            raise BadRequest("a link's rate has to be above 0: give one such as 20mbit, or unlimited")
        if not (0 <= self.delay < math.inf and 0 <= self.jitter <= self.delay):
            raise BadRequest(
                f"delay {self.delay:g} s, jitter {self.jitter:g} s: neither may be below 0, nor jitter above the delay"
            )
        if not 0 <= self.loss < 1:
            raise BadRequest(f"loss {self.loss:g} is not a share of packets below 1: give one such as 1% or 0.01")
        cuts = sorted(self.cuts, key=lambda cut: cut.at)
        for one, following in itertools.pairwise(cuts):
            if one.at + one.seconds > following.at:
                raise BadRequest(f"two cuts overlap at {following.at:g} s: join them, or move one")
        object.__setattr__(self, "cuts", tuple(cuts))

    @classmethod
    def parse_short(cls, text: str) -> LinkSpec:
        """`20mbit,40ms`: the rate both ways and the round trip, half of it each way. A rate alone will do."""
        rate, _, round_trip = text.partition(",")
        bits = parse_rate(rate)
        return cls(up_rate=bits, down_rate=bits, delay=parse_time(round_trip or "0s") / 2)

    @property
    def recovery(self) -> float:
        """Seconds by which a lost packet comes later."""
        return max(_MIN_RECOVERY, 2 * self.delay)


def parse_rate(text: str) -> float:
    """`20mbit` -> 20e6 bits per second; `unlimited` -> inf. Raises BadRequest."""
    if text.strip() == "unlimited":
        return math.inf
    return _parse(text, _RATES, "a rate above 0 such as 20mbit, 100kbit, 1gbit or unlimited")


def parse_time(text: str) -> float:
    """`20ms` -> 0.02 seconds. Raises BadRequest."""
    return _parse(text, _TIMES, "a time such as 20ms, 0.5s or 100us")


def parse_share(text: str) -> float:
    """`1%` or `0.01` -> 0.01. Raises BadRequest."""
    return _parse(text, {"%": 0.01, "": 1.0}, "a share of packets such as 1% or 0.01")


def _parse(text: str, units: dict[str, float], what: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([a-z%]*)", text.strip(), re.ASCII)
    if match is None or match[2] not in units:
        raise BadRequest(f"{text!r} is not {what}")
    return float(match[1]) * units[match[2]]


class EmulatedLink:
    """A link in this event loop. Opening a connection costs one round trip, as a TCP handshake does."""

    def __init__(self, spec: LinkSpec) -> None:
        self._spec = spec
        self._pairs: list[Pair] = []
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._background: asyncio.Task[None] | None = None
        self._clock = _Clock(spec.cuts)
        self._up, self._down = _Lane(self._clock), _Lane(self._clock)
        self.set(spec)

    async def start(self, pairs: Sequence[Pair]) -> list[Address]:
        """Listens for each pair; returns the bound addresses. Raises WrongState if a port is taken."""
        self._pairs = list(pairs)
        try:
            self._bind()
            self._listen()
        except IsthmusError:
            await self._stop_listening()
            raise
        self._clock.start()
        bound: list[Address] = [listener.getsockname()[:2] for listener in self._listeners]
        self._pairs = [(address, target) for address, (_, target) in zip(bound, pairs, strict=True)]
        self._background = asyncio.create_task(self._follow_cuts())
        return bound

    async def stop(self) -> None:
        """Stops listening and breaks what is open."""
        if self._background is not None:
            await _cancel([self._background])
        await self._stop_listening()
        await _cancel(self._connections)

    def set(self, spec: LinkSpec) -> None:
        """Changes the link from now on. Cuts count from its start (see `elapsed`); draws start anew from the seed.

        What waits before the bottleneck leaves it at the new rate; what is on its way keeps its delay.
        """
        self._spec = spec
        self._up.set(spec, spec.up_rate, f"{spec.seed} up")
        self._down.set(spec, spec.down_rate, f"{spec.seed} down")
        self._clock.set(spec.cuts)
        for listener in self._listeners:
            self._up.limit_buffer(listener)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock.elapsed()

    @property
    def bytes_up(self) -> int:
        """Bytes that have arrived at the targets."""
        return self._up.delivered

    @property
    def bytes_down(self) -> int:
        """Bytes that have arrived back at those who connected."""
        return self._down.delivered

    def _bind(self) -> None:
        for address, _ in self._pairs[len(self._listeners) :]:
            self._listeners.append(_bound(address, self._up))

    def _listen(self) -> None:
        for listener, (address, _) in zip(self._listeners, self._pairs, strict=True):
            try:
                listener.listen(128)
            except OSError as error:
                _cannot_listen(address, error)
        for listener, (_, target) in zip(self._listeners, self._pairs, strict=True):
            self._accepting.append(asyncio.create_task(self._accept(listener, target)))

    async def _stop_listening(self) -> None:
        await _cancel(self._accepting)
        self._accepting.clear()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    async def _follow_cuts(self) -> None:
        while True:
            cut = self._clock.cut_now()
            resetting = cut is not None and cut.reset
            try:
                if resetting and self._accepting:
                    await self._stop_listening()
                    try:
                        self._bind()  # bound it refuses connections, and nobody else gets the port
                    finally:
                        await _cancel(self._connections)
                elif not resetting and not self._accepting:
                    self._bind()
                    self._listen()
            except IsthmusError as error:
                log.warning("the link cannot listen again yet: %s", error)
                await asyncio.sleep(0.1)
                continue
            await self._clock.pause_until(self._clock.next_edge())

    async def _accept(self, listener: socket.socket, target: Address) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                near, _ = await loop.sock_accept(listener)
            except OSError as error:  # no more file descriptors, say
                log.warning("the link cannot accept a connection: %s", error)
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._carry(near, target))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _carry(self, near: socket.socket, target: Address) -> None:
        """One connection, from its handshake until both directions have ended or it breaks."""
        sockets, ended = [near], False
        try:
            asked = self._clock.uptime()
            await self._clock.wait(lambda: asked + 2 * self._spec.delay)
            try:
                far = await _connect(target, self._down)
            except OSError as error:
                log.warning("the link's target %s:%d cannot be reached: %s", *target, error.strerror or error)
                return
            sockets.append(far)
            for one in sockets:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            up, down = _Pipe(near, far, self._up, self._clock), _Pipe(far, near, self._down, self._clock)
            up.back, down.back = down, up
            with up.on_lane(), down.on_lane():
                async with asyncio.TaskGroup() as group:
                    for pipe in (up, down):
                        group.create_task(pipe.read())
                        group.create_task(pipe.write())
            ended = True
        except* ConnectionError:
            pass
        finally:
            for one in sockets:
                if not ended:  # a reset instead of a FIN
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.close()


class _Clock:
    """Seconds for which the link has been up. They stand still during a cut: what it holds up goes on after it."""

    def __init__(self, cuts: tuple[Cut, ...]) -> None:
        self._cuts = cuts
        self._start = self._since = time.monotonic()  # which is the event loop's time too
        self._uptime_since = 0.0
        self._sleepers: set[asyncio.Future[None]] = set()

    def start(self) -> None:
        self._start = self._since = time.monotonic()
        self._uptime_since = 0.0

    def set(self, cuts: tuple[Cut, ...]) -> None:
        self._uptime_since, self._since = self.uptime(), time.monotonic()
        self._cuts = cuts
        for sleeper in self._sleepers:
            _wake(sleeper)

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def uptime(self) -> float:
        now = time.monotonic()
        down = sum(min(end, now) - begin for begin, end in self._spans() if begin < now)
        return self._uptime_since + now - self._since - down

    def cut_now(self) -> Cut | None:
        now = self.elapsed()
        return next((cut for cut in self._cuts if cut.at <= now < cut.at + cut.seconds), None)

    def next_edge(self) -> float:
        """The event loop's time at which a cut begins or ends next."""
        edges = (self._start + edge for cut in self._cuts for edge in (cut.at, cut.at + cut.seconds))
        return min((edge for edge in edges if edge > time.monotonic()), default=math.inf)

    async def wait(self, due: Callable[[], float]) -> None:
        """Until that uptime, and the link is up. `due` is asked again whenever the link was changed."""
        while True:
            now, until = time.monotonic(), self._when(due())
            if (cut := self.cut_now()) is not None:
                await self.pause_until(max(until, self._start + cut.at + cut.seconds))
            elif until > now + _EARLY:
                await self.pause_until(until - _EARLY)
            else:
                return

    async def pause_until(self, moment: float) -> None:
        """Until that time of the event loop, or a change of the link."""
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        timer = loop.call_at(moment, _wake, sleeper) if moment < math.inf else None
        self._sleepers.add(sleeper)
        try:
            await sleeper
        finally:
            self._sleepers.discard(sleeper)
            if timer is not None:
                timer.cancel()

    def _when(self, uptime: float) -> float:
        moment = self._since + uptime - self._uptime_since
        for begin, end in self._spans():
            if begin < moment:
                moment += end - begin
        return moment

    def _spans(self) -> Iterator[tuple[float, float]]:
        """The cuts after the last change of the link, in the event loop's time."""
        for cut in self._cuts:
            begin, end = self._start + cut.at, self._start + cut.at + cut.seconds
            if end > self._since:
                yield max(begin, self._since), end


@dataclass(slots=True)
class _Chunk:
    """Bytes on the link; none: the end of a direction, by a FIN or a reset. Times in seconds of uptime."""

    data: bytes
    passed: float  # when its last bit has passed the bottleneck
    delay: float  # from there to the other end
    reset: bool = False


class _Lane:
    """One direction of the link: the bottleneck, on a virtual clock, so that late wake-ups do not add up."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._free_at = 0.0  # uptime at which all that was admitted has passed
        self._rate = math.inf
        self.turn = asyncio.Lock()  # first come, first served: connections take turns, a chunk each
        self.pipes: set[_Pipe] = set()
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
        """Of one read: small enough to be smooth, large enough to be cheap."""
        return max(PACKET, int(min(_MAX_CHUNK, self._rate / 8 * _CHUNK_SECONDS)))

    @property
    def queue_bytes(self) -> int:
        return max(_MIN_QUEUE, int(min(_MAX_QUEUE, self._rate / 8 * _QUEUE_SECONDS)))

    @property
    def pipe_bytes(self) -> int:
        """What one connection may have in the queue and on its way."""
        longest = self._spec.delay + self._spec.jitter + (self._spec.recovery if self._spec.loss else 0.0)
        return self.queue_bytes + int(min(self._rate, _UNLIMITED) / 8 * longest)

    def limit_buffer(self, sender: socket.socket) -> None:
        """The kernel's own choice of a receive buffer would be a second, larger queue before the link."""
        if self._rate < math.inf:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.queue_bytes)

    async def room(self) -> None:
        await self._clock.wait(lambda: self._free_at - 8 * self.queue_bytes / self._rate)

    def admit(self, data: bytes, *, reset: bool = False) -> _Chunk:
        """Gives the bytes their place on the link."""
        spec = self._spec
        self._free_at = max(self._free_at, self._clock.uptime()) + 8 * len(data) / self._rate
        delay = spec.delay + (self._random.uniform(-spec.jitter, spec.jitter) if spec.jitter else 0.0)
        self._packets_until_loss -= -(-len(data) // PACKET)
        if self._packets_until_loss < 0:
            self._packets_until_loss = self._draw_loss()
            delay += spec.recovery
        return _Chunk(data, self._free_at, delay, reset)

    def _draw_loss(self) -> float:
        """Packets before the next one that is lost: geometrically distributed."""
        if not self._spec.loss:
            return math.inf
        return math.floor(math.log(1 - self._random.random()) / math.log(1 - self._spec.loss))


class _Pipe:
    """One direction of one connection."""

    back: _Pipe

    def __init__(self, source: socket.socket, sink: socket.socket, lane: _Lane, clock: _Clock) -> None:
        self._source, self._sink, self._lane, self._clock = source, sink, lane, clock
        self.queue: deque[_Chunk] = deque()  # in the lane's queue, and on its way
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
        """After a change of the link's rate."""
        self._space.set()
        self._lane.limit_buffer(self._source)

    async def read(self) -> None:
        """Admits what the source sends to the lane, as fast as that takes it, up to and with the end."""
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


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels the tasks and waits for their end."""
    waited = list(tasks)
    for task in waited:
        task.cancel()
    await asyncio.gather(*waited, return_exceptions=True)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


async def _ready(waited: socket.socket, *, write: bool) -> None:
    """Until the socket can be read from, or written to."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    (loop.add_writer if write else loop.add_reader)(waited, _wake, ready)
    try:
        await ready
    finally:
        (loop.remove_writer if write else loop.remove_reader)(waited)


def _bound(address: Address, up: _Lane) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        _cannot_listen(address, error)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        up.limit_buffer(listener)  # inherited by what it accepts
        listener.bind(where)
    except OSError as error:
        listener.close()
        _cannot_listen(address, error)
    return listener


def _cannot_listen(address: Address, error: OSError) -> NoReturn:
    raise WrongState(
        f"the link cannot listen on {address[0]}:{address[1]} ({error.strerror or error}): "
        "choose another --listen address; port 0 takes any free one"
    ) from None


async def _connect(target: Address, down: _Lane) -> socket.socket:
    """A connection to the first of the host's addresses that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    failed = OSError("no such host")
    for family, kind, protocol, _, where in await loop.getaddrinfo(*target, type=socket.SOCK_STREAM):
        far = socket.socket(family, kind, protocol)
        try:
            far.setblocking(False)
            down.limit_buffer(far)
            await loop.sock_connect(far, where)
        except OSError as error:
            far.close()
            failed = error
        except asyncio.CancelledError:
            far.close()
            raise
        else:
            return far
    raise failed


class LinkThread:
    """A link on an event loop of its own in a thread, for synchronous callers. A context manager."""

    def __init__(self, spec: LinkSpec, pairs: Sequence[Pair]) -> None:
        self.addresses: list[Address] = []
        self._link, self._pairs = EmulatedLink(spec), pairs
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="emulated-link", daemon=True)

    def __enter__(self) -> LinkThread:
        self._thread.start()
        try:
            starting = asyncio.run_coroutine_threadsafe(self._link.start(self._pairs), self._loop)
            self.addresses = starting.result(_START_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._link.stop(), self._loop).result(_STOP_SECONDS)
        self._end()

    def set(self, spec: LinkSpec) -> None:
        """Changes the link, and returns when it is changed."""

        async def change() -> None:
            self._link.set(spec)

        asyncio.run_coroutine_threadsafe(change(), self._loop).result(_START_SECONDS)

    @property
    def elapsed(self) -> float:
        return self._link.elapsed

    @property
    def bytes_up(self) -> int:
        return self._link.bytes_up

    @property
    def bytes_down(self) -> int:
        return self._link.bytes_down

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        self._loop.close()


@dataclass
class LinkProcess:
    """What link_process() gives; the totals are there once it has ended."""

    addresses: list[Address]
    pid: int
    bytes_up: int = 0
    bytes_down: int = 0


@contextmanager
def link_process(spec: LinkSpec, pairs: Sequence[Pair]) -> Iterator[LinkProcess]:
    """`isthmus link` as a process of its own, so that it and what is measured do not share an interpreter."""
    command = [sys.executable, "-m", "coordinator.cli.link", "--json", *_arguments(spec, pairs)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    link: LinkProcess | None = None
    try:
        readable, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
        line = process.stdout.readline() if readable else ""
        if not line:
            raise LinkLost("the link's process did not start; what it printed on standard error says why")
        link = LinkProcess([(host, port) for host, port in json.loads(line)["listen"]], process.pid)
        yield link
    finally:
        process.terminate()
        try:
            rest, _ = process.communicate(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            rest, _ = process.communicate()
        if link is not None and rest:
            totals = json.loads(rest.splitlines()[-1])
            link.bytes_up, link.bytes_down = totals["bytes_up"], totals["bytes_down"]


def _arguments(spec: LinkSpec, pairs: Sequence[Pair]) -> list[str]:
    """The options of `isthmus link` that mean this."""
    arguments = [f"--delay={spec.delay:.9f}s", f"--jitter={spec.jitter:.9f}s", f"--loss={spec.loss:.12f}"]
    for name, rate in (("up", spec.up_rate), ("down", spec.down_rate)):
        arguments.append(f"--{name}-rate={'unlimited' if rate == math.inf else f'{rate:.3f}bit'}")
    arguments += [f"--cut=at={cut.at:.9f}s,for={cut.seconds:.9f}s{',reset' * cut.reset}" for cut in spec.cuts]
    for listen, target in pairs:
        for name, (host, port) in (("listen", listen), ("to", target)):
            arguments.append(f"--{name}={join_address(host, port)}")
    return [*arguments, f"--seed={spec.seed}"]
