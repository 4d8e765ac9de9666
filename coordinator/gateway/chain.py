"""Serves isthmus.v1.Chain: lets in who may hold blocks or use them, and hands what they send to the spans."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

import grpc.aio
from transformers import PreTrainedConfig

from isthmus.coordinator.gateway.guests import LAST_WORD, Guests
from isthmus.coordinator.gateway.ledger import ServedLedger, count
from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.protos.v1 import chain_pb2_grpc
from isthmus.protos.v1.events_pb2 import Event, HolderJoined, HolderLeft
from isthmus.split.codecs import parse
from isthmus.split.errors import BadFrame, IsthmusError, LinkLost, NotAllowed, WrongState
from isthmus.split.inference.chain import Span
from isthmus.split.inference.remote import RemoteHolder
from isthmus.split.inference.serving import CLOUD, ServingConfig
from isthmus.split.job.events import Tell
from isthmus.split.printable import printable
from isthmus.split.resources.traffic import Traffic
from isthmus.split.tls import Peer, peer_of

_HELLO = 30.0  # seconds in which a holder has to say what it has, and a user what it wants
Message = TypeVar("Message")
Counted = TypeVar("Counted", pb.FromHolder, pb.ToHolder)


class ChainServicer(chain_pb2_grpc.ChainServicer):
    """config: of the whole model. digests: by span, of its tensors; user_digests: as in `Guests`. allowed: whether this
    certificate counts."""

    def __init__(
        self,
        job: str,
        serving: ServingConfig,
        spans: Sequence[Span],
        config: PreTrainedConfig,
        digests: Mapping[str, str],
        user_digests: Mapping[int, str],
        allowed: Callable[[Peer], bool],
        tell: Tell,
    ) -> None:
        self._job, self._serving, self._hidden_size = job, serving, int(config.hidden_size)
        self._spans = {str(span): span for span in spans}
        self._digests, self._allowed, self._tell = digests, allowed, tell
        self._open: dict[str, dict[RemoteHolder, asyncio.Task[Any] | None]] = {}  # by who holds; with what serves it
        self._closed: IsthmusError | None = None
        self.guests = Guests(job, serving, spans, self._hidden_size, user_digests)
        self.ledger = ServedLedger(config)

    async def Hold(
        self, requests: AsyncIterator[pb.FromHolder], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ToHolder]:
        peer = peer_of(context.auth_context())
        first = await _first(requests)
        self._check(peer)
        if first is None:
            return
        span = self._span_of(peer, first)
        name = f"{CLOUD}-{first.hello.process}" if peer.role == "stage" else peer.name
        holder = RemoteHolder(name, self._serving.chain.codec, secrets.randbits(48), self._hidden_size)
        holder.tells_spent = first.hello.tells_spent
        mine = self._open.setdefault(peer.name, {})
        if peer.role == "device":  # which has dialled again
            for earlier in list(mine):
                _end(earlier, mine[earlier], LinkLost("it has come by another stream"))
        mine[holder] = asyncio.current_task()
        traffic = self.ledger.joined(str(span), holder, _device(peer), first.hello)
        count(traffic, "received", first)
        reading = asyncio.create_task(_read(holder, _counted(requests, traffic)))
        await span.add(holder, self._rank(peer, span))
        joined = HolderJoined(span=str(span), holder=name, runtime=printable(first.hello.runtime, 32))
        self._tell(Event(device=_device(peer), holder_joined=joined))
        try:
            async for message in holder.messages():
                count(traffic, "sent", message)
                yield message
            if reading.done():
                reading.result()  # raises what ended it
        finally:
            holder.end(LinkLost("the stream has ended"))
            span.remove(holder)
            self.ledger.left(str(span), holder)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, IsthmusError):
                await reading
            self._open[peer.name].pop(holder, None)
            self._tell(Event(device=_device(peer), holder_left=HolderLeft(span=str(span), holder=name)))

    async def Use(
        self, requests: AsyncIterator[pb.ToHolder], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.FromHolder]:
        peer = peer_of(context.auth_context())
        first = await _first(requests)
        self._check_user(peer)
        if first is None:
            return
        async with self.guests.admitted(_device(peer), first) as guest:
            self._check_user(peer)  # again: it may have waited for an earlier stream's end
            guest.task = asyncio.current_task()
            traffic = self.ledger.guest(_device(peer))
            count(traffic, "received", first)
            reading = asyncio.create_task(guest.read(_counted(requests, traffic)))
            try:
                async for message in guest.messages():
                    count(traffic, "sent", message)
                    yield message
            finally:
                reading.cancel()
            if guest.error is not None:
                raise guest.error

    def drop(self, device: str) -> None:
        """Ends a device's streams: its certificate does not count any more."""
        error = NotAllowed(f"device {device} was revoked, or enrolled anew")
        for holder, task in list(self._open.get(device, {}).items()):
            _end(holder, task, error)
        self.guests.drop(device, error)

    def close(self) -> None:
        """Tells devices that use the chain, and those that dial again, that there is none any more."""
        self._closed = WrongState("the model is not served any more")
        self.guests.drop("", self._closed)

    def _span_of(self, peer: Peer, first: pb.FromHolder) -> Span:
        """Raises BadFrame or NotAllowed for a holder that has not what was asked for."""
        if first.WhichOneof("kind") != "hello":
            raise BadFrame("the first message of a holder has to be its hello")
        hello = first.hello
        name = f"{hello.first}-{hello.last}"
        config = next((one for one in self._serving.spans if str(one) == name), None)
        who = CLOUD if peer.role == "stage" else peer.name
        if hello.job != self._job or config is None or who not in config.holders:
            raise NotAllowed(f"{peer.name} holds no blocks {name} in job {self._job}")
        if hello.digest != self._digests[name]:
            raise BadFrame(f"the tensors of blocks {name} at {peer.name} are not the coordinator's")
        if hello.sequences < self._serving.room or hello.tokens < self._serving.limits.context:
            raise BadFrame(
                f"{peer.name} has room for {hello.sequences} sequences of {hello.tokens} tokens; "
                f"{self._serving.room} of {self._serving.limits.context} are needed"
            )
        missing = parse(self._serving.chain.codec).families - set(hello.codecs)
        if missing:
            raise BadFrame(f"{peer.name} has no codec {sorted(missing)[0]}: bring its isthmus up to date")
        return self._spans[name]

    def _rank(self, peer: Peer, span: Span) -> int:
        """Holders take over in the order in which they were named."""
        config = next(one for one in self._serving.spans if str(one) == str(span))
        return config.holders.index(CLOUD if peer.role == "stage" else peer.name)

    def _check_user(self, peer: Peer) -> None:
        self._check(peer)
        if self._closed is not None:
            raise self._closed

    def _check(self, peer: Peer) -> None:
        if not self._allowed(peer):
            raise NotAllowed(f"{peer.role} {peer.name} has no part in job {self._job}, or is revoked")


