"""Measurements of what a link and a machine can do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import CodecState, parse

MAX_PROBE_BYTES = 2**18
_PINGS = 3
_FIRST_PROBE_BYTES = 2**14
_LONG_ENOUGH = 0.02  # seconds beyond the round trip that a probe has to take for its rate to be believed
_SLOWEST, _FARTHEST = 100.0, 60.0  # bytes a second, and seconds: a measurement that claims worse counts as this
_FAST = 5e7  # bytes a second: all faster links count as equal
_SOON = 0.005  # seconds: added to round trips before they are compared, so that tiny ones count as equal
_SAMPLE_ROWS = 256  # rows of the tensor with which codecs are timed


@dataclass(frozen=True)
class LinkProfile:
    """A link as a device measures it.

    round_trip: seconds there and back.
    up, down: bytes a second of messages, inside TLS.
    """

    round_trip: float = 0.0
    up: float = math.inf
    down: float = math.inf

    def to_proto(self) -> stage_pb2.Measured:
        return stage_pb2.Measured(
            round_trip_seconds=self.round_trip, up_bytes_per_second=self.up, down_bytes_per_second=self.down
        )

    @classmethod
    def from_proto(cls, message: stage_pb2.Measured) -> LinkProfile:
        """Reads a measurement; an impossible value counts as not measured, or as the worst that is possible."""
        times = message.round_trip_seconds
        rates = (message.up_bytes_per_second, message.down_bytes_per_second)
        up, down = (max(rate, _SLOWEST) if rate > 0 else math.inf for rate in rates)
        return cls(min(times, _FARTHEST) if times >= 0 else 0.0, up, down)

    def differs(self, other: LinkProfile) -> bool:
        """Whether two profiles differ by more than two measurements of one link do."""
        pairs = [(min(self.up, _FAST), min(other.up, _FAST)), (min(self.down, _FAST), min(other.down, _FAST))]
        pairs.append((self.round_trip + _SOON, other.round_trip + _SOON))
        return any(not 0.7 < one / two < 1.4 for one, two in pairs)

    def __str__(self) -> str:
        if self == LinkProfile():
            return "a link without limits"
        rates = " and ".join(
            f"{8 * rate / 1e6:.3g} Mbit/s {way}" for rate, way in ((self.up, "up"), (self.down, "down"))
        )
        return f"{rates}, {1e3 * self.round_trip:.3g} ms there and back"


def probe(exchange: Callable[[int, int], float]) -> LinkProfile:
    """Measures a link, which takes some round trips and, each way, up to four times _LONG_ENOUGH seconds.

    exchange: function of (up, down) that sends `up` bytes, waits for `down` bytes and returns the seconds that took.
    """
    round_trip = min(exchange(0, 0) for _ in range(_PINGS))
    rates = []
    for upward in (True, False):
        size = _FIRST_PROBE_BYTES
        while True:
            beside = max(exchange(size, 0) if upward else exchange(0, size), 1e-9) - round_trip
            if beside >= _LONG_ENOUGH or size == MAX_PROBE_BYTES:
                break
            size = min(4 * size, MAX_PROBE_BYTES)
        rates.append(size / beside if beside > 1e-4 else math.inf)
    return LinkProfile(round_trip, *rates)


def codec_seconds(names: Iterable[str], width: int) -> dict[str, float]:
    """Seconds to encode and decode a million values on this machine, by codec; width is the tensors' last size."""
    return {name: _timed(name, width) for name in names}


@lru_cache(maxsize=128)
def _timed(name: str, width: int) -> float:
    """Measures by the clock of this thread, which stands still while other programs have the processor."""
    codec, shape = parse(name), (_SAMPLE_ROWS, width)
    scales = torch.logspace(0, -3, width)  # columns of unequal scale, as hidden states have, unlike white noise
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scales
    near, far = CodecState(0), CodecState(0)
    best = math.inf
    for _ in range(4):  # the first one learns, and warms up
        started = time.thread_time()
        codec.decode(codec.encode(sample, near), shape, far)
        best = min(best, time.thread_time() - started)
    return best * 1e6 / sample.numel()
