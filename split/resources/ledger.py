"""The five resources of one participant in a job: computation, memory, energy, money, network communication.

The ledger sums what the meters beside it measure, and nothing is made up. FLOPs are counted on the operators that ran,
memory is the operating system's peak, bytes are those of messages really sent. Energy is measured where the machine has
a meter, else estimated and labelled so. What could not be measured is None.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from isthmus.split.resources.energy import EnergyMeter
from isthmus.split.resources.flops import FlopMeter
from isthmus.split.resources.memory import accelerator_peak_bytes, peak_bytes
from isthmus.split.resources.prices import Prices
from isthmus.split.resources.traffic import Traffic


@dataclass
class Coding:
    """What a codec has done on this side."""

    encode_values: int = 0
    encode_seconds: float = 0.0
    decode_values: int = 0
    decode_seconds: float = 0.0


@dataclass
class Ledger:
    """Counts while a task runs; `summary` returns what a report shows.

    slow_down: emulates a machine that is this many times slower. After each piece of computing it waits until this many
    times the processor's time for it have passed, and counts the wait as computing. It multiplies the time of this
    thread on the processor, not the clock's, so that the machine's other work is not multiplied.
    """

    slow_down: float = 1.0
    prices: Prices = field(default_factory=Prices)
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    link_seconds: float = 0.0
    coding: dict[str, Coding] = field(default_factory=dict)
    codec_memory_bytes: int = 0
    compute_by_work: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    traffic: Traffic = field(default_factory=Traffic)
    _flops: FlopMeter = field(default_factory=FlopMeter)
    _energy: EnergyMeter = field(default_factory=EnergyMeter)
    _started: float = field(default_factory=time.monotonic)

    @property
    def flops(self) -> float:
        return self._flops.total

    @contextmanager
    def computing(self, work: Hashable, idle: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
        """Times the work, and counts its FLOPs the first time that this `work` is done.

        work: a name and shapes.
        idle: asked at the end for the seconds in which nothing was computed.
        """
        start, own = time.perf_counter(), time.thread_time()
        try:
            with self._flops.counting(work):
                yield
        finally:
            seconds = self.slowed(time.perf_counter() - start - idle(), time.thread_time() - own)
            self.compute_seconds += seconds
            self.compute_by_work[str(work[0] if isinstance(work, tuple) else work)] += seconds

    def slowed(self, seconds: float, own: float) -> float:
        """Waits as `slow_down` says after some computing, and returns the seconds that it took in all.

        seconds: seconds by the clock, which `slow_down` multiplies where there is an accelerator.
        own: seconds of this thread on the processor, which it multiplies elsewhere.
        """
        if self.slow_down <= 1:
            return seconds
        rest = self.slow_down * (seconds if torch.cuda.is_initialized() else own) - seconds
        if rest > 0:
            time.sleep(rest)
        return seconds + max(0.0, rest)

    def waited(self, seconds: float, link_seconds: float) -> None:
        """Notes that this side had nothing to do for `seconds`, for `link_seconds` of them because of the link."""
        self.wait_seconds += seconds
        self.link_seconds += min(seconds, max(0.0, link_seconds))

    def coded(self, codec: str, what: str, values: int, seconds: float, memory_bytes: int) -> None:
        """Notes that a codec has encoded or decoded a tensor.

        what: "encode" or "decode".
        values: number of the tensor's values.
        memory_bytes: what the session's codecs remember now.
        """
        mine = self.coding.setdefault(codec, Coding())
        if what == "encode":
            mine.encode_values += values
            mine.encode_seconds += seconds
        else:
            mine.decode_values += values
            mine.decode_seconds += seconds
        self.codec_memory_bytes = max(self.codec_memory_bytes, memory_bytes)

    def summary(self) -> dict[str, object]:
        """All sums, as JSON has them; what is not known is None.

        `energy_source` says where the energy's figure is from. Money is for the device's hours, its known energy and
        the bytes of the messages that it sent.
        """
        processor, accelerator = self._energy.processor(), self._energy.accelerator()
        joules = (processor.joules or 0.0) + (accelerator.joules or 0.0)
        seconds = time.monotonic() - self._started
        return {
            "seconds": seconds,
            "flops": self.flops,
            "compute_seconds": self.compute_seconds,
            "wait_seconds": self.wait_seconds,
            "link_seconds": self.link_seconds,
            "encode_seconds": sum(coding.encode_seconds for coding in self.coding.values()),
            "decode_seconds": sum(coding.decode_seconds for coding in self.coding.values()),
            "codec_memory_bytes": self.codec_memory_bytes,
            "peak_bytes": peak_bytes(),
            "accelerator_peak_bytes": accelerator_peak_bytes(),
            "energy_joules": processor.joules,
            "energy_source": processor.source,
            "accelerator_energy_joules": accelerator.joules,
            "accelerator_energy_source": accelerator.source,
            "money": self.prices.cost(seconds / 3600, joules, self.traffic.total_bytes("sent")),
            "currency": self.prices.currency,
            "bytes_sent": self.traffic.total_bytes("sent"),
            "bytes_received": self.traffic.total_bytes("received"),
            "wire_bytes_sent": self.traffic.on_the_wire("sent"),
            "wire_bytes_received": self.traffic.on_the_wire("received"),
            "traffic": self.traffic.rows(),
        }
