"""An emulated link has the rate, the delay and the faults that it was told to have."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import random
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from isthmus.coordinator.emulation import Address, Cut, EmulatedLink, LinkSpec, LinkThread, parse_rate, parse_time
from isthmus.split.errors import BadRequest, WrongState

ANY: Address = ("127.0.0.1", 0)
LIMIT = 30.0  # seconds for what must not hang


class Ends:
    """Connections through a link, both ends in this process."""

    def __init__(self, link: LinkThread, server: socket.socket, stack: ExitStack) -> None:
        self.link, self._server, self._stack = link, server, stack

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """(the end that connected, the target's end)"""
        near = self._stack.enter_context(socket.create_connection(self.link.addresses[0], LIMIT))
        far = self._stack.enter_context(self._server.accept()[0])
        for end in (near, far):
            end.settimeout(LIMIT)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return near, far


@contextmanager
def linked(spec: LinkSpec) -> Iterator[Ends]:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(ANY))
        server.settimeout(LIMIT)
        link = stack.enter_context(LinkThread(spec, [(ANY, server.getsockname())]))
        yield Ends(link, server, stack)


def at_best(attempts: int, attempt: Callable[[], None]) -> None:
    """The machine may be busy with other things: what is measured has to be right once in a few attempts."""
    for left in reversed(range(attempts)):
        try:
            return attempt()
        except AssertionError:
            if not left:
                raise
    return None


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def receive(end: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        data = end.recv(1 << 18)
        assert data, f"the connection ended after {len(received)} of {size} bytes"
        received += data
    return bytes(received)


def measured_rate(end: socket.socket, size: int) -> float:
    """Bits per second at which `size` bytes come in, from the first of them on."""
    first = end.recv(1 << 18)
    start = time.perf_counter()
    receive(end, size - len(first))
    return 8 * (size - len(first)) / (time.perf_counter() - start)


def transfer(routes: list[tuple[socket.socket, socket.socket]], seconds: float, rates: list[float]) -> list[float]:
    """Sends for about so long from each first to each second end, all at once; the rates measured."""
    with ThreadPoolExecutor(2 * len(routes)) as pool:
        sizes = [int(rate / 8 * seconds) for rate in rates]
        for (source, _), size in zip(routes, sizes, strict=True):
            pool.submit(source.sendall, bytes(size))
        return list(pool.map(measured_rate, [sink for _, sink in routes], sizes))


def echo(end: socket.socket, pause: float = 0.0) -> None:
    """Sends back whatever comes, after a pause, until the end."""

    def serve() -> None:
        try:
            while data := end.recv(65536):
                if pause:
                    time.sleep(pause)
                end.sendall(data)
        except OSError:  # the test is over
            return

    threading.Thread(target=serve, daemon=True).start()


def round_trips(end: socket.socket, count: int) -> list[float]:
    """Seconds that each of `count` small messages takes to come back."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        end.sendall(b"message")
        receive(end, 7)
        taken.append(time.perf_counter() - start)
    return taken


@pytest.mark.parametrize(("mbit", "delay"), [(5, 0.0), (20, 0.0), (20, 0.05), (100, 0.0), (100, 0.02)])
def test_each_direction_has_its_rate_while_both_are_full(mbit: float, delay: float) -> None:
    rate = mbit * 1e6
    with linked(LinkSpec(up_rate=rate, down_rate=rate, delay=delay)) as ends:
        near, far = ends.connect()

        def attempt() -> None:
            assert transfer([(near, far), (far, near)], 1.2, [rate, rate]) == pytest.approx([rate, rate], rel=0.05)

        at_best(5, attempt)


def test_the_directions_may_have_different_rates() -> None:
    with linked(LinkSpec(up_rate=5e6, down_rate=20e6)) as ends:
        near, far = ends.connect()

        def attempt() -> None:
            rates = transfer([(near, far), (far, near)], 1.0, [5e6, 20e6])
            assert rates == pytest.approx([5e6, 20e6], rel=0.05)

        at_best(5, attempt)


def test_connections_share_one_bottleneck_evenly() -> None:
    with linked(LinkSpec(up_rate=20e6)) as ends:
        pairs = [ends.connect() for _ in range(4)]

        def attempt() -> None:
            assert transfer(pairs, 1.0, [5e6] * 4) == pytest.approx([5e6] * 4, rel=0.1)

        at_best(5, attempt)


@pytest.mark.parametrize("delay", [0.02, 0.05])
def test_a_small_message_takes_the_delay_each_way(delay: float) -> None:
    """On a busy machine everything is late: there the yardstick is an answer that takes as long without a delay."""
    at_once = LinkSpec(up_rate=20e6, down_rate=20e6)
    with linked(replace(at_once, delay=delay)) as ends, linked(at_once) as control:
        near, far = ends.connect()
        echo(far)
        asking, answering = control.connect()
        echo(answering, pause=2 * delay)

        def attempt() -> None:
            taken, yardstick = (statistics.median(round_trips(end, 15)) for end in (near, asking))
            assert taken > 2 * delay - 0.002
            assert taken < max(2 * delay, yardstick) + 0.002

        at_best(5, attempt)


def test_without_limits_it_is_fast() -> None:
    with linked(LinkSpec()) as ends:
        near, far = ends.connect()

        def attempt() -> None:
            (rate,) = transfer([(near, far)], 1.0, [1e9])
            assert rate > 3e8  # several times as much on a machine that has nothing else to do

        at_best(5, attempt)


def test_jitter_spreads_the_delay() -> None:
    with linked(LinkSpec(delay=0.02, jitter=0.015, seed=7)) as ends:
        near, far = ends.connect()
        echo(far)

        def attempt() -> None:
            taken = round_trips(near, 40)
            assert min(taken) < 0.034
            assert max(taken) > 0.046
            assert statistics.median(taken) == pytest.approx(0.04, abs=0.008)

        at_best(5, attempt)


def test_a_lost_packet_comes_a_retransmission_later_and_the_seed_decides_which() -> None:
    def lost(seed: int) -> list[int]:
        with linked(LinkSpec(delay=0.001, loss=0.08, seed=seed)) as ends:
            near, far = ends.connect()
            echo(far)
            return [number for number, taken in enumerate(round_trips(near, 50)) if taken > 0.2]

    first = lost(1)
    assert 2 <= len(first) <= 16  # 8 expected: 0.08 of 100 packets
    at_best(5, lambda: _assert_equal(lost(1), first))
    assert lost(2) != first


def _assert_equal(one: list[int], other: list[int]) -> None:
    assert one == other


def test_bytes_keep_their_order_and_value_whatever_happens_to_them() -> None:
    sent = random.Random(3).randbytes(1_000_000)
    with linked(LinkSpec(up_rate=40e6, delay=0.005, jitter=0.005, loss=0.01)) as ends:
        near, far = ends.connect()
        ends.link.set(LinkSpec(up_rate=10e6, delay=0.02, jitter=0.02, loss=0.02, cuts=(Cut(0.4, 0.2), Cut(0.7, 0.1))))
        threading.Thread(target=near.sendall, args=(sent,), daemon=True).start()
        assert receive(far, len(sent)) == sent
        until(lambda: ends.link.bytes_up == len(sent))
        assert ends.link.bytes_down == 0


def blocked_after(end: socket.socket, most: int) -> int:
    """Bytes that can be sent before the sender has to wait for half a second, or `most`."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    end.settimeout(0.5)
    sent = 0
    try:
        while sent < most:
            sent += end.send(bytes(65536))
    except TimeoutError:
        pass
    end.settimeout(LIMIT)
    return sent


def test_a_slow_link_stops_the_writer() -> None:
    with linked(LinkSpec(up_rate=100e3)) as ends:
        near, _ = ends.connect()
        assert blocked_after(near, 16 << 20) < 1 << 20


def test_a_receiver_that_does_not_read_stops_the_writer() -> None:
    with linked(LinkSpec(delay=0.001)) as ends:
        near, far = ends.connect()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sent = blocked_after(near, 256 << 20)
        assert sent < 128 << 20
        assert len(receive(far, sent)) == sent


def test_a_writer_can_end_while_it_still_reads() -> None:
    with linked(LinkSpec(up_rate=5e6, delay=0.01)) as ends:
        near, far = ends.connect()
        near.sendall(bytes(100_000))
        near.shutdown(socket.SHUT_WR)
        assert receive(far, 100_000) == bytes(100_000)
        assert far.recv(1) == b""
        far.sendall(b"the answer")
        far.close()
        assert receive(near, 10) == b"the answer"
        assert near.recv(1) == b""


@pytest.mark.parametrize("broken", ["near", "far"])
def test_a_broken_connection_is_broken_on_the_other_side_too(broken: str) -> None:
    with linked(LinkSpec(delay=0.01)) as ends:
        near, far = ends.connect()
        end, other = (near, far) if broken == "near" else (far, near)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_a_sender_learns_that_nobody_listens_any_more() -> None:
    with linked(LinkSpec(delay=0.01)) as ends:
        near, far = ends.connect()
        far.sendall(b"the last words")
        far.close()
        assert receive(near, 14) == b"the last words"
        assert near.recv(1) == b""
        deadline = time.monotonic() + LIMIT
        with pytest.raises(ConnectionError):
            _send_until(near, deadline)


def _send_until(end: socket.socket, deadline: float) -> None:
    while time.monotonic() < deadline:
        end.sendall(bytes(1000))


def test_during_a_cut_nothing_passes_and_afterwards_all_goes_on() -> None:
    with linked(LinkSpec(delay=0.02)) as ends, ThreadPoolExecutor(1) as pool:
        near, far = ends.connect()
        echo(far)
        assert max(round_trips(near, 3)) < 0.3
        start = time.perf_counter()
        ends.link.set(LinkSpec(delay=0.02, cuts=(Cut(ends.link.elapsed, 0.8),)))
        connecting = pool.submit(ends.connect)
        (taken,) = round_trips(near, 1)
        assert taken > 0.75
        connecting.result(LIMIT)
        assert time.perf_counter() - start > 0.8
        assert max(round_trips(near, 3)) < 0.3


def test_a_cut_of_the_spec_counts_from_the_start() -> None:
    with linked(LinkSpec(cuts=(Cut(0.5, 0.5),))) as ends:
        near, far = ends.connect()
        echo(far)
        ready = ends.link.elapsed
        slow = []
        while ends.link.elapsed < 1.2:
            start = ends.link.elapsed
            (taken,) = round_trips(near, 1)
            if taken > 0.25:
                slow.append((start, taken))
        assert ready < 0.5
        assert len(slow) == 1
        assert sum(slow[0]) == pytest.approx(1.0, abs=0.1)


def test_a_cut_with_reset_breaks_connections_and_refuses_new_ones_until_it_is_over() -> None:
    with linked(LinkSpec()) as ends:
        near, far = ends.connect()
        ends.link.set(LinkSpec(cuts=(Cut(ends.link.elapsed, 0.7, reset=True),)))
        begun = time.monotonic()
        for end in (near, far):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        refused = 0
        while True:
            try:
                again, target = ends.connect()
                break
            except ConnectionRefusedError:
                refused += 1
                assert time.monotonic() < begun + LIMIT
        assert refused
        assert time.monotonic() - begun > 0.65
        again.sendall(b"hello")
        assert receive(target, 5) == b"hello"


def test_a_link_can_become_slow_and_fast_again_in_the_middle() -> None:
    slow = LinkSpec(up_rate=50e3)
    with linked(LinkSpec()) as ends:
        near, far = ends.connect()
        ends.link.set(slow)
        sent = bytes(2_000_000)  # five minutes' worth
        threading.Thread(target=near.sendall, args=(sent,), daemon=True).start()
        first = far.recv(65536)
        start = time.perf_counter()
        ends.link.set(replace(slow, up_rate=math.inf))
        receive(far, len(sent) - len(first))
        assert time.perf_counter() - start < 10


def test_a_target_that_is_not_there_costs_the_connection_and_not_the_link(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as reserved:
        reserved.bind(ANY)
        target: Address = reserved.getsockname()
        with caplog.at_level(logging.WARNING), LinkThread(LinkSpec(), [(ANY, target)]) as link:
            with (
                pytest.raises(ConnectionResetError),  # which may come while `create_connection` waits
                socket.create_connection(link.addresses[0], LIMIT) as refused,
            ):
                refused.recv(1)
            assert f"the link's target 127.0.0.1:{target[1]} cannot be reached" in caplog.text
            reserved.listen()
            reserved.settimeout(LIMIT)
            with socket.create_connection(link.addresses[0], LIMIT) as taken, reserved.accept()[0] as accepted:
                taken.sendall(b"hello")
                assert receive(accepted, 5) == b"hello"


def test_each_listening_port_has_its_own_target() -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(ANY)) for _ in range(2)]
        link = stack.enter_context(LinkThread(LinkSpec(), [(ANY, server.getsockname()) for server in servers]))
        for number, (server, address) in enumerate(zip(servers, link.addresses, strict=True)):
            server.settimeout(LIMIT)
            with socket.create_connection(address, LIMIT) as near, server.accept()[0] as far:
                near.sendall(bytes([number]))
                assert receive(far, 1) == bytes([number])
        until(lambda: link.bytes_up == 2)


