"""The device's end of a session: one interface to the stage, whether that is in this process or across the network."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import grpc
import torch

from isthmus.protos.v1 import stage_pb2, stage_pb2_grpc
from isthmus.split.errors import BadFrame, IsthmusError, LinkLost
from isthmus.split.link.coding import Coder, Terms
from isthmus.split.link.frames import HELD, UNDER_WAY, Frame, Phase, as_known
from isthmus.split.link.profile import LinkProfile, probe
from isthmus.split.link.session import SessionEnd
from isthmus.split.link.stage import Host
from isthmus.split.link.transport import GrpcTransport, MemoryTransport, Transport
from isthmus.split.resources.ledger import Ledger
from isthmus.split.resources.tcp import Watch

_QUEUED = 4  # most frames that wait to be sent


class Link(Protocol):
    """A device's connection to its stage: frames out and frames in, in order.

    `receive` raises the other side's errors; `send` may wait.
    """

    coder: Coder

    def send(self, frame: Frame) -> None: ...
    def receive(self) -> Frame: ...
    def close(self) -> None: ...

    def measure(self) -> LinkProfile:
        """Measures what the link can do now; call it only when nothing is under way."""


class SessionLink:
    """A link over a transport.

    Frames are encoded in one thread as the transport takes them, and decoded in another as they come, so that both go
    on while the trainer computes. At most _QUEUED frames wait to be sent; then a slow link stops the trainer. The
    received frames that wait to be taken are bounded by the plan's depth, because the trainer asks for no more.
    """

    def __init__(
        self,
        transport: Transport[stage_pb2.Frame, stage_pb2.Frame],
        session: SessionEnd,
        ledger: Ledger,
        *,
        wire: Watch,
        timeout: float | None = None,
    ) -> None:
        """wire: counts the bytes on the network."""
        self.coder = session.coder
        self._transport, self._session, self._ledger, self._wire = transport, session, ledger, wire
        self._timeout = timeout
        self._over = threading.Event()  # nothing is sent any more: closed here, or ended by the other side
        self._outbox: queue.Queue[Frame | None] = queue.Queue(_QUEUED)
        self._inbox: queue.SimpleQueue[Frame | IsthmusError] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"link-{session.job}", daemon=True).start()

    def send(self, frame: Frame) -> None:
        if frame.phase == Phase.REPORT:
            self._wire.look(now=True)
        while not self._over.is_set():  # once it is over, `receive` tells why
            try:
                self._outbox.put(frame, timeout=0.2)
                return
            except queue.Full:
                continue

    def receive(self) -> Frame:
        start = time.perf_counter()
        try:
            answer = self._inbox.get(timeout=self._timeout)
        except queue.Empty:
            raise LinkLost(f"the stage has not answered for {self._timeout:.0f} s") from None
        waited = time.perf_counter() - start
        self._wire.look()
        if isinstance(answer, IsthmusError):
            self._ledger.waited(waited, waited)
            raise answer
        self._ledger.waited(waited, answer.values.get(UNDER_WAY, waited) - answer.values.get(HELD, 0.0))
        return answer

    def close(self) -> None:
        self._over.set()
        self._transport.close()
        with contextlib.suppress(queue.Empty):  # what still waits is not sent any more
            while True:
                self._outbox.get_nowait()
        with contextlib.suppress(queue.Full):  # if it is full again, what is in it ends the transport's thread too
            self._outbox.put_nowait(None)

    def measure(self) -> LinkProfile:
        return probe(self._exchange_probe)

    def _exchange_probe(self, up: int, down: int) -> float:
        """Measures the seconds from sending `up` bytes until `down` bytes have come."""
        filling = torch.randint(0, 256, (up,), dtype=torch.uint8).numpy().tobytes()  # random: it cannot shrink
        start = time.perf_counter()
        self.send(Frame(Phase.PROBE, probe=stage_pb2.Probe(filling=filling, answer_bytes=down)))
        answer = self.receive()
        if answer.probe is None or len(answer.probe.filling) != down:
            raise BadFrame("the coordinator did not answer a PROBE with what was asked for")
        return time.perf_counter() - start

    def _messages(self) -> Iterator[stage_pb2.Frame]:
        """Messages for the transport, which asks for the next one when the last is on its way."""
        while (frame := self._outbox.get()) is not None and not self._over.is_set():
            try:
                message = self._session.encode(frame)
            except Exception as error:  # noqa: BLE001  # the error has to reach the trainer, which waits for an answer
                self._inbox.put(as_known(error, "encoding"))
                return
            yield message

    def _read(self) -> None:
        try:
            for message in self._transport.exchange(self._messages()):
                self._inbox.put(self._session.decode(message))
            ended: IsthmusError = LinkLost("the coordinator closed the stream of this job")
        except Exception as error:  # noqa: BLE001  # the trainer has to learn of it, whatever it is
            ended = as_known(error, "decoding")
        self.close()
        self._inbox.put(ended)


class LocalLink(SessionLink):
    """A link to a stage in this process."""

    def __init__(
        self,
        host: Host,
        device: str,
        terms: Terms,
        ledger: Ledger,
        *,
        profile: LinkProfile = LinkProfile(),
        timeout: float = 600.0,
    ) -> None:
        """profile: the link that this one stands for, which `measure` returns."""
        self._profile = profile
        session = SessionEnd("local", device, terms, ledger, ledger.traffic, device=True)
        transport = MemoryTransport(host, device, session.job, terms)
        super().__init__(transport, session, ledger, wire=Watch(ledger.traffic.connections), timeout=timeout)

    def measure(self) -> LinkProfile:
        return self._profile


class GrpcLink(SessionLink):
    """A link over one stream of Stage.Exchange, opened by the device."""

    def __init__(
        self, channel: grpc.Channel, job: str, session: str, terms: Terms, ledger: Ledger, *, port: int = 0
    ) -> None:
        """channel: a channel with the device's credentials."""
        method = stage_pb2_grpc.StageStub(channel).Exchange
        super().__init__(
            GrpcTransport(method, "this job's stage"),
            SessionEnd(job, session, terms, ledger, ledger.traffic, device=True),
            ledger,
            wire=Watch(ledger.traffic.connections, port=port),
        )
