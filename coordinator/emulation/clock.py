"""The time of an emulated link, which stands still while the link is cut."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator

from isthmus.coordinator.emulation.spec import Cut

_EARLY = 0.0005  # epoll wakes up to 1 ms late: aiming half of that early, errors are as often early as late


class Clock:
    """Seconds for which the link has been up. They stand still during a cut: what it holds up goes on after it."""

    def __init__(self, cuts: tuple[Cut, ...]) -> None:
        self._cuts = cuts
        self._start = self._since = time.monotonic()  # which is the event loop's time too
        self._uptime_since = 0.0
        self._sleepers: set[asyncio.Future[None]] = set()

    def start(self) -> None:
        self._start = self._since = time.monotonic()
        self._uptime_since = 0.0

    def set(self, cuts: tuple[Cut, ...]) -> None:
        self._uptime_since, self._since = self.uptime(), time.monotonic()
        self._cuts = cuts
        for sleeper in self._sleepers:
            wake(sleeper)

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def uptime(self) -> float:
        now = time.monotonic()
        down = sum(min(end, now) - begin for begin, end in self._spans() if begin < now)
        return self._uptime_since + now - self._since - down

    def cut_now(self) -> Cut | None:
        now = self.elapsed()
        return next((cut for cut in self._cuts if cut.at <= now < cut.at + cut.seconds), None)

    def next_edge(self) -> float:
        """The event loop's time at which a cut begins or ends next."""
        edges = (self._start + edge for cut in self._cuts for edge in (cut.at, cut.at + cut.seconds))
        return min((edge for edge in edges if edge > time.monotonic()), default=math.inf)

    async def wait(self, due: Callable[[], float]) -> None:
        """Wait until that uptime, and until the link is up. `due` is asked again whenever the link was changed."""
        while True:
            now, until = time.monotonic(), self._when(due())
            if (cut := self.cut_now()) is not None:
                await self.pause_until(max(until, self._start + cut.at + cut.seconds))
            elif until > now + _EARLY:
                await self.pause_until(until - _EARLY)
            else:
                return

    async def pause_until(self, moment: float) -> None:
        """Wait until that time of the event loop, or until the link is changed."""
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        timer = loop.call_at(moment, wake, sleeper) if moment < math.inf else None
        self._sleepers.add(sleeper)
        try:
            await sleeper
        finally:
            self._sleepers.discard(sleeper)
            if timer is not None:
                timer.cancel()

    def _when(self, uptime: float) -> float:
        moment = self._since + uptime - self._uptime_since
        for begin, end in self._spans():
            if begin < moment:
                moment += end - begin
        return moment

    def _spans(self) -> Iterator[tuple[float, float]]:
        """The cuts after the last change of the link, in the event loop's time."""
        for cut in self._cuts:
            begin, end = self._start + cut.at, self._start + cut.at + cut.seconds
            if end > self._since:
                yield max(begin, self._since), end


def wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
