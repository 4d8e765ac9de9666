"""The servicer of Stage.Exchange: moves messages between gRPC and the stage's end of each device's session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import unquote

import grpc.aio

from isthmus.protos.v1 import stage_pb2, stage_pb2_grpc
from isthmus.split.errors import IsthmusError, NotAllowed
from isthmus.split.link.coding import Terms
from isthmus.split.link.frames import Frame, Phase, as_known
from isthmus.split.link.stage import Host, StageSession
from isthmus.split.resources.tcp import Watch
from isthmus.split.resources.traffic import Traffic
from isthmus.split.tls import Peer, peer_of

_WAITING = 8  # most answers that wait for a device, beside those that gRPC has


class ExchangeServicer(stage_pb2_grpc.StageServicer):
    """Serves one stream for each device of one job.

    terms: what the job's devices have in common.
    allowed: whether a peer with its certificate may come in.
    traffic: counts each device's bytes, by name.
    """

    def __init__(
        self,
        host: Host,
        job: str,
        terms: Terms,
        allowed: Callable[[Peer], bool],
        traffic: Mapping[str, Traffic],
    ) -> None:
        self._host, self._job, self._terms = host, job, terms
        self._allowed, self._traffic = allowed, traffic
        self._streams: dict[str, _Stream] = {}

    async def Exchange(
        self, requests: AsyncIterator[stage_pb2.Frame], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[stage_pb2.Frame]:
        peer = peer_of(context.auth_context())
        self._check(peer)
        stream = _Stream(
            self._host, self._job, self._terms, peer.name, self._traffic[peer.name], _address(context.peer())
        )
        reading = asyncio.create_task(stream.read(requests, lambda: self._opening(peer, stream)))
        try:
            async for message in stream.answers():
                yield message
        finally:
            if self._streams.get(peer.name) is stream:
                del self._streams[peer.name]
            stream.close()  # first of all, because the others wait for this device until the host knows
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    def drop(self, device: str) -> None:
        """Ends the stream of a device whose certificate does not count any more."""
        if device in self._streams:
            self._streams[device].end(NotAllowed(f"device {device} was revoked, or enrolled anew"))

    def _opening(self, peer: Peer, stream: _Stream) -> None:
        """Checks a device again before its OPEN is taken."""
        self._check(peer)  # it may have been revoked since
        self._streams[peer.name] = stream

    def _check(self, peer: Peer) -> None:
        if peer.role != "device" or not self._allowed(peer):
            raise NotAllowed(f"{peer.role} {peer.name} has no part in job {self._job}, or is revoked")


class _Stream:
    """One device's stream. Frames are decoded and encoded in threads, for the loop has other devices to serve."""

    def __init__(self, host: Host, job: str, terms: Terms, device: str, traffic: Traffic, address: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._session = StageSession(host, device, job, terms, traffic, self._put)
        self._wire = Watch(traffic.connections, peer=address)
        self._answers: asyncio.Queue[Frame | IsthmusError | None] = asyncio.Queue()
        self._room = asyncio.Event()

    async def read(self, requests: AsyncIterator[stage_pb2.Frame], opening: Callable[[], None]) -> None:
        """Reads until the device closes its side, its link breaks, or it sends what was not agreed."""
        last: IsthmusError | None = None
        try:
            async for message in requests:
                if message.phase == Phase.OPEN:
                    opening()
                taken = await asyncio.to_thread(self._session.take, message)
                if taken is not None:
                    await asyncio.wrap_future(taken)
                while self._answers.qsize() >= _WAITING:  # nothing more is read from a device that takes no answers
                    self._room.clear()
                    await self._room.wait()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a bug, or no memory left, ends only this stream
            last = as_known(error, "decoding")
        finally:
            self.end(last)

    async def answers(self) -> AsyncIterator[stage_pb2.Frame]:
        while (answer := await self._answers.get()) is not None:
            self._room.set()
            if isinstance(answer, IsthmusError):
                raise answer
            message = await asyncio.to_thread(self._session.encode, answer)
            self._wire.look(now=answer.phase == Phase.CLOSE)  # afterwards the connection is gone
            yield message

    def end(self, reason: IsthmusError | None) -> None:
        self._answers.put_nowait(reason)

    def close(self) -> None:
        self._wire.look(now=True)
        self._session.close()

    def _put(self, answer: Frame | IsthmusError) -> None:  # in any thread
        self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)


def _address(peer: str) -> str:
    """Turns gRPC's `ipv4:127.0.0.1:4711` or `ipv6:%5B::1%5D:4711` into 127.0.0.1:4711 or ::1:4711."""
    return unquote(peer).partition(":")[2].replace("[", "").replace("]", "").removeprefix("::ffff:")
