"""The side of a chain that holds blocks: it dials the gateway and computes the batches that come, in their order."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.protos.v1.chain_pb2_grpc import ChainStub
from isthmus.split.codecs import FAMILIES
from isthmus.split.errors import IsthmusError, LinkLost
from isthmus.split.inference.wire import MAX_TOKENS, ComputingEnd, Forget, HiddenBatch, Limits
from isthmus.split.link.transport import GrpcTransport
from isthmus.split.models.stage import StageSpec
from isthmus.split.resources.ledger import Ledger
from isthmus.split.runtime.base import Runtime

log = logging.getLogger(__name__)

_LAST_ANSWER = 10.0  # seconds that a holder which leaves has for what is under way


class Holding:
    """One stream of a holder to the gateway.

    `run` returns when this side has left, and raises LinkLost when the stream broke. A new stream begins with empty
    caches, and the gateway sends again what is needed.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        runtime: Runtime,
        spec: StageSpec,
        *,
        job: str,
        digest: str,
        hidden_size: int,
        ledger: Ledger | None = None,
    ) -> None:
        """ledger: counts this process's work for the job, over all of its streams; None to begin with this one."""
        self._runtime, self._hidden_size = runtime, hidden_size
        self._ledger = ledger or Ledger()
        hello = pb.Hello(
            job=job,
            first=spec.first,
            last=spec.last,
            digest=digest,
            sequences=runtime.sequences,
            tokens=runtime.tokens,
            runtime=type(runtime).__name__.removesuffix("Runtime").lower(),
            codecs=sorted(FAMILIES),
            process=os.getpid(),
            tells_spent=True,
        )
        limits = Limits(runtime.sequences, MAX_TOKENS, runtime.tokens, runtime.adapters)
        self._end = ComputingEnd(hidden_size, limits)
        self._outbox: queue.SimpleQueue[pb.FromHolder | None] = queue.SimpleQueue()
        self._outbox.put(pb.FromHolder(hello=hello))
        self._leaving = threading.Event()
        self.batches = 0  # number of batches that were computed
        self._transport: GrpcTransport[pb.FromHolder, pb.ToHolder] = GrpcTransport(
            ChainStub(channel).Hold, "this job's gateway"
        )

    def run(self) -> None:
        self._runtime.forget(list(self._runtime.lengths()))
        try:
            for message in self._transport.exchange(self._messages()):
                self._take(message)
        except IsthmusError:
            if not self._leaving.is_set():
                raise
        finally:
            self._transport.close()
            self._outbox.put(None)
        if not self._leaving.is_set():
            raise LinkLost("the gateway closed the stream")

    def leave(self) -> None:
        """Says that this holder goes. The gateway closes the stream when what is under way has been answered."""
        if not self._leaving.is_set():
            self._leaving.set()
            self._outbox.put(pb.FromHolder(leaving=pb.Leaving()))
            timer = threading.Timer(_LAST_ANSWER, self._transport.close)  # for a gateway that does not answer
            timer.daemon = True
            timer.start()

    def _take(self, message: pb.ToHolder) -> None:
        """Answers one message. What is wrong with one batch ends only that batch."""
        if message.HasField("ask_spent"):
            self._outbox.put(pb.FromHolder(spent=self._spent()))
            return
        if not message.HasField("batch"):
            asked = self._end.take(message)
            if isinstance(asked, Forget):
                self._runtime.forget(asked.sequences)
            return
        try:
            result = self._compute(message)
        except IsthmusError as error:
            result = self._end.failure(message.batch.id, error)
        except Exception as error:  # no memory left, or a bug: the gateway goes to another holder
            log.exception("a batch could not be computed")
            result = self._end.failure(message.batch.id, error, f"{type(error).__name__}: {error}")
        self._outbox.put(pb.FromHolder(result=result))
        self.batches += 1

    def _compute(self, message: pb.ToHolder) -> pb.Result:
        batch = self._end.take(message)
        assert isinstance(batch, HiddenBatch)
        started = time.perf_counter()
        output = self._runtime.compute(batch.rows, batch.hidden)
        return self._end.result(batch.id, output, time.perf_counter() - started)

    def _spent(self) -> pb.Spent:
        summary: dict[str, Any] = self._ledger.summary()
        return pb.Spent(**{field.name: summary[field.name] for field in pb.Spent.DESCRIPTOR.fields})

    def _messages(self) -> Iterator[pb.FromHolder]:
        with contextlib.suppress(GeneratorExit):
            while (message := self._outbox.get()) is not None:
                yield message
