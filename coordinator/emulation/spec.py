"""The description of an emulated link, and how people write it."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

from isthmus.split.errors import BadRequest

Address = tuple[str, int]
Pair = tuple[Address, Address]  # where to listen (port 0: any free one), and the target

_MIN_RECOVERY = 0.2  # Linux waits no shorter for an acknowledgement before it sends again
_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Cut:
    """The link is down from `at` on for `seconds`, both in seconds, `at` since the link's start.

    Connections hang and go on afterwards, new ones wait; with `reset` they are broken, and new ones refused.
    """

    at: float
    seconds: float
    reset: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.at < math.inf and 0 < self.seconds < math.inf):
            raise BadRequest(f"a cut at {self.at:g} s for {self.seconds:g} s: give at of 0 or more, for above 0")

    @classmethod
    def parse(cls, text: str) -> Cut:
        """`at=30s,for=5s` or `at=30s,for=5s,reset`. Raises BadRequest."""
        words = [word.strip() for word in text.split(",")]
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        if set(fields) != {"at", "for"} or len(words) - 2 != words.count("reset") or len(words) > 3:
            raise BadRequest(f"cut {text!r} is not at=TIME,for=TIME or at=TIME,for=TIME,reset, such as at=30s,for=5s")
        return cls(parse_time(fields["at"]), parse_time(fields["for"]), "reset" in words)


@dataclass(frozen=True)
class LinkSpec:
    """What a link is like. `up` is from the side that connects to the target.

    A proxy cannot lose bytes. A lost packet (of 1448 bytes) is what TCP makes of it: it, and what follows on its
    connection, arrive later by the wait for a retransmission, max(200 ms, one round trip). Loss therefore costs
    time, not rate.
    """

    up_rate: float = math.inf  # bits of TCP payload per second
    down_rate: float = math.inf
    delay: float = 0.0  # seconds one way
    jitter: float = 0.0  # seconds; the delay is uniform in delay ± jitter, the order of bytes is kept
    loss: float = 0.0  # share of packets
    cuts: tuple[Cut, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.up_rate > 0 and self.down_rate > 0):
            raise BadRequest("a link's rate has to be above 0: give one such as 20mbit, or unlimited")
        if not (0 <= self.delay < math.inf and 0 <= self.jitter <= self.delay):
            raise BadRequest(
                f"delay {self.delay:g} s, jitter {self.jitter:g} s: neither may be below 0, nor jitter above the delay"
            )
        if not 0 <= self.loss < 1:
            raise BadRequest(f"loss {self.loss:g} is not a share of packets below 1: give one such as 1% or 0.01")
        cuts = sorted(self.cuts, key=lambda cut: cut.at)
        for one, following in itertools.pairwise(cuts):
            if one.at + one.seconds > following.at:
                raise BadRequest(f"two cuts overlap at {following.at:g} s: join them, or move one")
        object.__setattr__(self, "cuts", tuple(cuts))

    @classmethod
    def parse_short(cls, text: str) -> LinkSpec:
        """`20mbit,40ms`: the rate both ways and the round trip, half of it each way. A rate alone will do."""
        rate, _, round_trip = text.partition(",")
        bits = parse_rate(rate)
        return cls(up_rate=bits, down_rate=bits, delay=parse_time(round_trip or "0s") / 2)

    def __str__(self) -> str:
        up, down = (_rate_in_words(rate) for rate in (self.up_rate, self.down_rate))
        rates = f"{up} each way" if up == down else f"{up} up and {down} down"
        return f"{rates}, {1e3 * 2 * self.delay:g} ms there and back"

    @property
    def recovery(self) -> float:
        """Seconds by which a lost packet comes later."""
        return max(_MIN_RECOVERY, 2 * self.delay)


def parse_rate(text: str) -> float:
    """Read a rate: `20mbit` -> 20e6 bits per second, `unlimited` -> inf. Raises BadRequest."""
    if text.strip() == "unlimited":
        return math.inf
    return _parse(text, _RATES, "a rate above 0 such as 20mbit, 100kbit, 1gbit or unlimited")


def parse_time(text: str) -> float:
    """`20ms` -> 0.02 seconds. Raises BadRequest."""
    return _parse(text, _TIMES, "a time such as 20ms, 0.5s or 100us")


def parse_share(text: str) -> float:
    """`1%` or `0.01` -> 0.01. Raises BadRequest."""
    return _parse(text, {"%": 0.01, "": 1.0}, "a share of packets such as 1% or 0.01")


def _rate_in_words(bits: float) -> str:
    return "no limit of its rate" if bits == math.inf else f"{bits / 1e6:g} Mbit/s"


def _parse(text: str, units: dict[str, float], what: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([a-z%]*)", text.strip(), re.ASCII)
    if match is None or match[2] not in units:
        raise BadRequest(f"{text!r} is not {what}")
    return float(match[1]) * units[match[2]]
