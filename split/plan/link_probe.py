"""Measures a link by real messages: on a stream such as a holder of blocks has, from whoever dials to the coordinator.

The coordinator's side answers each probe with as many bytes as it asks for (`answer`).
"""

from __future__ import annotations

import itertools
import os
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import grpc

from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.split.errors import BadFrame
from isthmus.split.link.profile import MAX_PROBE_BYTES, LinkProfile, probe
from isthmus.split.runtime.speed import Stopped
from isthmus.split.tls import error_of

_TIMES, _SECONDS = 16, 1.0  # round trips, and about how long they may take
_PAUSE = 0.012  # seconds between them, as another stage would compute: who has slept answers later
_HIDDEN_BYTES = 4096  # a token's hidden states
_LIMIT = 60.0  # seconds for everything


def measure_link(channel: grpc.Channel, *, stop: Callable[[], bool] = lambda: False) -> LinkProfile:
    """Takes up to some seconds on a slow link. Raises LinkLost, and Stopped where `stop` says so.

    The round trip is that of one token's hidden states, both programs' own time with messages included.
    """
    probes: queue.SimpleQueue[stage_pb2.Probe | None] = queue.SimpleQueue()
    call = CoordinatorStub(channel).MeasureLink(iter(probes.get, None), timeout=_LIMIT)

    def exchange(up: int, down: int) -> float:
        if stop():
            raise Stopped
        message = stage_pb2.Probe(filling=os.urandom(up), answer_bytes=down)  # that nobody on the way can shrink
        start = time.perf_counter()
        probes.put(message)
        next(call)
        return time.perf_counter() - start

    def round_trips() -> Iterator[float]:
        started = time.monotonic()
        for number in itertools.count():
            if number == _TIMES or (number > 2 and time.monotonic() - started > _SECONDS):
                return
            time.sleep(_PAUSE)
            yield exchange(_HIDDEN_BYTES, _HIDDEN_BYTES)

    try:
        link = probe(exchange)
        on_the_way = _HIDDEN_BYTES / link.up + _HIDDEN_BYTES / link.down
        return replace(link, round_trip=max(0.0, median(round_trips()) - on_the_way))
    except grpc.RpcError as error:
        raise error_of(error, "the coordinator") from None
    finally:
        probes.put(None)
        call.cancel()


def answer(message: stage_pb2.Probe) -> stage_pb2.Probe:
    """Raises BadFrame for more bytes than a probe may have."""
    if max(message.answer_bytes, len(message.filling)) > MAX_PROBE_BYTES:
        raise BadFrame(f"a probe has {MAX_PROBE_BYTES} bytes each way at most")
    return stage_pb2.Probe(filling=os.urandom(message.answer_bytes))
