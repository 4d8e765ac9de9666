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
from isthmus.split.errors import BadFrame, IsthmusError, LinkLost
from isthmus.split.inference.wire import HiddenCoder, rows_of
from isthmus.split.models.stage import StageSpec
from isthmus.split.resources.ledger import Ledger
from isthmus.split.runtime.base import BadPosition, Runtime
from isthmus.split.tls import error_of

log = logging.getLogger(__name__)

_LAST_ANSWER = 10.0  # seconds that a holder which leaves has for what is under way


class Holding:
    """One stream to the gateway. `run` returns when this side has left, and raises LinkLost when the stream broke.

    A new stream begins with empty caches: the gateway sends again what is needed.
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
        """ledger: of this process's work for the job, over all of its streams; None: it begins with this one."""
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
        self._outbox: queue.SimpleQueue[pb.FromHolder | None] = queue.SimpleQueue()
        self._outbox.put(pb.FromHolder(hello=hello))
        self._leaving = threading.Event()
        self.batches = 0  # that were computed
        self._call = ChainStub(channel).Hold(self._messages())

    def run(self) -> None:
        self._runtime.forget(list(self._runtime.lengths()))
        coder: HiddenCoder | None = None
        try:
            for message in self._call:
                kind = message.WhichOneof("kind")
                if kind == "batch" and coder is not None:
                    self._outbox.put(pb.FromHolder(result=self._compute(message.batch, coder)))
                    self.batches += 1
                elif kind == "forget":
                    self._runtime.forget(message.forget.sequences)
                elif kind == "ask_spent":
                    self._outbox.put(pb.FromHolder(spent=self._spent()))
                elif kind == "agreed" and coder is None:
                    coder = HiddenCoder(message.agreed.codec, message.agreed.seed, self._hidden_size)
                else:
                    raise BadFrame(f"the gateway sent {kind} out of turn")
        except grpc.RpcError as error:
            if not self._leaving.is_set():
                raise error_of(error, "this job's gateway") from None
        finally:
            self._call.cancel()
            self._outbox.put(None)
        if not self._leaving.is_set():
            raise LinkLost("the gateway closed the stream")

    def leave(self) -> None:
        """Says that this holder goes. The gateway closes the stream when what is under way has been answered."""
        if not self._leaving.is_set():
            self._leaving.set()
            self._outbox.put(pb.FromHolder(leaving=pb.Leaving()))
            timer = threading.Timer(_LAST_ANSWER, self._call.cancel)  # of a gateway that does not answer
            timer.daemon = True
            timer.start()

    def _compute(self, batch: pb.Batch, coder: HiddenCoder) -> pb.Result:
        """What is wrong with one batch ends that batch alone."""
        coding = coder.seconds
        try:
            rows = rows_of(batch)
            hidden = coder.decode(batch.hidden, sum(row.count for row in rows))
            started = time.perf_counter()
            output = self._runtime.compute(rows, hidden)
            seconds = time.perf_counter() - started
            encoded = coder.encode(output)
        except IsthmusError as error:
            return pb.Result(id=batch.id, error=str(error), bad_position=isinstance(error, BadPosition))
        except Exception as error:  # no memory, a bug: the gateway goes to another holder
            log.exception("a batch could not be computed")
            return pb.Result(id=batch.id, error=f"{type(error).__name__}: {error}")
        return pb.Result(id=batch.id, hidden=encoded, computing_seconds=seconds, coding_seconds=coder.seconds - coding)

    def _spent(self) -> pb.Spent:
        summary: dict[str, Any] = self._ledger.summary()
        return pb.Spent(**{field.name: summary[field.name] for field in pb.Spent.DESCRIPTOR.fields})

    def _messages(self) -> Iterator[pb.FromHolder]:
        with contextlib.suppress(GeneratorExit):
            while (message := self._outbox.get()) is not None:
                yield message