def test_a_taken_port_is_said_and_nothing_stays_open() -> None:
    with socket.create_server(ANY) as taken:
        address: Address = taken.getsockname()
        free = socket.create_server(ANY)
        other: Address = free.getsockname()
        free.close()
        with pytest.raises(WrongState, match=rf"cannot listen on 127\.0\.0\.1:{address[1]} .*port 0 takes any free"):
            LinkThread(LinkSpec(), [(other, ANY), (address, ANY)]).__enter__()
        socket.create_server(other).close()
        with pytest.raises(WrongState, match="cannot listen on"):
            LinkThread(LinkSpec(), [(other, ANY), (other, ANY)]).__enter__()


def test_a_stopped_link_breaks_what_is_open() -> None:
    async def story() -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(5))

        server = await asyncio.start_server(serve, *ANY)
        link = EmulatedLink(LinkSpec())
        (bound,) = await link.start([(ANY, server.sockets[0].getsockname())])
        reader, writer = await asyncio.open_connection(*bound)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        await link.stop()
        assert (link.bytes_up, link.bytes_down) == (5, 5)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        with socket.socket() as late:
            code = late.connect_ex(bound)
        writer.close()
        server.close()
        return code

    assert asyncio.run(asyncio.wait_for(story(), LIMIT)) == errno.ECONNREFUSED


