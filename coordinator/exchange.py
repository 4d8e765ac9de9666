"""Serves Stage.Exchange: checks and decodes frames, hands them to the stage's host, encodes the answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc.aio

from protos.v1 import stage_pb2, stage_pb2_grpc
from split.errors import IsthmusError, NotAllowed
from split.host import StageHost
from split.ledger import Traffic
from split.link import Frame, frame_to_proto, kind_of, payload_size
from split.members import Deliver
from split.protocol import Rules
from split.tls import Peer, peer_of


class ExchangeServicer(stage_pb2_grpc.StageServicer):
    """One stream for each device of one job. `allowed` knows which certificate of which device may come in."""

    def __init__(
        self, host: StageHost, rules: Rules, allowed: Callable[[Peer], bool], traffic: Mapping[str, Traffic]
    ) -> None:
        self._host, self._rules, self._allowed, self._traffic = host, rules, allowed, traffic
        self._streams: dict[str, asyncio.Queue[Frame | IsthmusError | None]] = {}

    async def Exchange(
        self, requests: AsyncIterator[stage_pb2.Frame], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[stage_pb2.Frame]:
        peer = peer_of(context.auth_context())
        self._check(peer)
        device = peer.name
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[Frame | IsthmusError | None] = asyncio.Queue()

        def deliver(answer: Frame | IsthmusError) -> None:  # called in the host's thread
            loop.call_soon_threadsafe(answers.put_nowait, answer)

        first = await anext(requests, None)
        if first is None:
            return
        self._check(peer)  # again: it may have been revoked since
        frame = self._rules.decode(first, None)
        self._count(device, "received", first)
        self._streams[device] = answers
        self._host.join(device, frame, deliver)
        reading = asyncio.create_task(self._read(device, first.session, requests, answers, deliver))
        try:
            while (answer := await answers.get()) is not None:
                if isinstance(answer, IsthmusError):
                    raise answer
                message = frame_to_proto(answer, self._rules.job, first.session)
                self._count(device, "sent", message)
                yield message
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            if self._streams.get(device) is answers:
                del self._streams[device]
            self._host.leave(device, deliver)

    async def _read(
        self,
        device: str,
        session: str,
        requests: AsyncIterator[stage_pb2.Frame],
        answers: asyncio.Queue[Frame | IsthmusError | None],
        deliver: Deliver,
    ) -> None:
        """Until the device closes its side, its link breaks, or it sends what was not agreed."""
        last: IsthmusError | None = None
        try:
            async for message in requests:
                frame = self._rules.decode(message, session)
                self._count(device, "received", message)
                await asyncio.wrap_future(self._host.submit(device, frame, deliver))  # then the next is read
        except IsthmusError as error:
            last = error
        finally:
            answers.put_nowait(last)

    def drop(self, device: str) -> None:
        """Ends a device's stream: its certificate does not count any more."""
        if device in self._streams:
            self._streams[device].put_nowait(NotAllowed(f"device {device} was revoked, or enrolled anew"))

    def _check(self, peer: Peer) -> None:
        if peer.role != "device" or not self._allowed(peer):
            raise NotAllowed(f"{peer.role} {peer.name} has no part in job {self._rules.job}, or is revoked")

    def _count(self, device: str, direction: str, message: stage_pb2.Frame) -> None:
        self._traffic[device].crossed(direction, kind_of(message), payload_size(message), message.ByteSize())
