"""The emulated link itself: it listens, connects to the targets, and carries each connection's bytes over its lines."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import NoReturn

from isthmus.coordinator.emulation.clock import Clock
from isthmus.coordinator.emulation.line import Lane, Pipe
from isthmus.coordinator.emulation.spec import Address, LinkSpec, Pair
from isthmus.split.errors import IsthmusError, WrongState

log = logging.getLogger(__name__)


class EmulatedLink:
    """A link in this event loop. Opening a connection costs one round trip, as a TCP handshake does."""

    def __init__(self, spec: LinkSpec) -> None:
        self._spec = spec
        self._pairs: list[Pair] = []
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._background: asyncio.Task[None] | None = None
        self._clock = Clock(spec.cuts)
        self._up, self._down = Lane(self._clock), Lane(self._clock)
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
        """Carry one connection, from its handshake until both directions have ended or it breaks."""
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
            up, down = Pipe(near, far, self._up, self._clock), Pipe(far, near, self._down, self._clock)
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


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels the tasks and waits for their end."""
    waited = list(tasks)
    for task in waited:
        task.cancel()
    await asyncio.gather(*waited, return_exceptions=True)


def _bound(address: Address, up: Lane) -> socket.socket:
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


async def _connect(target: Address, down: Lane) -> socket.socket:
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
