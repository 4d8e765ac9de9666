"""What the kernel counts on a connection is what crosses the network interface."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from isthmus.split.resources import tcp
from isthmus.split.resources.tcp import Counted, counted

pytestmark = pytest.mark.xdist_group("namespaces")  # with the same addresses: one after the other

LIMIT = 30.0
_NUMBERS = itertools.count()
NET = "198.18.77"  # of the block that is for measurements of networks (RFC 2544)

# At the other end: for each line `UP DOWN` of 8 bytes each, reads UP bytes and sends DOWN bytes.
SO_MAX_PACING_RATE = 47  # socket(7); the module socket does not name it
RATE = 10_000_000  # bytes a second: in bursts TCP sends things twice, and of what came twice a receiver keeps no count
PEER = f"""
import socket, struct
SO_MAX_PACING_RATE, RATE = {SO_MAX_PACING_RATE}, {RATE}
server = socket.create_server(("0.0.0.0", 0))
print(server.getsockname()[1], flush=True)
end, _ = server.accept()
end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
end.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, RATE)
def read(size):
    got = bytearray()
    while len(got) < size:
        data = end.recv(min(65536, size - len(got)))
        if not data:
            raise SystemExit
        got += data
    return bytes(got)
while True:
    up, down = struct.unpack("<QQ", read(16))
    read(up)
    end.sendall(bytes(down))
"""


def exchange(end: socket.socket, up: int, down: int) -> None:
    end.sendall(up.to_bytes(8, "little") + down.to_bytes(8, "little") + bytes(up))
    while down:
        data = end.recv(min(65536, down))
        assert data
        down -= len(data)


@dataclass
class Wire:
    """A pair of virtual Ethernet interfaces that nobody else uses: one here, the other in a namespace with a peer."""

    interface: str
    connection: socket.socket
    port: int

    def on_interface(self) -> Counted:
        folder = Path(f"/sys/class/net/{self.interface}/statistics")
        return Counted(*(int((folder / f"{way}_bytes").read_text()) for way in ("tx", "rx")))

    def settled(self) -> tuple[Counted, Counted]:
        """What the kernel counted on the connection, and on the interface, once the last acknowledgements are there."""
        deadline = time.monotonic() + LIMIT
        before = None
        while time.monotonic() < deadline:
            (now,) = counted(self.port).values()
            both = now, self.on_interface()
            if both == before:
                return both
            before = both
            threading.Event().wait(0.1)
        raise AssertionError("the connection does not come to rest")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture(params=["offloaded", "segments"])
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """offloaded: as virtual interfaces are, which count what nobody has cut into segments as one packet. segments: as
    real cards count, each packet of at most 1500 bytes by itself."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("a network namespace of its own needs root and the command `ip`")
    name = f"ist{os.getpid() % 100_000}x{next(_NUMBERS)}"
    with ExitStack() as undo:
        try:
            run("ip", "netns", "add", name)
            undo.callback(run, "ip", "netns", "del", name)
            run("ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
            undo.callback(run, "ip", "link", "del", f"{name}a")
            inside = ("ip", "-n", name)
            for command, interface, last in ((("ip",), f"{name}a", 1), (inside, f"{name}b", 2)):
                if request.param == "segments":
                    run(*command, "link", "set", interface, "gso_max_segs", "1")
                run(*command, "link", "set", interface, "addrgenmode", "none")  # else IPv6 says hello now and then
                run(*command, "address", "add", f"{NET}.{last}/30", "dev", interface)
                run(*command, "link", "set", interface, "up")
        except OSError as error:
            pytest.skip(f"no network namespace here: {error}")
        command = ["ip", "netns", "exec", name, sys.executable, "-c", PEER]
        peer = undo.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        undo.callback(peer.kill)
        assert peer.stdout is not None
        port = int(peer.stdout.readline())
        tcp._virtual.cache_clear()
        if request.param == "segments":
            monkeypatch.setattr(tcp, "_virtual", lambda address: False)
        connection = undo.enter_context(socket.create_connection((f"{NET}.2", port), LIMIT))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, RATE)
        yield Wire(f"{name}a", connection, port)


@pytest.mark.parametrize(
    ("up", "down", "times", "tolerance"),
    [
        (4_000_000, 0, 1, 0.02),
        (0, 4_000_000, 1, 0.02),
        (50_000, 50_000, 40, 0.02),  # tensors that a codec has made small
        (3_000, 1_000, 300, 0.04),  # of such small packets the kernel does not say how many a virtual interface had
    ],
)
def test_a_connection_is_counted_as_its_interface_counts_it(
    wire: Wire, up: int, down: int, times: int, tolerance: float
) -> None:
    connection_before, interface_before = wire.settled()
    for _ in range(times):
        exchange(wire.connection, up, down)
    connection, interface = wire.settled()
    sent = (connection.sent - connection_before.sent, interface.sent - interface_before.sent)
    received = (connection.received - connection_before.received, interface.received - interface_before.received)
    assert sent[0] >= times * up
    assert received[0] >= times * down
    whole = sent[1] + received[1]
    assert sent[0] + received[0] == pytest.approx(whole, rel=tolerance)
    for of_connection, of_interface in (sent, received):
        assert of_connection == pytest.approx(of_interface, abs=tolerance * whole)


def pair(host: str, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """A connection to a port of its own: the end that connected, and the end that accepted."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        near = stack.enter_context(socket.create_connection(server.getsockname()[:2], LIMIT))
        return near, stack.enter_context(server.accept()[0])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_each_side_finds_its_end_and_what_one_sent_the_other_received(host: str) -> None:
    with ExitStack() as stack:
        try:
            near, far = pair(host, stack)
        except OSError:
            pytest.skip(f"no {host} here")
        for _ in range(10):  # of a burst TCP may send something twice
            near.sendall(bytes(10_000))
            far.recv(10_000, socket.MSG_WAITALL)
        far.sendall(bytes(1000))
        near.recv(1000, socket.MSG_WAITALL)
        address = f"{host}:{near.getsockname()[1]}"
        until(lambda: next(iter(counted(0, address).values())).received > 100_000)
        (mine,) = counted(far.getsockname()[1]).values()
        (theirs,) = counted(0, address).values()
        assert 100_000 < mine.sent < 110_000
        assert 1000 < mine.received < 5000
        assert mine.sent == pytest.approx(theirs.received, rel=0.01)
        near.sendall(b"still open")  # looking at a socket has not closed it
        assert far.recv(10, socket.MSG_WAITALL) == b"still open"


def test_other_connections_do_not_count_and_a_closed_one_is_gone() -> None:
    with ExitStack() as stack:
        stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).connect(("127.0.0.1", 9))
        for end in socket.socketpair():
            stack.enter_context(end)
        (near, far), (other, _) = pair("127.0.0.1", stack), pair("127.0.0.1", stack)
        port = far.getsockname()[1]
        assert list(counted(port)) == [os.fstat(near.fileno()).st_ino]
        assert os.fstat(other.fileno()).st_ino not in counted(port)
        assert not counted(0, f"127.0.0.2:{near.getsockname()[1]}")
        near.close()
        assert not counted(port)


def test_several_connections_to_one_port_are_told_apart() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ends = [stack.enter_context(socket.create_connection(server.getsockname(), LIMIT)) for _ in range(3)]
        for number, end in enumerate(ends):
            end.sendall(bytes(10_000 * (number + 1)))
        found = counted(server.getsockname()[1])
        assert len(found) == 3
        for number, end in enumerate(ends):
            assert found[os.fstat(end.fileno()).st_ino].sent == pytest.approx(10_000 * (number + 1), rel=0.1)
