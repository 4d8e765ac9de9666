"""One interface to the stage on the other side, whether it is in this process or across the network."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import grpc
from torch import Tensor

from protos.v1 import stage_pb2, stage_pb2_grpc
from split.errors import BadFrame, IsthmusError, LinkLost
from split.ledger import Ledger
from split.tls import MAX_MESSAGE_BYTES, error_of
from split.wire import DTYPES, Expected, decode_tensor, encode_tensor

if TYPE_CHECKING:
    from split.host import StageHost

Phase = stage_pb2.Phase


@dataclass(frozen=True)
class Frame:
    """A stage_pb2.Frame with its tensors decoded: what both sides compute with. On the wire it is a message."""

    phase: stage_pb2.Phase
    step: int = 0
    micro_batch: int = 0
    tensor: Tensor | None = None
    labels: Tensor | None = None
    values: dict[str, float] = field(default_factory=dict)
    open: stage_pb2.Open | None = None
    agreement: stage_pb2.Agreement | None = None


class Link(Protocol):
    """Frames out and frames in, in order. Errors of the other side are raised by `receive`."""

    def send(self, frame: Frame) -> None: ...
    def receive(self) -> Frame: ...
    def close(self) -> None: ...


class LocalLink:
    """A link to a stage in this process."""

    def __init__(self, host: StageHost, device: str, *, timeout: float = 600.0) -> None:
        self._host, self._device, self._timeout = host, device, timeout
        self._inbox: queue.SimpleQueue[Frame | IsthmusError] = queue.SimpleQueue()
        self._deliver = self._inbox.put  # one object: it names this link to the host

    def send(self, frame: Frame) -> None:
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
        return answer

    def close(self) -> None:
        self._host.leave(self._device, self._deliver)


class GrpcLink:
    """A link over one stream of Stage.Exchange. `channel` has the credentials; `session` names this run."""

    def __init__(self, channel: grpc.Channel, job: str, session: str, ledger: Ledger) -> None:
        self._job, self._session, self._ledger = job, session, ledger
        self._outbox: queue.SimpleQueue[stage_pb2.Frame | None] = queue.SimpleQueue()
        self._call = stage_pb2_grpc.StageStub(channel).Exchange(iter(self._outbox.get, None))
        self._answers: Iterator[stage_pb2.Frame] = iter(self._call)

    def send(self, frame: Frame) -> None:
        message = frame_to_proto(frame, self._job, self._session)
        self._ledger.traffic.crossed("sent", kind_of(message), payload_size(message), message.ByteSize())
        self._outbox.put(message)

    def receive(self) -> Frame:
        with self._ledger.waiting():
            try:
                message = next(self._answers)
            except StopIteration:
                raise LinkLost("the coordinator closed the stream of this job") from None
            except grpc.RpcError as error:
                raise error_of(error, "this job's stage") from None
        self._ledger.traffic.crossed("received", kind_of(message), payload_size(message), message.ByteSize())
        return answer_from_proto(message)

    def close(self) -> None:
        self._outbox.put(None)
        self._call.cancel()


def frame_to_proto(frame: Frame, job: str, session: str) -> stage_pb2.Frame:
    message = stage_pb2.Frame(
        job=job,
        session=session,
        step=frame.step,
        micro_batch=frame.micro_batch,
        phase=frame.phase,
        values=frame.values,
        open=frame.open,
        agreement=frame.agreement,
    )
    if frame.tensor is not None:
        message.tensor.CopyFrom(encode_tensor(frame.tensor))
    if frame.labels is not None:
        message.labels.CopyFrom(encode_tensor(frame.labels))
    return message


def answer_from_proto(message: stage_pb2.Frame) -> Frame:
    """A frame from the coordinator, whose size gRPC has bounded. What it has to be is checked by who asked."""
    tensor = None
    if message.HasField("tensor"):
        shape = tuple(message.tensor.shape)
        tensor = decode_tensor(message.tensor, Expected(_known(message.tensor.dtype), shape, MAX_MESSAGE_BYTES))
    return Frame(
        phase=message.phase,
        step=message.step,
        micro_batch=message.micro_batch,
        tensor=tensor,
        values=dict(message.values),
        agreement=message.agreement if message.HasField("agreement") else None,
    )


def payload_size(message: stage_pb2.Frame) -> int:
    """Bytes of tensor values in a frame; the rest of it is overhead."""
    return len(message.tensor.payload) + len(message.labels.payload)


def kind_of(message: stage_pb2.Frame) -> str:
    return Phase.Name(message.phase).lower()


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise BadFrame(f"a tensor of unknown dtype {dtype[:32]!r}")
    return dtype
