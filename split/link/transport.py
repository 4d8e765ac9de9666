"""Transports: they move the messages of a stream, serialised, both ways and in order.

One uses gRPC, the other this process's memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame, IsthmusError
from isthmus.split.link.coding import Terms
from isthmus.split.link.frames import Frame, as_known
from isthmus.split.link.stage import Host, StageSession
from isthmus.split.resources.traffic import Traffic
from isthmus.split.tls import MAX_MESSAGE_BYTES, error_of

Out = TypeVar("Out", bound=Message)
In = TypeVar("In", bound=Message)
Out_contra = TypeVar("Out_contra", bound=Message, contravariant=True)
In_co = TypeVar("In_co", bound=Message, covariant=True)


class Transport(Protocol[Out_contra, In_co]):
    """One stream, seen from the side that opens it."""

    def exchange(self, outgoing: Iterator[Out_contra]) -> Iterator[In_co]:
        """Sends what `outgoing` gives, in another thread and as fast as the other side takes it, and yields what comes.

        Ends when the other side closes the stream. It is called once. Raises the IsthmusError with which the other side
        refused.
        """

    def close(self) -> None:
        """Ends the stream from here, and `exchange` soon after. Any thread may call it, more than once."""


class GrpcTransport(Generic[Out, In]):
    """A stream that is one call of a gRPC method with streams both ways."""

    def __init__(self, method: Callable[[Iterator[Out]], Any], peer: str) -> None:
        """method: the method of a stub.
        peer: the other side's name in errors."""
        self._method, self._peer = method, peer
        self._call: Any = None
        self._closed = threading.Event()

    def exchange(self, outgoing: Iterator[Out]) -> Iterator[In]:
        self._call = self._method(outgoing)
        if self._closed.is_set():
            self._call.cancel()
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise error_of(error, self._peer) from None
        finally:
            self._call.cancel()

    def close(self) -> None:
        self._closed.set()
        if self._call is not None:
            self._call.cancel()


class MemoryTransport:
    """A stream to a stage in this process. Messages are serialised and parsed as they are on a network."""

    def __init__(self, host: Host, device: str, job: str, terms: Terms) -> None:
        self._answers: queue.SimpleQueue[Frame | IsthmusError | None] = queue.SimpleQueue()
        self._stage = StageSession(host, device, job, terms, Traffic(), self._answers.put)
        self._device = device
        self._lock = threading.Lock()  # so that the host gets no frame after the end
        self._closed = False

    def exchange(self, outgoing: Iterator[stage_pb2.Frame]) -> Iterator[stage_pb2.Frame]:
        threading.Thread(target=self._send, args=(outgoing,), name=f"stage-of-{self._device}", daemon=True).start()
        while (answer := self._answers.get()) is not None:
            if isinstance(answer, IsthmusError):
                raise answer
            yield _crossed(self._stage.encode(answer))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._stage.close()
        self._answers.put(None)

    def _send(self, outgoing: Iterator[stage_pb2.Frame]) -> None:
        try:
            for message in outgoing:
                crossed = _crossed(message)
                with self._lock:
                    taken = None if self._closed else self._stage.take(crossed)
                if taken is not None:
                    taken.result()
        except Exception as error:  # noqa: BLE001  # the error has to reach the device, which waits for an answer
            self._answers.put(as_known(error, "decoding"))
            self._stage.close()


def _crossed(message: stage_pb2.Frame) -> stage_pb2.Frame:
    """Serialises and parses a message, as a network would. Raises BadFrame for one that is too large."""
    data = message.SerializeToString()
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadFrame(f"a message of {len(data)} bytes; {MAX_MESSAGE_BYTES} can be")
    return stage_pb2.Frame.FromString(data)
