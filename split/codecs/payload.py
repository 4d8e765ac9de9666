"""The bytes of a payload: sections with a length in front, and what is left; every length is checked."""

from __future__ import annotations

import struct

from isthmus.split.errors import CodecError

_LENGTH = struct.Struct("<I")


class Writer:
    """Writes the bytes of a payload."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def section(self, data: bytes) -> None:
        """Write bytes with their length in front, so that a reader finds their end."""
        self._parts += [_LENGTH.pack(len(data)), data]

    def rest(self, data: bytes) -> None:
        """Write bytes of a length that the reader knows, or that go on to the end."""
        self._parts.append(data)

    def done(self) -> bytes:
        return b"".join(self._parts)

    @staticmethod
    def section_bytes(size: int) -> int:
        """Bytes that a section of `size` bytes takes."""
        return _LENGTH.size + size


class Reader:
    """Reads the bytes of a payload. Raises CodecError when it is shorter or longer than what is asked of it."""

    def __init__(self, payload: bytes) -> None:
        self._payload, self._at = memoryview(payload), 0

    def section(self, at_most: int) -> bytes:
        (size,) = _LENGTH.unpack(self.take(_LENGTH.size))
        if size > at_most:
            raise CodecError(f"a section of {size} bytes in a payload; at most {at_most} can be there")
        return self.take(size)

    def take(self, size: int) -> bytes:
        """Read exactly `size` bytes."""
        if size > len(self._payload) - self._at:
            raise CodecError(f"a payload of {len(self._payload)} bytes is too short")
        self._at += size
        return bytes(self._payload[self._at - size : self._at])

    def rest(self) -> bytes:
        return self.take(len(self._payload) - self._at)

    def done(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._payload):
            raise CodecError(f"a payload of {len(self._payload)} bytes is {len(self._payload) - self._at} too long")
