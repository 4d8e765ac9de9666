"""Counts of the bytes and messages that really crossed the wire."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from isthmus.split.resources.tcp import Counted

_Key = tuple[str, str, str]  # direction (sent, received), kind of message, codec of its tensor (empty if it has none)


@dataclass
class Traffic:
    """Bytes and messages by direction, kind of message and codec; tensor values apart from the rest of a message.

    These are bytes of serialised messages. What HTTP/2, TLS, TCP and IP add shows in `connections`: all bytes of each
    connection as the kernel counted them, by the number of its socket.
    """

    payload_bytes: Counter[_Key] = field(default_factory=Counter)
    overhead_bytes: Counter[_Key] = field(default_factory=Counter)
    messages: Counter[_Key] = field(default_factory=Counter)
    connections: dict[int, Counted] = field(default_factory=dict)

    def crossed(self, direction: str, kind: str, codec: str, payload: int, total: int) -> None:
        """Notes a message of `total` bytes that went over the wire, `payload` of them an encoded tensor."""
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
        """All bytes of the connections in a direction; 0 where they were not counted."""
        counts = list(self.connections.values())
        return sum(one.sent if direction == "sent" else one.received for one in counts)

    def total_bytes(self, direction: str) -> int:
        """Bytes of all messages in a direction, without what the protocols below them add."""
        counters = (self.payload_bytes, self.overhead_bytes)
        return sum(size for counter in counters for key, size in counter.items() if key[0] == direction)

    def received(self, kind: str) -> int:
        """Number of messages of a kind that have come."""
        return sum(count for (way, which, _), count in self.messages.items() if (way, which) == ("received", kind))

    def rows(self) -> list[dict[str, str | int]]:
        """Rows as JSON has them: one for each direction, kind and codec, and what the protocols below took."""
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
