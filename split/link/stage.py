"""The stage's end of a session: it stands between one device's messages and the host of the job."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import IsthmusError
from isthmus.split.link.coding import Terms
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.session import SessionEnd
from isthmus.split.lora.sites import Layout
from isthmus.split.resources.ledger import Ledger
from isthmus.split.resources.traffic import Traffic

Deliver = Callable[[Frame | IsthmusError], None]  # also names the stream: a device that joins again has another one


class Host(Protocol):
    """What serves the devices of a job. Any thread may call its methods."""

    ledger: Ledger

    def join(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """Takes a device's OPEN; the future is done when the frame has been taken."""

    def submit(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """Takes a later frame. Whoever reads a network waits for the future, which is done once it is taken."""

    def leave(self, device: str, deliver: Deliver) -> None: ...
    def adapter_shapes(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        """Shapes of the matrices of a device's adapter; None where they are the same for all devices."""

    def layout_for(self, device: str) -> Layout | None:
        """The layout of a device's modules in the server's blocks; None unless the method is DLoRA."""

    def start_without(self, missing: set[str]) -> None: ...
    def close(self) -> None: ...


class StageSession:
    """One device's stream at the stage.

    Answers are given to `put`, in any thread. Whoever moves messages then calls `encode` on each, in order.
    """

    def __init__(
        self,
        host: Host,
        device: str,
        job: str,
        terms: Terms,
        traffic: Traffic,
        put: Callable[[Frame | IsthmusError], None],
    ) -> None:
        """terms: what the job's devices have in common; the host knows what differs between them."""
        adapter, layout = host.adapter_shapes(device), host.layout_for(device)
        terms = terms if adapter is None else replace(terms, adapter=adapter)  # () is the adapter of a device of rank 0
        terms = terms if layout is None else replace(terms, layout=layout)
        self._host, self._device, self._put = host, device, put
        self._session = SessionEnd(job, "", terms, host.ledger, traffic, device=False)
        self._deliver = self._answer  # one object for the whole stream, which it names to the host

    def take(self, message: stage_pb2.Frame) -> Future[None] | None:
        """Decodes a message from the device and hands it to the host; a PROBE is answered here.

        Returns a future that is done when the host has taken the frame, or None. Raises BadFrame, BadTensor or
        CodecError for what was not agreed.
        """
        frame = self._session.decode(message)
        if frame.probe is not None:  # random bytes, so that nobody on the way can compress them
            filling = os.urandom(frame.probe.answer_bytes)
            self._answer(Frame(Phase.PROBE, frame.step, probe=stage_pb2.Probe(filling=filling)))
            return None
        hand = self._host.join if frame.open is not None else self._host.submit
        return hand(self._device, frame, self._deliver)

    def encode(self, answer: Frame) -> stage_pb2.Frame:
        """Encodes an answer that `put` was given. Raises CodecError."""
        message = self._session.encode(answer)
        if answer.shape is not None:
            self._session.coder.reshape(self._host.adapter_shapes(self._device) or ())
        return message

    def close(self) -> None:
        """Tells the host that the stream has ended."""
        self._host.leave(self._device, self._deliver)

    def _answer(self, answer: Frame | IsthmusError) -> None:  # called in the host's thread
        self._put(answer if isinstance(answer, IsthmusError) else self._session.answering(answer))
