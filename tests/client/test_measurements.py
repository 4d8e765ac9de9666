"""A device measures itself while it has nothing else to do, and tells what it knows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from isthmus.client import measurements
from isthmus.client.identity import Identity
from isthmus.client.measurements import DeviceMeasurements
from isthmus.client.runner import DeviceOptions
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError, LinkLost
from isthmus.split.link.profile import LinkProfile
from isthmus.split.runtime.speed import Speed, Stopped
from isthmus.split.tls import Credentials

SPEED = Speed("torch", "float32", 1e9, 0.001, 0.002)
LINK = LinkProfile(0.04, 2e6, 3e6)


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Here:
        address = "127.0.0.1:1"
        credentials = Credentials(b"", b"", b"")

    class Opened:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(measurements, "_IDLE", 0.001)
    monkeypatch.setattr(measurements, "channel", lambda *_: Opened())
    monkeypatch.setattr(measurements, "measure_link", lambda *_, **__: LINK)
    monkeypatch.setattr(measurements, "measure_apart", lambda *_, **__: [SPEED])
    return Here()


def options(state: Path, **changes: Any) -> DeviceOptions:
    return replace(DeviceOptions(state=state, data={}, device="cpu"), **changes)


def first_news(mine: DeviceMeasurements, busy: Callable[[], bool] = lambda: False) -> None:
    async def wait() -> None:
        async with asyncio.timeout(120):
            await anext(mine.news(busy))

    asyncio.run(wait())


def test_what_is_measured_is_told(identity: Identity, tmp_path: Path) -> None:
    mine = DeviceMeasurements(identity, options(tmp_path))
    assert pb.Profile(**mine.told()) == pb.Profile()
    first_news(mine)
    told = pb.Profile(**mine.told())
    assert [speed.bytes_per_second for speed in told.speeds] == [1e9]
    assert LinkProfile.from_proto(told.link) == LINK
    assert told.accelerator_bytes == 0


def test_nothing_is_measured_while_there_is_a_task_nor_before_it_has_ended(identity: Identity, tmp_path: Path) -> None:
    asked: list[int] = []

    def busy() -> bool:
        asked.append(1)
        return len(asked) < 5

    mine = DeviceMeasurements(identity, options(tmp_path))
    first_news(mine, busy)
    assert len(asked) >= 5


def test_a_task_that_comes_stops_it_and_it_is_done_later(
    identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = [False]
    tries: list[bool] = []

    def measure(*_: object, stop: Callable[[], bool]) -> list[Speed]:
        working[0] = not tries  # a task comes during the first time
        tries.append(stop())
        if stop():
            working[0] = False  # and ends
            raise Stopped
        return [SPEED]

    monkeypatch.setattr(measurements, "measure_apart", measure)
    first_news(DeviceMeasurements(identity, options(tmp_path)), lambda: working[0])
    assert tries == [True, False]


def test_only_what_the_owner_allows_is_measured(identity: Identity, tmp_path: Path) -> None:
    trains = DeviceMeasurements(identity, options(tmp_path, allow=("splitlora",)))
    first_news(trains)
    told = pb.Profile(**trains.told())
    assert told.training_flops > 0
    assert told.HasField("link")
    assert not told.speeds
    mine = DeviceMeasurements(identity, options(tmp_path, allow=("labels-leave",)))
    with pytest.raises(StopAsyncIteration):
        first_news(mine)
    assert pb.Profile(**mine.told()) == pb.Profile()


def test_a_link_that_cannot_be_measured_leaves_the_speeds(
    identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(*_: object, **__: object) -> LinkProfile:
        raise LinkLost("it does not answer")

    monkeypatch.setattr(measurements, "measure_link", older)
    mine = DeviceMeasurements(identity, options(tmp_path))
    first_news(mine)
    told = pb.Profile(**mine.told())
    assert len(told.speeds) == 1
    assert not told.HasField("link")


def test_speeds_are_measured_in_a_process_that_ends_when_it_is_stopped(tmp_path: Path) -> None:
    def children() -> list[psutil.Process]:
        return psutil.Process().children(recursive=True)

    before = {child.pid for child in children()}
    asked: list[int] = []

    def stop() -> bool:
        asked.append(len({child.pid for child in children()} - before))
        return len(asked) > 3

    with pytest.raises(Stopped):
        measurements.measure_apart(tmp_path / "speed.json", "cpu", 1, stop=stop)
    assert max(asked) == 1
    assert {child.pid for child in children()} <= before


def test_a_process_that_cannot_measure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="the process that measures ended with status"):
        measurements.measure_apart(tmp_path / "speed.json", "nothing", 1, stop=lambda: False)
