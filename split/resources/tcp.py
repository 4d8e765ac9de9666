"""The kernel's counts of this process's TCP connections: bytes as the network interface sees them.

Linux keeps for every connection the bytes and segments that it sent and received (tcp_info, include/uapi/linux/tcp.h).
With the headers of each segment that is what crosses the interface: HTTP/2, TLS, retransmissions and acknowledgements
are in it, but not what has arrived a second time. gRPC does not give out its sockets, so they are found among this
process's open files by their peer.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

_SEGMENTS = struct.Struct("<II")  # segs_out, segs_in
_AT_BYTES_RECEIVED, _AT_SEGMENTS, _AT_DATA_IN, _AT_DATA_OUT, _AT_BYTES_SENT = 128, 136, 152, 156, 200
_ENOUGH = 208  # bytes of tcp_info that reach to bytes_sent: Linux 4.19 and later
_ETHERNET, _TCP = 14, 32  # bytes of headers: Ethernet; TCP with its time stamps
_LOOK_EVERY = 1.0  # seconds between looks, because each one goes through all open files
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_OFFLOADED = 65_000  # bytes that a virtual interface counts as one packet, since nobody has cut it into segments yet


@dataclass(frozen=True)
class Counted:
    """Bytes of one connection on the interface, since it was opened."""

    sent: int = 0
    received: int = 0


def counted(port: int, peer: str = "") -> dict[int, Counted]:
    """Counts of some connections of this process, by the number of the socket; empty where the kernel does not tell.

    port: connections to this port of another host count.
    peer: HOST:PORT; connections with this peer count instead.
    """
    found: dict[int, Counted] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile, or no TCP socket
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            known = _open(int(name))
            try:
                if known.type != socket.SOCK_STREAM or known.family not in _FAMILIES:
                    continue
                host, remote = known.getpeername()[:2]
                if (f"{_plain(host)}:{remote}" == peer) if peer else remote == port:
                    inode = os.fstat(known.fileno()).st_ino
                    counts = _counts(known)
                    if counts is not None:
                        found[inode] = counts
            finally:
                known.detach()  # gRPC has to close it
    return found


class Watch:
    """Keeps the counts of some connections up to date in `into`.

    port, peer: which connections, as in `counted`; none if neither is named.

    A connection that is closed keeps its last count.
    """

    def __init__(self, into: dict[int, Counted], *, port: int = 0, peer: str = "") -> None:
        self._into, self._port, self._peer = into, port, peer
        self._looked_at = -math.inf

    def look(self, *, now: bool = False) -> None:
        """Updates the counts, at most once a second unless it has to be `now`."""
        if not (self._port or self._peer) or (not now and time.monotonic() - self._looked_at < _LOOK_EVERY):
            return
        self._looked_at = time.monotonic()
        self._into.update(counted(self._port, self._peer))


def _open(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


def _counts(known: socket.socket) -> Counted | None:
    info = known.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(info) < _ENOUGH:
        return None
    (received,) = struct.unpack_from("<Q", info, _AT_BYTES_RECEIVED)
    (sent,) = struct.unpack_from("<Q", info, _AT_BYTES_SENT)
    segments_out, segments_in = _SEGMENTS.unpack_from(info, _AT_SEGMENTS)
    (data_in,) = struct.unpack_from("<I", info, _AT_DATA_IN)
    (data_out,) = struct.unpack_from("<I", info, _AT_DATA_OUT)
    host = _plain(known.getsockname()[0])
    headers = _ETHERNET + (40 if ":" in host else 20) + _TCP
    if _virtual(host):
        packets_out = -(-sent // _OFFLOADED) + segments_out - data_out
        packets_in = -(-received // _OFFLOADED) + segments_in - data_in
    else:
        packets_out, packets_in = segments_out, segments_in
    return Counted(sent + headers * packets_out, received + headers * packets_in)


@lru_cache(maxsize=64)
def _virtual(address: str) -> bool:
    """Whether the interface with this address is not a real card: lo, veth, a bridge."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(_plain(one.address) == address for one in addresses):
            return not Path(f"/sys/class/net/{name}/device").exists()
    return address.startswith("127.")


def _plain(host: str) -> str:
    """An address without its zone, and an IPv4 address without its IPv6 prefix."""
    return host.partition("%")[0].removeprefix("::ffff:")
