"""An emulated link for synchronous callers: in a thread, or as a process of its own."""

from __future__ import annotations

import asyncio
import json
import math
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from isthmus.coordinator.emulation.proxy import EmulatedLink
from isthmus.coordinator.emulation.spec import Address, LinkSpec, Pair
from isthmus.split.errors import LinkLost
from isthmus.split.tls import join_address

_START_SECONDS = _STOP_SECONDS = 30.0


class LinkThread:
    """A link on an event loop of its own in a thread, for synchronous callers. A context manager."""

    def __init__(self, spec: LinkSpec, pairs: Sequence[Pair]) -> None:
        self.addresses: list[Address] = []
        self._link, self._pairs = EmulatedLink(spec), pairs
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="emulated-link", daemon=True)

    def __enter__(self) -> LinkThread:
        self._thread.start()
        try:
            starting = asyncio.run_coroutine_threadsafe(self._link.start(self._pairs), self._loop)
            self.addresses = starting.result(_START_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._link.stop(), self._loop).result(_STOP_SECONDS)
        self._end()

    def set(self, spec: LinkSpec) -> None:
        """Changes the link, and returns when it is changed."""

        async def change() -> None:
            self._link.set(spec)

        asyncio.run_coroutine_threadsafe(change(), self._loop).result(_START_SECONDS)

    @property
    def elapsed(self) -> float:
        return self._link.elapsed

    @property
    def bytes_up(self) -> int:
        return self._link.bytes_up

    @property
    def bytes_down(self) -> int:
        return self._link.bytes_down

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        self._loop.close()


@dataclass
class LinkProcess:
    """A running `isthmus link`; the totals are there once it has ended."""

    addresses: list[Address]
    pid: int
    bytes_up: int = 0
    bytes_down: int = 0


@contextmanager
def link_process(spec: LinkSpec, pairs: Sequence[Pair], log: Path | None = None) -> Iterator[LinkProcess]:
    """`isthmus link` as a process of its own, so that it and what is measured do not share an interpreter.

    log: file for what it has to complain about; none: standard error. Raises LinkLost if it does not start.
    """
    command = [sys.executable, "-m", "isthmus.coordinator.cli.link", "--json", *_arguments(spec, pairs)]
    with log.open("a") if log else nullcontext() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for who started it
        )
    assert process.stdout is not None
    link: LinkProcess | None = None
    try:
        readable, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
        line = process.stdout.readline() if readable else ""
        if not line:
            said = log.read_text().strip().rpartition("\n")[2] if log else ""
            raise LinkLost(f"the link's process did not start: {said or 'see what it printed on standard error'}")
        link = LinkProcess([(host, port) for host, port in json.loads(line)["listen"]], process.pid)
        yield link
    finally:
        process.terminate()
        try:
            rest, _ = process.communicate(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            rest, _ = process.communicate()
        if link is not None and rest:
            totals = json.loads(rest.splitlines()[-1])
            link.bytes_up, link.bytes_down = totals["bytes_up"], totals["bytes_down"]


def _arguments(spec: LinkSpec, pairs: Sequence[Pair]) -> list[str]:
    """The options of `isthmus link` that mean this."""
    arguments = [f"--delay={spec.delay:.9f}s", f"--jitter={spec.jitter:.9f}s", f"--loss={spec.loss:.12f}"]
    for name, rate in (("up", spec.up_rate), ("down", spec.down_rate)):
        arguments.append(f"--{name}-rate={'unlimited' if rate == math.inf else f'{rate:.3f}bit'}")
    arguments += [f"--cut=at={cut.at:.9f}s,for={cut.seconds:.9f}s{',reset' * cut.reset}" for cut in spec.cuts]
    for listen, target in pairs:
        for name, (host, port) in (("listen", listen), ("to", target)):
            arguments.append(f"--{name}={join_address(host, port)}")
    return [*arguments, f"--seed={spec.seed}"]
