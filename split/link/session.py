"""One interface to the stage on the other side, whether it is in this process or across the network."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import grpc
import torch
from torch import Tensor

from isthmus.protos.v1 import stage_pb2, stage_pb2_grpc
from isthmus.split.codecs.packing import pack_bits
from isthmus.split.codecs.wire import encode_tensor
from isthmus.split.errors import BadFrame, IsthmusError, LinkLost
from isthmus.split.job.shapes import Shape
from isthmus.split.job.streams import stream_of
from isthmus.split.link.coding import Coder, Plan, Terms
from isthmus.split.link.ladder import check_agreed
from isthmus.split.link.profile import LinkProfile, probe
from isthmus.split.lora.sites import Layout
from isthmus.split.resources.ledger import Ledger
from isthmus.split.resources.tcp import Watch
from isthmus.split.tls import error_of

log = logging.getLogger(__name__)

Phase = stage_pb2.Phase
HELD = "held_seconds"  # in an answer: how long the stage had the question
ENDS = "ends"  # in STEP: no step of the device follows
INPUT_GRADIENT = "input_gradient"  # in BACKWARD of a site, from the stage: 1 where the device has to answer
_UNDER_WAY = "under_way_seconds"  # beside it, on the device: since the question was sent
_QUEUED = 4  # frames that wait to be sent


@dataclass(frozen=True)
class Frame:
    """A stage_pb2.Frame with its tensors decoded: what both sides compute with. On the wire it is a message.

    encoded: in the place of `tensor` where the stage sends all devices the same bytes. wanted: (rows, sequence) bool,
    the positions whose last hidden states are of use; None: all.
    """

    phase: stage_pb2.Phase
    step: int = 0
    micro_batch: int = 0
    tensor: Tensor | None = None
    encoded: stage_pb2.Tensor | None = None
    labels: Tensor | None = None
    wanted: Tensor | None = None
    values: dict[str, float] = field(default_factory=dict)
    open: stage_pb2.Open | None = None
    agreement: stage_pb2.Agreement | None = None
    plan: Plan | None = None
    measured: stage_pb2.Measured | None = None
    probe: stage_pb2.Probe | None = None
    site: int = 0
    trained: bytes = b""
    applied: bytes = b""
    frozen: stage_pb2.Frozen | None = None
    shape: Shape | None = None


Deliver = Callable[[Frame | IsthmusError], None]  # also names the stream: a device that joins again has another one


class Host(Protocol):
    """What serves the devices of a job; all of it may be called from any thread."""

    ledger: Ledger

    def join(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """A device's OPEN."""

    def submit(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """A later frame. The future is done when it has been taken: who reads a network waits for it."""

    def leave(self, device: str, deliver: Deliver) -> None: ...
    def adapter_shapes(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        """Of the matrices of a device's adapter; None where they are the same for all."""

    def layout_for(self, device: str) -> Layout | None:
        """Where a device's modules are in the server's blocks (DLoRA)."""

    def start_without(self, missing: set[str]) -> None: ...
    def close(self) -> None: ...


class Link(Protocol):
    """Frames out and frames in, in order. Errors of the other side are raised by `receive`; `send` may wait."""

    coder: Coder

    def send(self, frame: Frame) -> None: ...
    def receive(self) -> Frame: ...
    def close(self) -> None: ...

    def measure(self) -> LinkProfile:
        """What the link can do now. Only when nothing is under way."""


class LocalLink:
    """A link to a stage in this process. Tensors pass through the codecs of both ends, as they do on a network."""

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
        """profile: what `measure` says: of the network that this link stands for."""
        self._profile = profile
        self.coder, self._far = Coder(terms, ledger), Coder(terms, Ledger())
        self._host, self._device, self._labels, self._ledger = host, device, terms.config.devices.labels, ledger
        self._timeout = timeout
        self._inbox: queue.SimpleQueue[Frame | IsthmusError] = queue.SimpleQueue()
        self._deliver = self._inbox.put  # one object: it names this link to the host

    def send(self, frame: Frame) -> None:
        frame = self._crossed(frame, upward=True)
        if frame.phase == Phase.OPEN:
            self._host.join(self._device, frame, self._deliver)
        else:
            self._host.submit(self._device, frame, self._deliver)

    def receive(self) -> Frame:
        try:
            answer = self._inbox.get(timeout=self._timeout)
        except queue.Empty:
            raise LinkLost(f"the stage has not answered for {self._timeout:.0f} s") from None
        if isinstance(answer, IsthmusError):
            raise answer
        answer = self._crossed(answer, upward=False)
        if answer.plan is not None:
            self.coder.use(answer.plan)
            self._far.use(answer.plan)
        if answer.shape is not None:
            adapter = self._host.adapter_shapes(self._device) or ()
            self.coder.reshape(adapter)
            self._far.reshape(adapter)
        return answer

    def close(self) -> None:
        self._host.leave(self._device, self._deliver)

    def measure(self) -> LinkProfile:
        return self._profile

    def _crossed(self, frame: Frame, *, upward: bool) -> Frame:
        """The frame as the other side gets it."""
        stream = "" if frame.shape else stream_of(frame.phase, upward, self._labels)
        message = frame.encoded
        if message is None and frame.tensor is not None:
            if not stream or self.coder.plan.codec_of(stream) == "none":
                self._count(frame, upward, "none", frame.tensor.numel() * frame.tensor.element_size())
                return frame
            encoder = self.coder if upward else self._far
            message = encoder.encode(stream, frame.tensor, frame.step, frame.micro_batch, frame.site)
        if message is None:
            return frame
        self._count(frame, upward, message.codec, len(message.payload))
        decoder = self._far if upward else self.coder
        expected = decoder.expected(stream, tuple(message.shape), 2**62)
        tensor = decoder.decode(stream, message, expected, frame.step, frame.micro_batch, frame.site)
        return replace(frame, tensor=tensor, encoded=None)

    def _count(self, frame: Frame, upward: bool, codec: str, size: int) -> None:
        way = "sent" if upward else "received"
        kind = Phase.Name(frame.phase).lower()
        self._ledger.traffic.crossed(way, f"{kind} modules" if frame.site else kind, codec, size, size)


class GrpcLink:
    """A link over one stream of Stage.Exchange. `channel` has the credentials; `session` names this run.

    Frames are encoded as gRPC takes them, in its thread, and decoded as they come, in another, so that both go on while
    the trainer computes. No more than _QUEUED wait to be sent: then a slow link stops the trainer. What has come and
    was not taken yet is bounded by what the trainer has asked for, the plan's depth.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        job: str,
        session: str,
        terms: Terms,
        ledger: Ledger,
        *,
        port: int = 0,
    ) -> None:
        """port: of the stage, for the kernel's count of bytes; 0: they are not counted."""
        self.coder = Coder(terms, ledger)
        self._job, self._session, self._labels, self._ledger = job, session, terms.config.devices.labels, ledger
        self._config = terms.config
        self._wire = Watch(ledger.traffic.connections, port=port)
        self._over = threading.Event()  # nothing is sent any more: closed here, or ended by the other side
        self._questions = Questions()
        self._outbox: queue.Queue[Frame | None] = queue.Queue(_QUEUED)
        self._inbox: queue.SimpleQueue[Frame | IsthmusError] = queue.SimpleQueue()
        self._call = stage_pb2_grpc.StageStub(channel).Exchange(self._messages())
        threading.Thread(target=self._read, name=f"link-{job}", daemon=True).start()

    def send(self, frame: Frame) -> None:
        if frame.phase == Phase.REPORT:
            self._wire.look(now=True)
        while not self._over.is_set():  # else `receive` says why
            try:
                self._outbox.put(frame, timeout=0.2)
                return
            except queue.Full:
                continue

    def receive(self) -> Frame:
        start = time.perf_counter()
        answer = self._inbox.get()
        waited = time.perf_counter() - start
        self._wire.look()
        if isinstance(answer, IsthmusError):
            self._ledger.waited(waited, waited)
            raise answer
        self._ledger.waited(waited, answer.values.get(_UNDER_WAY, waited) - answer.values.get(HELD, 0.0))
        return answer

    def close(self) -> None:
        self._over.set()
        self._call.cancel()
        with contextlib.suppress(queue.Empty):  # what waits is not sent any more
            while True:
                self._outbox.get_nowait()
        with contextlib.suppress(queue.Full):  # a frame that came meanwhile ends gRPC's thread as well
            self._outbox.put_nowait(None)

    def measure(self) -> LinkProfile:
        return probe(self._exchange_probe)

    def _exchange_probe(self, up: int, down: int) -> float:
        """Seconds until `down` bytes have come for `up` bytes."""
        filling = torch.randint(0, 256, (up,), dtype=torch.uint8).numpy().tobytes()  # nobody on the way can shrink it
        start = time.perf_counter()
        self.send(Frame(Phase.PROBE, probe=stage_pb2.Probe(filling=filling, answer_bytes=down)))
        answer = self.receive()
        if answer.phase != Phase.PROBE or answer.probe is None or len(answer.probe.filling) != down:
            raise BadFrame("the coordinator did not answer a PROBE with what was asked for")
        return time.perf_counter() - start

    def _messages(self) -> Iterator[stage_pb2.Frame]:
        """What gRPC sends; it asks for the next one when the last is on its way."""
        while (frame := self._outbox.get()) is not None and not self._over.is_set():
            try:
                message = frame_to_proto(frame, self._job, self._session, self.coder, self._labels, upward=True)
            except Exception as error:  # noqa: BLE001  # it has to reach the trainer, which waits for an answer
                self._inbox.put(as_known(error, "encoding"))
                return
            self._ledger.traffic.crossed("sent", *kind_and_sizes(message))
            self._questions.asked(message)
            yield message

    def _read(self) -> None:
        try:
            for message in self._call:
                self._ledger.traffic.crossed("received", *kind_and_sizes(message))
                self._inbox.put(self._answer(message))
            ended: IsthmusError = LinkLost("the coordinator closed the stream of this job")
        except grpc.RpcError as error:
            ended = error_of(error, "this job's stage")
        except Exception as error:  # noqa: BLE001  # whatever it is, the trainer has to learn of it
            ended = as_known(error, "decoding")
            self._call.cancel()
        self._over.set()
        self._inbox.put(ended)

    def _answer(self, message: stage_pb2.Frame) -> Frame:
        """A frame from the coordinator, whose size gRPC has bounded. The rest of it is checked by who asked."""
        if (message.job, message.session) != (self._job, self._session):
            raise BadFrame("the coordinator sent a frame of another job or session")
        tensor = None
        seconds, shape = self._questions.answered(message) if is_answer(message) else (0.0, ())
        if message.HasField("tensor"):
            stream = stream_of(message.phase, upward=False, labels=self._labels)
            if message.HasField("shape"):  # of another adapter; whoever asked checks it
                stream, shape = "", tuple(message.tensor.shape[:1])
            expected = self.coder.expected(stream, shape, math.prod(shape))
            if message.site:
                evaluating = message.phase == Phase.EVALUATE
                rows = self.coder.batch_size if evaluating else self.coder.rows(message.micro_batch)
                expected = self.coder.expected_at_site(stream, rows)
            place = message.step, message.micro_batch, message.site
            tensor = self.coder.decode(stream, message.tensor, expected, *place)
        plan = None
        if message.HasField("plan"):
            plan = Plan.from_proto(message.plan, self.coder.batch_size)
            check_agreed(plan, self._config)
            if plan != self.coder.plan:
                log.info("job %s: %s", self._job, plan)
            self.coder.use(plan)
        return Frame(
            phase=message.phase,
            step=message.step,
            micro_batch=message.micro_batch,
            tensor=tensor,
            values={**message.values, _UNDER_WAY: seconds},
            agreement=message.agreement if message.HasField("agreement") else None,
            plan=plan,
            probe=message.probe if message.HasField("probe") else None,
            site=message.site,
            frozen=message.frozen if message.HasField("frozen") else None,
            shape=Shape(message.shape.cut, message.shape.rank) if message.HasField("shape") else None,
        )


class Questions:
    """Frames that an answer is due to: since when, and of which shape. The answers come in the order of the questions;
    a tensor in an answer has the shape of the question's, or, to OPEN, of the adapter. What is said of a site between a
    question and its answer asks, and answers, anew."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, int, int], tuple[int, ...]] = {}  # of questions that sites have come between
        self._due: dict[tuple[int, int, int], deque[tuple[float, tuple[int, ...]]]] = {}
        self._lock = threading.Lock()  # one thread asks, another hears the answers, of several evaluations at a time

    def asked(self, message: stage_pb2.Frame) -> None:
        if message.phase not in (Phase.STEP, Phase.REPORT, Phase.MERGE):
            shape = (message.open.adapter_values,) if message.HasField("open") else tuple(message.tensor.shape)
            with self._lock:
                shape = self._shapes.pop(_place(message), ()) if message.site else shape
                self._due.setdefault(_place(message), deque()).append((time.perf_counter(), shape))

    def answered(self, message: stage_pb2.Frame) -> tuple[float, tuple[int, ...]]:
        """Seconds since the question, and the shape that a tensor has to have. Raises BadFrame if nothing was asked."""
        with self._lock:
            due = self._due.get(_place(message))
            if not due and message.phase != Phase.CLOSE:  # which also answers an OPEN that has come too late
                raise BadFrame(f"{Phase.Name(message.phase)} of step {message.step} answers nothing")
            at, shape = due.popleft() if due else (time.perf_counter(), ())
            if message.site:
                self._shapes[_place(message)] = shape
            if not due:
                self._due.pop(_place(message), None)
        return time.perf_counter() - at, shape


def is_answer(message: stage_pb2.Frame | Frame) -> bool:
    """Whether a frame from the stage answers the device's last one; the gradient of a site's outputs for which none
    by its inputs is wanted goes before the answer."""
    return not (message.site and message.phase == Phase.BACKWARD and not message.values[INPUT_GRADIENT])


def _place(message: stage_pb2.Frame) -> tuple[int, int, int]:
    return (message.phase, 0 if message.phase in (Phase.OPEN, Phase.PROBE) else message.step, message.micro_batch)


def as_known(error: Exception, what: str) -> IsthmusError:
    """An error for whoever waits for a frame: itself, or a line on what nobody expected."""
    if isinstance(error, IsthmusError):
        return error
    log.error("%s a frame failed", what, exc_info=error)
    return IsthmusError(f"{what} a frame failed: {type(error).__name__}: {error}")


def frame_to_proto(frame: Frame, job: str, session: str, coder: Coder, labels: str, *, upward: bool) -> stage_pb2.Frame:
    """labels: where they are in this job. Raises CodecError for a tensor that its codec cannot take."""
    message = stage_pb2.Frame(
        job=job,
        session=session,
        step=frame.step,
        micro_batch=frame.micro_batch,
        phase=frame.phase,
        values=frame.values,
        open=frame.open,
        agreement=frame.agreement,
        plan=None if frame.plan is None else frame.plan.to_proto(),
        measured=frame.measured,
        probe=frame.probe,
        site=frame.site,
        trained=frame.trained,
        applied=frame.applied,
        frozen=frame.frozen,
        shape=None if frame.shape is None else stage_pb2.Shape(cut=frame.shape.cut, rank=frame.shape.rank),
    )
    if frame.encoded is not None:
        message.tensor.CopyFrom(frame.encoded)
    elif frame.tensor is not None:
        stream = "" if frame.shape else stream_of(frame.phase, upward, labels)
        encoded = coder.encode(stream, frame.tensor, frame.step, frame.micro_batch, frame.site)
        message.tensor.CopyFrom(encoded)
    if frame.wanted is not None:
        message.wanted = pack_bits(frame.wanted)
    if frame.labels is not None:
        message.labels.CopyFrom(encode_tensor(frame.labels.to(torch.int32)))
    return message


def kind_and_sizes(message: stage_pb2.Frame) -> tuple[str, str, int, int]:
    """Of a message: its kind, the codec of its tensor, the bytes of its tensors' payloads and of all of it."""
    payload = len(message.tensor.payload) + len(message.labels.payload) + len(message.probe.filling)
    codec = message.tensor.codec if message.HasField("tensor") else ""
    kind = Phase.Name(message.phase).lower() if message.phase in Phase.values() else "unknown"
    return f"{kind} modules" if message.site else kind, codec, payload, message.ByteSize()
