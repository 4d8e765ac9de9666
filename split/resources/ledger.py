"""The five resources of one participant in a job: computation, memory, energy, money, network communication.

Nothing here is made up: FLOPs are counted on the operators that ran (once for each kind of work and
shape, then multiplied), memory is the operating system's peak, bytes are of messages really sent, energy
is measured where the machine has a meter and otherwise estimated and labelled so.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from isthmus.split.resources.tcp import Counted

WATTS_OF_A_BUSY_CORE = 8.0  # the estimate's one assumption; a meter, where there is one, replaces it
_RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True)
class Prices:
    """The price table: what an hour of a device, a kilowatt-hour and a gigabyte out of it cost."""

    device_hour: float = 0.05
    kilowatt_hour: float = 0.30
    gigabyte_sent: float = 0.09
    currency: str = "USD"


_Key = tuple[str, str, str]  # direction (sent, received), kind of message, codec of its tensor (empty: it has none)


@dataclass
class Traffic:
    """Bytes and messages by direction, kind of message and codec; tensor values and the rest of a message apart.

    These are bytes of the messages as serialised. What HTTP/2, TLS, TCP and IP add below them shows in `connections`:
    all bytes of each, by the number of its socket, as the kernel counted them.
    """

    payload_bytes: Counter[_Key] = field(default_factory=Counter)
    overhead_bytes: Counter[_Key] = field(default_factory=Counter)
    messages: Counter[_Key] = field(default_factory=Counter)
    connections: dict[int, Counted] = field(default_factory=dict)

    def crossed(self, direction: str, kind: str, codec: str, payload: int, total: int) -> None:
        """A message of `total` bytes, `payload` of them an encoded tensor, went over the wire."""
        key = (direction, kind, codec)
        self.payload_bytes[key] += payload
        self.overhead_bytes[key] += total - payload
        self.messages[key] += 1

    def add(self, other: Traffic) -> None:
        for mine, theirs in (
            (self.payload_bytes, other.payload_bytes),
            (self.overhead_bytes, other.overhead_bytes),
            (self.messages, other.messages),
        ):
            mine.update(theirs)
        self.connections.update(other.connections)

    def on_the_wire(self, direction: str) -> int:
        """All bytes of the connections; 0 where they were not counted."""
        counts = list(self.connections.values())
        return sum(one.sent if direction == "sent" else one.received for one in counts)

    def total_bytes(self, direction: str) -> int:
        """Of messages, without what the protocols below them add."""
        counters = (self.payload_bytes, self.overhead_bytes)
        return sum(size for counter in counters for key, size in counter.items() if key[0] == direction)

    def received(self, kind: str) -> int:
        """Messages of a kind that have come."""
        return sum(count for (way, which, _), count in self.messages.items() if (way, which) == ("received", kind))

    def rows(self) -> list[dict[str, str | int]]:
        """JSON-ready: a row for each direction, kind and codec, and what the protocols below took, if known."""
        rows: list[dict[str, str | int]] = [
            {
                "direction": key[0],
                "kind": key[1],
                "codec": key[2],
                "messages": self.messages[key],
                "payload_bytes": self.payload_bytes[key],
                "overhead_bytes": self.overhead_bytes[key],
            }
            for key in sorted(self.messages)
        ]
        for direction in ("received", "sent"):
            size = self.on_the_wire(direction)
            if not size:
                continue
            rows.append(
                {
                    "direction": direction,
                    "kind": "protocols",
                    "codec": "",
                    "messages": 0,
                    "payload_bytes": 0,
                    "overhead_bytes": max(0, size - self.total_bytes(direction)),
                }
            )
        return rows


@dataclass
class Coding:
    """What a codec has done on this side."""

    encode_values: int = 0
    encode_seconds: float = 0.0
    decode_values: int = 0
    decode_seconds: float = 0.0


@dataclass
class Ledger:
    """Counts while a task runs; `summary` gives what a report shows.

    slow_down: emulates a machine that is so many times slower: after each piece of computing it waits until so many
    times the processor's time for it have passed, and counts that as computing. The processor's time, of this thread,
    and not the clock's: so what else the machine does is not multiplied.
    """

    slow_down: float = 1.0
    prices: Prices = field(default_factory=Prices)
    flops: float = 0.0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    link_seconds: float = 0.0
    coding: dict[str, Coding] = field(default_factory=dict)
    codec_memory_bytes: int = 0
    compute_by_work: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    traffic: Traffic = field(default_factory=lambda: Traffic())
    _flops_of: dict[Hashable, float] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _cpu_started: float = field(default_factory=time.process_time)
    _rapl_started: float | None = field(default_factory=lambda: _rapl_joules())

    @contextmanager
    def computing(self, work: Hashable, idle: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
        """Times the work; counts its FLOPs the first time that this `work` (a name and shapes) is done.

        idle: seconds of it, at its end, in which nothing was computed."""
        known = self._flops_of.get(work)
        counter = _FlopCounter() if known is None else None
        start, own = time.perf_counter(), time.thread_time()
        try:
            with counter or nullcontext():
                yield
        finally:
            seconds = self.slowed(time.perf_counter() - start - idle(), time.thread_time() - own)
            self.compute_seconds += seconds
            self.compute_by_work[str(work[0] if isinstance(work, tuple) else work)] += seconds
        if counter is not None:
            self._flops_of[work] = known = counter.total
        self.flops += known or 0.0

    def slowed(self, seconds: float, own: float) -> float:
        """Computing took so long by the clock, and so long of the processor (an accelerator's time is the clock's):
        waits as `slow_down` says; returns what it took in all."""
        if self.slow_down <= 1:
            return seconds
        rest = self.slow_down * (seconds if torch.cuda.is_initialized() else own) - seconds
        if rest > 0:
            time.sleep(rest)
        return seconds + max(0.0, rest)

    def waited(self, seconds: float, link_seconds: float) -> None:
        """This side had nothing to do for `seconds`, `link_seconds` of them because of the link."""
        self.wait_seconds += seconds
        self.link_seconds += min(seconds, max(0.0, link_seconds))

    def coded(self, codec: str, what: str, values: int, seconds: float, memory_bytes: int) -> None:
        """A codec has encoded or decoded (`what`) a tensor; memory_bytes: what the session's codecs remember now."""
        mine = self.coding.setdefault(codec, Coding())
        if what == "encode":
            mine.encode_values += values
            mine.encode_seconds += seconds
        else:
            mine.decode_values += values
            mine.decode_seconds += seconds
        self.codec_memory_bytes = max(self.codec_memory_bytes, memory_bytes)

    def summary(self) -> dict[str, object]:
        """JSON-ready. Energy is that of this process's processor time (estimate) or of the whole package (RAPL)."""
        joules, source = self._energy()
        hours = (time.monotonic() - self._started) / 3600
        money = (
            hours * self.prices.device_hour
            + joules / 3.6e6 * self.prices.kilowatt_hour
            + self.traffic.total_bytes("sent") / 1e9 * self.prices.gigabyte_sent
        )
        return {
            "flops": self.flops,
            "compute_seconds": self.compute_seconds,
            "wait_seconds": self.wait_seconds,
            "link_seconds": self.link_seconds,
            "encode_seconds": sum(coding.encode_seconds for coding in self.coding.values()),
            "decode_seconds": sum(coding.decode_seconds for coding in self.coding.values()),
            "codec_memory_bytes": self.codec_memory_bytes,
            "peak_bytes": peak_bytes(),
            "accelerator_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "energy_joules": joules,
            "energy_source": source,
            "money": money,
            "currency": self.prices.currency,
            "bytes_sent": self.traffic.total_bytes("sent"),
            "bytes_received": self.traffic.total_bytes("received"),
            "wire_bytes_sent": self.traffic.on_the_wire("sent"),
            "wire_bytes_received": self.traffic.on_the_wire("received"),
            "traffic": self.traffic.rows(),
        }

    def _energy(self) -> tuple[float, str]:
        now = _rapl_joules()
        if now is not None and self._rapl_started is not None and now >= self._rapl_started:
            return now - self._rapl_started, "rapl"
        return (time.process_time() - self._cpu_started) * WATTS_OF_A_BUSY_CORE, "estimated"


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _cpu_attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_aten = torch.ops.aten
_FORMULAS = {  # torch's own, and attention on a processor, which it lacks
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class _FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of the operators that this thread runs. torch's own FlopCounterMode hooks every module of
    the process, which several trainers in one process do not survive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def peak_bytes() -> int:
    """The largest resident memory that this process has had, in bytes.

    From /proc and not from getrusage, whose maximum a process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: memory cannot be measured on this system")


def _rapl_joules() -> float | None:
    try:
        return int(_RAPL.read_text()) / 1e6
    except (OSError, ValueError):
        return None
