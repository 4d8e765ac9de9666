"""What devices say of themselves and of their tasks: bounded and visible where it is kept, and where it is shown."""

from __future__ import annotations

import asyncio
import contextlib
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.coordinator import servicer
from isthmus.coordinator.cli import common, devices, jobs
from isthmus.coordinator.control.database import Database
from isthmus.coordinator.control.sessions import Session, Sessions
from isthmus.coordinator.servicer import CoordinatorServicer
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.events_pb2 import Event, StateChanged
from isthmus.split import terminal
from isthmus.split.errors import BadFrame, BadRequest, IsthmusError
from isthmus.split.job.events import log_line
from isthmus.split.tls import Peer
from tests.cluster.house import run_cli

EVIL = "\nFORGED\x1b[2J\x9b31m\u202e[red]:smile:"
LABELS: list[Callable[[str], pb.Profile]] = [
    lambda text: pb.Profile(version=text),
    lambda text: pb.Profile(platform=text),
    lambda text: pb.Profile(accelerator=text),
    lambda text: pb.Profile(task_kinds=["splitlora", text]),
    lambda text: pb.Profile(datasets=[pb.Dataset(name=text)]),
    lambda text: pb.Profile(speeds=[pb.Speed(runtime=text)]),
    lambda text: pb.Profile(link=stage_pb2.Measured(codec_seconds={text: 1.0})),
]


class Tasks:
    """In the place of the jobs: what they are told of tasks."""

    def __init__(self) -> None:
        self.told: list[pb.TaskState] = []

    async def device_connected(self, _: Session) -> None: ...

    async def task_state(self, _: Session, state: pb.TaskState) -> None:
        self.told.append(state)


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    opened = Database(tmp_path / "state.db")
    opened.devices.redeem_token(opened.devices.create_token("edge")[0], "aa")
    monkeypatch.setattr(servicer, "caller", lambda *_: Peer("edge", "device", "aa"))
    yield opened
    opened.close()


def session(database: Database, *messages: pb.DeviceMessage) -> list[pb.TaskState]:
    """One whole session of a device; what came of it. Raises what it is refused with."""
    tasks: Any = Tasks()
    context: Any = None
    serving = CoordinatorServicer(database, Sessions(), tasks, b"", 0)

    async def said() -> AsyncIterator[pb.DeviceMessage]:
        for message in messages:
            yield message

    async def talk() -> None:
        async for _ in serving.Session(said(), context):
            pass

    asyncio.run(asyncio.wait_for(talk(), 60))
    told: list[pb.TaskState] = tasks.told
    return told


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("text", [EVIL, "x" * 201])
def test_a_profile_that_cannot_be_shown_is_refused_and_not_kept(
    database: Database, label: Callable[[str], pb.Profile], text: str
) -> None:
    good = label("x" * 200)
    session(database, pb.DeviceMessage(profile=good))
    assert database.devices.get("edge").profile == good
    for messages in ([label(text)], [good, label(text)]):  # the first of a session, and a later one
        with pytest.raises(BadRequest, match="has to be one line of at most 200 visible characters") as refused:
            session(database, *(pb.DeviceMessage(profile=one) for one in messages))
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 400
        assert database.devices.get("edge").profile == good


def test_what_a_device_says_of_a_task_is_bounded_and_visible_before_it_is_kept(database: Database) -> None:
    profile = pb.DeviceMessage(profile=pb.Profile(version="1"))
    state = pb.TaskState(task="job-1", state=pb.TaskState.FAILED, message=EVIL + "x" * 20_000_000)
    (told,) = session(database, profile, pb.DeviceMessage(task=state))
    assert told.message.startswith(r"\nFORGED\x1b[2J\x9b31m\u202e[red]:smile:x")
    assert len(told.message) == 2000
    state = pb.TaskState(task=EVIL, state=pb.TaskState.RUNNING)
    with pytest.raises(BadRequest, match="is not a task's id"):
        session(database, profile, pb.DeviceMessage(task=state))
    state = pb.TaskState(task="job-1")
    state.ParseFromString(state.SerializeToString() + b"\x10\x63")  # state 99
    with pytest.raises(BadFrame, match="a task in state 99"):
        session(database, profile, pb.DeviceMessage(task=state))


def job() -> pb.Job:
    spec = pb.JobSpec(model=f"/models/{EVIL.replace('/', '')}", dataset=EVIL)
    return pb.Job(id="k3v9x2ab", spec=spec, state=pb.FAILED, message=EVIL * 100_000, devices=["edge"])


class Stub:
    """Of a coordinator that has kept what an earlier version let in, or that is not honest itself."""

    def ListDevices(self, _: object) -> pb.ListDevicesReply:
        profile = pb.Profile(datasets=[pb.Dataset(name=EVIL)], version=EVIL)
        return pb.ListDevicesReply(devices=[pb.Device(name="edge", profile=profile, job=EVIL)])

    def ListJobs(self, _: object) -> pb.ListJobsReply:
        return pb.ListJobsReply(jobs=[job()])

    def GetJob(self, _: object) -> pb.Job:
        return job()

    def CancelJob(self, _: object) -> pb.Job:
        raise IsthmusError(f"refused: {EVIL}" + "x" * 1_000_000)

    def WatchJob(self, _: object) -> Iterator[Event]:
        yield Event(device=EVIL, task=pb.TaskState(task=EVIL, state=pb.TaskState.RUNNING, message=EVIL))
        yield log_line(EVIL)
        yield Event(state=StateChanged(state=pb.FAILED, message=EVIL))


@pytest.mark.parametrize("command", [["devices"], ["jobs"], ["watch", "k3v9x2ab"], ["cancel", "k3v9x2ab"]])
def test_commands_show_what_devices_and_a_coordinator_say_as_it_is(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def connected(*_: object) -> Iterator[Any]:
        yield SimpleNamespace(stub=Stub(), address="here")

    for module in (devices, jobs):
        monkeypatch.setattr(module, "connected", connected)
    for console in (terminal.console, common.errors):
        monkeypatch.setattr(console, "_width", 400)  # wide enough for a column to show it in one piece
    _, out, err = run_cli(*command)
    for written in (out, err):
        assert not {one for one in written if unicodedata.category(one) in ("Cc", "Cf", "Cs")} - {"\n"}
        assert not any(line.lstrip("│ ").startswith("FORGED") for line in written.splitlines())
        assert len(written) < 100_000
    assert r"\nFORGED\x1b[2J\x9b31m\u202e[red]:smile:" in out + err
