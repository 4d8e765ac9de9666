"""Serves Stage.Exchange: checks and decodes frames, hands them to the stage's host, encodes the answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import grpc.aio

from isthmus.protos.v1 import stage_pb2, stage_pb2_grpc
from isthmus.split.errors import IsthmusError, NotAllowed
from isthmus.split.link.coding import Coder
from isthmus.split.link.protocol import Rules
from isthmus.split.link.session import (
    HELD,
    Frame,
    Host,
    Phase,
    Questions,
    as_known,
    frame_to_proto,
    is_answer,
    kind_and_sizes,
)
from isthmus.split.resources.tcp import Watch
from isthmus.split.resources.traffic import Traffic
from isthmus.split.tls import Peer, peer_of

_WAITING = 8  # answers that a device may have waiting for it, beside those that gRPC has


class ExchangeServicer(stage_pb2_grpc.StageServicer):
    """One stream for each device of one job. `allowed` knows which certificate of which device may come in."""

    def __init__(
        self, host: Host, rules: Rules, allowed: Callable[[Peer], bool], traffic: Mapping[str, Traffic]
    ) -> None:
        self._host, self._rules, self._allowed, self._traffic = host, rules, allowed, traffic
        self._streams: dict[str, _Stream] = {}

    async def Exchange(
        self, requests: AsyncIterator[stage_pb2.Frame], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[stage_pb2.Frame]:
        peer = peer_of(context.auth_context())
        self._check(peer)
        stream = _Stream(self._host, self._rules, peer.name, self._traffic[peer.name], _address(context.peer()))
        first = await anext(requests, None)
        while first is not None and first.phase == Phase.PROBE:
            yield stream.probed(self._rules.decode(stream.received(first), None, stream.coder), first.session)
            first = await anext(requests, None)
        if first is None:
            return
        self._check(peer)  # again: it may have been revoked since
        stream.open(self._rules.decode(stream.received(first), None, stream.coder), first.session)
        self._streams[peer.name] = stream
        reading = asyncio.create_task(stream.read(requests))
        try:
            async for message in stream.answers():
                yield message
        finally:
            if self._streams.get(peer.name) is stream:
                del self._streams[peer.name]
            stream.close()  # first of all: the others wait for this device until the host knows
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    def drop(self, device: str) -> None:
        """Ends a device's stream: its certificate does not count any more."""
        if device in self._streams:
            self._streams[device].end(NotAllowed(f"device {device} was revoked, or enrolled anew"))

    def _check(self, peer: Peer) -> None:
        if peer.role != "device" or not self._allowed(peer):
            raise NotAllowed(f"{peer.role} {peer.name} has no part in job {self._rules.job}, or is revoked")


class _Stream:
    """One device's stream. Frames are decoded and encoded in threads: the loop has other devices to serve."""

    def __init__(self, host: Host, rules: Rules, device: str, traffic: Traffic, address: str) -> None:
        adapter, layout = host.adapter_shapes(device), host.layout_for(device)
        rules = rules if adapter is None else replace(rules, adapter=adapter)  # () is that of a device of rank 0
        rules = rules if layout is None else replace(rules, layout=layout)
        self._host, self._rules, self._device = host, rules, device
        self._traffic = traffic
        self._wire = Watch(traffic.connections, peer=address)
        self._ledger = host.ledger
        self.coder = Coder(rules.terms(), self._ledger)
        self._session = ""
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[Frame | IsthmusError | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._deliver = self._take  # one object: it names this stream to the host
        self._questions = Questions()

    def open(self, frame: Frame, session: str) -> None:
        self._session = session
        if frame.open is not None:
            self.coder = Coder(self._rules.terms(max(1, frame.open.samples)), self._ledger)
        self._host.join(self._device, frame, self._deliver)

    async def read(self, requests: AsyncIterator[stage_pb2.Frame]) -> None:
        """Until the device closes its side, its link breaks, or it sends what was not agreed."""
        last: IsthmusError | None = None
        try:
            async for message in requests:
                self.received(message)
                frame = await asyncio.to_thread(self._rules.decode, message, self._session, self.coder)
                if frame.phase == Phase.PROBE:
                    self._answers.put_nowait(frame)
                else:
                    await asyncio.wrap_future(self._host.submit(self._device, frame, self._deliver))
                while self._answers.qsize() >= _WAITING:  # it does not take its answers: nothing more is read from it
                    self._room.clear()
                    await self._room.wait()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a bug or no memory ends this stream, not the others
            last = as_known(error, "decoding")
        finally:
            self.end(last)

    async def answers(self) -> AsyncIterator[stage_pb2.Frame]:
        while (answer := await self._answers.get()) is not None:
            self._room.set()
            if isinstance(answer, IsthmusError):
                raise answer
            if answer.phase == Phase.PROBE:
                yield self.probed(answer, self._session)
                continue
            message = await asyncio.to_thread(self._encode, answer)
            self._traffic.crossed("sent", *kind_and_sizes(message))
            self._wire.look(now=answer.phase == Phase.CLOSE)  # afterwards the connection is gone
            yield message

    def received(self, message: stage_pb2.Frame) -> stage_pb2.Frame:
        kind, codec, payload, total = kind_and_sizes(message)
        known = {"", "none", *self.coder.plan.codecs.values()}
        self._traffic.crossed("received", kind, codec if codec in known else "unknown", payload, total)
        if message.phase != Phase.PROBE:
            self._questions.asked(message)
        return message

    def probed(self, frame: Frame, session: str) -> stage_pb2.Frame:
        """The answer to a PROBE: as many bytes as were asked for, which nobody on the way can shrink."""
        assert frame.probe is not None
        filling = os.urandom(frame.probe.answer_bytes)
        message = stage_pb2.Frame(
            job=self._rules.job, session=session, phase=Phase.PROBE, step=frame.step, probe={"filling": filling}
        )
        self._traffic.crossed("sent", *kind_and_sizes(message))
        return message

    def end(self, reason: IsthmusError | None) -> None:
        self._answers.put_nowait(reason)

    def close(self) -> None:
        self._wire.look(now=True)
        self._host.leave(self._device, self._deliver)

    def _take(self, answer: Frame | IsthmusError) -> None:  # called in the host's thread
        if isinstance(answer, Frame) and is_answer(answer):
            place = stage_pb2.Frame(phase=answer.phase, step=answer.step, micro_batch=answer.micro_batch)
            held, _ = self._questions.answered(place)
            answer = replace(answer, values={**answer.values, HELD: held})
        self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)

    def _encode(self, answer: Frame) -> stage_pb2.Frame:
        rules = self._rules
        message = frame_to_proto(
            answer, rules.job, self._session, self.coder, rules.config.devices.labels, upward=False
        )
        if answer.plan is not None:
            self.coder.use(answer.plan)
        if answer.shape is not None:
            adapter = self._host.adapter_shapes(self._device) or ()
            self._rules = replace(self._rules, adapter=adapter)
            self.coder.reshape(adapter)
        return message


def _address(peer: str) -> str:
    """gRPC's `ipv4:127.0.0.1:4711` or `ipv6:%5B::1%5D:4711` -> 127.0.0.1:4711 or ::1:4711."""
    return unquote(peer).partition(":")[2].replace("[", "").replace("]", "").removeprefix("::ffff:")
