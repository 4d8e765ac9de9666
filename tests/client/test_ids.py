"""Names in a coordinator's messages: none of them leads a device out of its state folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from isthmus.client import daemon, generate, runner
from isthmus.client.daemon import Daemon
from isthmus.client.identity import Identity
from isthmus.client.runner import DeviceOptions, Runner
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import stage_pb2, stage_pb2_grpc
from isthmus.split.errors import BadFrame, BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.coding import Terms
from isthmus.split.link.device import GrpcLink
from isthmus.split.models.source import ModelFolder
from isthmus.split.resources.ledger import Ledger
from isthmus.split.tls import Credentials
from tests.split.tiny_models import make_model

NO_IDS = ["../outside", "/tmp/outside", "..", ".", "", "a/b", "job\n", "x" * 64, "x" * 10_000_000]


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity(tmp_path / "state", "edge", "127.0.0.1", 1, Credentials(b"", b"", b""))


@pytest.fixture
def options(tmp_path: Path) -> DeviceOptions:
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(f"The bridge over stream {number} is closed." for number in range(40)))
    return DeviceOptions(tmp_path / "state", {"notes": text})


def training_task(task: str, job: str) -> pb.Task:
    training = TrainingConfig.of(sequence_length=16).to_json()
    spec = pb.JobSpec(method="splitlora", model="default", dataset="notes", training=training)
    return pb.Task(id=task, job=job, spec=spec, stage_address="127.0.0.1:1")


@pytest.mark.parametrize("field", ["id", "job"])
@pytest.mark.parametrize("bad", NO_IDS)
def test_a_task_with_no_id_fails_before_anything_is_done_for_it(
    identity: Identity, options: DeviceOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, field: str, bad: str
) -> None:
    folders: list[Path] = []
    model = ModelFolder(make_model(tmp_path / "model", "llama", layers=2))
    monkeypatch.setattr(runner, "channel", lambda *_: SimpleNamespace(__enter__=None))
    monkeypatch.setattr(Runner, "_weights", lambda *_, **__: (model, [], "digest"))
    monkeypatch.setattr(runner, "DeviceRecord", folders.append)  # which reads, writes and deletes there
    monkeypatch.setattr(Runner, "_until_done", lambda *_: None)
    told: list[pb.TaskState] = []
    fine = training_task("k3v9x2ab-0011aabb", "k3v9x2ab")
    Runner(fine, identity, options, told.append).run()
    assert told[-1].state == pb.TaskState.DONE
    assert folders == [tmp_path / "state" / "jobs" / "k3v9x2ab"]
    setattr(fine, field, bad)
    Runner(fine, identity, options, told.append).run()
    assert told[-1].state == pb.TaskState.FAILED
    assert f"is not a {'task' if field == 'id' else 'job'}'s id" in told[-1].message
    assert len(told[-1].message) < 400
    assert len(folders) == 1


def test_a_coordinator_that_calls_a_device_what_is_no_name_is_left(
    identity: Identity, options: DeviceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub:
        def __init__(self, _: object) -> None: ...

        async def Session(self, _: AsyncIterator[pb.DeviceMessage]) -> AsyncIterator[pb.CoordinatorMessage]:
            yield pb.CoordinatorMessage(welcome=pb.Welcome(name="edge\n\x1b[2J", heartbeat_seconds=5))

    class Opened:
        async def __aenter__(self) -> None: ...
        async def __aexit__(self, *_: object) -> None: ...

    monkeypatch.setattr(daemon, "aio_channel", lambda *_: Opened())
    monkeypatch.setattr(daemon, "CoordinatorStub", Stub)
    with pytest.raises(BadRequest, match=r"'edge\\n\\x1b\[2J' is not a name"):
        asyncio.run(Daemon(identity, options)._session())


def test_a_served_model_of_no_job_is_not_used(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        def __init__(self, _: object) -> None: ...

        def FindServed(self, *_: object, **__: object) -> pb.Served:
            return pb.Served(job="../outside", gateway=":1", serving="{}")

    class Opened:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(generate, "channel", lambda *_: Opened())
    monkeypatch.setattr(generate, "CoordinatorStub", Stub)
    with pytest.raises(BadRequest, match=r"'\.\./outside' is not a job's id"):
        generate.find(identity)


class Stage(stage_pb2_grpc.StageServicer):
    """Answers a probe, with these fields in place of the question's."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def Exchange(self, requests: Iterator[stage_pb2.Frame], _: Any) -> Iterator[stage_pb2.Frame]:
        for question in requests:
            filling = bytes(question.probe.answer_bytes)
            answer = stage_pb2.Frame(
                job=question.job, session=question.session, phase=stage_pb2.PROBE, probe={"filling": filling}
            )
            answer.MergeFrom(stage_pb2.Frame(**self.fields))
            yield answer


@pytest.mark.parametrize("fields", [{}, {"job": "other"}, {"session": "other"}])
def test_a_device_takes_frames_of_its_own_job_and_session_alone(fields: dict[str, str]) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    stage_pb2_grpc.add_StageServicer_to_server(Stage(**fields), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            link = GrpcLink(channel, "job", "session", Terms(TrainingConfig(), 1, (), 0), Ledger())
            try:
                if fields:
                    with pytest.raises(BadFrame, match=r"a frame (for job 'other'|of another session)"):
                        link.measure()
                else:
                    assert link.measure().round_trip > 0
            finally:
                link.close()
    finally:
        server.stop(None)
