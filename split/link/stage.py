"""The stage's end of a session: between the messages of one device and the host that serves a job's devices."""

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


class StageSession:
    """One device's stream at the stage. `put` gets what is to be answered, in any thread; whoever moves messages then
    calls `encode`, in order."""

    def __init__(
        self,
        host: Host,
        device: str,
        job: str,
        terms: Terms,
        traffic: Traffic,
        put: Callable[[Frame | IsthmusError], None],
    ) -> None:
        """terms: of the job's devices; what differs between them the host knows."""
        adapter, layout = host.adapter_shapes(device), host.layout_for(device)
        terms = terms if adapter is None else replace(terms, adapter=adapter)  # () is that of a device of rank 0
        terms = terms if layout is None else replace(terms, layout=layout)
        self._host, self._device, self._put = host, device, put
        self._session = SessionEnd(job, "", terms, host.ledger, traffic, device=False)
        self._deliver = self._answer  # one object: it names this stream to the host

    def take(self, message: stage_pb2.Frame) -> Future[None] | None:
        """A message from the device, decoded and handed to the host. The future, if any, is done when the host has
        taken it. Raises BadFrame, BadTensor or CodecError for what was not agreed."""
        frame = self._session.decode(message)
        if frame.probe is not None:  # as many bytes as were asked for, which nobody on the way can shrink
            filling = os.urandom(frame.probe.answer_bytes)
            self._answer(Frame(Phase.PROBE, frame.step, probe=stage_pb2.Probe(filling=filling)))
            return None
        hand = self._host.join if frame.open is not None else self._host.submit
        return hand(self._device, frame, self._deliver)

    def encode(self, answer: Frame) -> stage_pb2.Frame:
        """The message of what `put` got. Raises CodecError."""
        message = self._session.encode(answer)
        if answer.shape is not None:
            self._session.coder.reshape(self._host.adapter_shapes(self._device) or ())
        return message

    def close(self) -> None:
        """The stream has ended."""
        self._host.leave(self._device, self._deliver)

    def _answer(self, answer: Frame | IsthmusError) -> None:  # called in the host's thread
        self._put(answer if isinstance(answer, IsthmusError) else self._session.answering(answer))