def test_short_forms_are_read() -> None:
    assert LinkSpec.parse_short("20mbit,40ms") == LinkSpec(up_rate=20e6, down_rate=20e6, delay=0.02)
    assert LinkSpec.parse_short("unlimited") == LinkSpec()
    assert LinkSpec.parse_short("unlimited, 10ms") == LinkSpec(delay=0.005)
    assert [parse_rate(text) for text in ("1.5mbit", "100kbit", "1gbit")] == [1.5e6, 1e5, 1e9]
    assert [parse_time(text) for text in ("0.5s", "20ms", "100us")] == pytest.approx([0.5, 0.02, 0.0001])
    assert Cut.parse("at=30s,for=500ms,reset") == Cut(30.0, 0.5, reset=True)
    assert Cut.parse("for=5s,at=0s") == Cut(0.0, 5.0)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: LinkSpec.parse_short("20mb"), "'20mb' is not a rate above 0 such as 20mbit"),
        (lambda: LinkSpec.parse_short("-5mbit"), "'-5mbit' is not a rate"),
        (lambda: LinkSpec.parse_short("0mbit"), "rate has to be above 0"),
        (lambda: LinkSpec.parse_short("20mbit,40"), "'40' is not a time such as 20ms"),
        (lambda: LinkSpec(delay=-0.1), "neither may be below 0"),
        (lambda: LinkSpec(delay=0.01, jitter=0.02), "nor jitter above the delay"),
        (lambda: LinkSpec(delay=math.nan), "neither may be below 0"),
        (lambda: LinkSpec(loss=1.0), "loss 1 is not a share of packets below 1"),
        (lambda: LinkSpec(cuts=(Cut(1.0, 3.0), Cut(0.5, 1.0))), "two cuts overlap at 1 s"),
        (lambda: Cut(1.0, 0.0), "for above 0"),
        (lambda: Cut.parse("30s,5s"), "is not at=TIME,for=TIME"),
        (lambda: Cut.parse("at=30s,for=5s,refuse"), "is not at=TIME,for=TIME"),
        (lambda: Cut.parse("at=30s,at=31s"), "is not at=TIME,for=TIME"),
    ],
)
def test_what_makes_no_sense_is_refused_with_one_line(make: Callable[[], object], line: str) -> None:
    with pytest.raises(BadRequest) as refused:
        make()
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