async def _first(requests: AsyncIterator[Message]) -> Message | None:
    """What a stream begins with; None if it ends first. Raises BadFrame if nothing comes.

    Read before anything is refused: of a caller whose hello is still on its way gRPC may lose the refusal's words.
    """
    try:
        async with asyncio.timeout(_HELLO):
            return await anext(requests, None)
    except TimeoutError:
        raise BadFrame(f"no hello in {_HELLO:.0f} s") from None


async def _counted(requests: AsyncIterator[Counted], traffic: Traffic) -> AsyncIterator[Counted]:
    async for message in requests:
        count(traffic, "received", message)
        yield message


async def _read(holder: RemoteHolder, requests: AsyncIterator[pb.FromHolder]) -> None:
    try:
        async for message in requests:
            holder.heard(message)
    except asyncio.CancelledError:
        raise
    except IsthmusError as error:
        holder.end(error)
        raise
    except Exception as error:  # noqa: BLE001  # a broken stream, a bug: this holder's alone
        holder.end(LinkLost(f"{type(error).__name__}: {error}"))
        return
    holder.end(LinkLost("it closed its side"))


def _device(peer: Peer) -> str:
    return peer.name if peer.role == "device" else ""


def _end(holder: RemoteHolder, task: asyncio.Task[Any] | None, error: IsthmusError) -> None:
    """And with it the stream, also of one who does not read what it is sent."""
    holder.end(error)
    if task is not None:
        asyncio.get_running_loop().call_later(LAST_WORD, task.cancel)
