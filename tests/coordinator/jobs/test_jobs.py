"""Jobs without Ray: what becomes of a job whose stage cannot do its work."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from isthmus.coordinator.control.database import Database
from isthmus.coordinator.control.sessions import Session, Sessions
from isthmus.coordinator.jobs.jobs import Jobs
from isthmus.coordinator.stages.stage_actor import StageTask
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadRequest, IsthmusError, NotAllowed, NotFound, WrongState
from isthmus.split.inference.serving import ServingConfig, parse_stages
from isthmus.split.job.config import TrainingConfig
from isthmus.split.models.source import ModelFolder
from isthmus.split.plan.costs import Costs
from isthmus.split.plan.memory import training_bytes
from tests.split.tiny_models import make_model


def as_ray_raises(cause: Exception) -> Exception:
    """An actor's error as its caller gets it: an instance of the cause's class too, with the stack as its text."""
    error: Exception = RayTaskError("finished", "Traceback\n  many\n  lines", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (as_ray_raises(WrongState("the checkpoint cannot be read")), "the checkpoint cannot be read"),
        (as_ray_raises(IsthmusError("the stage failed: out of memory")), "the stage failed: out of memory"),
        (as_ray_raises(KeyError("x")), "the stage failed: KeyError('x')"),
        (WrongState("no port is free"), "no port is free"),
        (ActorDiedError(), "the stage's process died; --resume JOB goes on from the last checkpoint"),
        (ZeroDivisionError("y"), "a bug in the coordinator: ZeroDivisionError('y'); its log has the details"),
    ],
)
def test_a_job_whose_stage_fails_ends_with_one_line(tmp_path: Path, raised: Exception, line: str) -> None:
    async def start_stage(task: StageTask) -> tuple[Any, str]:
        raise raised

    async def measure(quiet: bool) -> pb.Profile:
        raise AssertionError("a training job needs no measurement")

    async def story() -> pb.Job:
        database, sessions = Database(tmp_path / "state.db"), Sessions()
        device = pb.Profile(datasets=[pb.Dataset(name="notes")], task_kinds=["splitlora"])
        await sessions.opened(Session("edge", "1", device))
        jobs = Jobs(database, sessions, tmp_path, start_stage, measure, measure)
        model = make_model(tmp_path / "model", "llama", layers=2)
        training = TrainingConfig.of(sequence_length=16).to_json()
        spec = pb.JobSpec(method="splitlora", model=str(model), dataset="notes", device_count=1, training=training)
        job = await jobs.submit(spec, "")
        last = [event async for event in jobs.events(job.id, 0)][-1]
        assert last.HasField("state")
        ended = database.jobs.get(job.id)
        assert jobs.job_of("edge") == ""
        database.close()
        return ended

    ended = asyncio.run(asyncio.wait_for(story(), 60))
    assert ended.state == pb.FAILED
    assert ended.message == line.replace("JOB", ended.id)


@pytest.mark.parametrize("method", ["splitlora", "dlora"])
def test_a_resumed_job_keeps_a_rank_that_would_be_another_now(tmp_path: Path, method: str) -> None:
    """Its stage dies before there is a checkpoint; meanwhile the device has got more memory."""
    shapes: list[dict[str, list[int]]] = []

    async def start_stage(task: StageTask) -> tuple[Any, str]:
        shapes.append(task.shapes)
        raise ActorDiedError

    async def measure(quiet: bool) -> pb.Profile:
        raise AssertionError("a training job needs no measurement")

    async def measure_training() -> float:
        return 1e10

    async def story() -> None:
        database, sessions = Database(tmp_path / "state.db"), Sessions()
        jobs = Jobs(database, sessions, tmp_path, start_stage, measure, measure_training)
        model = make_model(tmp_path / "model", "llama", layers=4)
        config = TrainingConfig.of(sequence_length=16, ranks="auto", method=method)
        costs = Costs(ModelFolder(model).config, config)
        spec = pb.JobSpec(method=method, model=str(model), dataset="notes", device_count=1, training=config.to_json())

        async def run(memory: float, resume: str = "") -> str:
            link = stage_pb2.Measured(round_trip_seconds=0.001, up_bytes_per_second=1e9, down_bytes_per_second=1e9)
            device = pb.Profile(
                datasets=[pb.Dataset(name="notes")], task_kinds=[method], training_flops=1e9, memory_bytes=int(memory),
                link=link,
            )  # fmt: skip
            await sessions.opened(Session("edge", "1", device))
            job = await jobs.submit(spec, resume)
            async for _ in jobs.events(job.id, 0):
                pass
            return job.id

        first = await run(training_bytes(costs, 1, 4) / 0.9 + 1)
        await run(2**36, resume=first)
        await run(2**36)
        database.close()

    asyncio.run(asyncio.wait_for(story(), 60))
    assert shapes == [{"edge": [1, 4]}, {"edge": [1, 4]}, {"edge": [1, 8]}]


class Gateway:
    """In the place of a gateway's actor: it is there, and remembers whom it lets in."""

    def __init__(self) -> None:
        self.allowed: dict[str, str] = {}
        self.allow, self.revoke, self.finished, self.stop, self.resources = map(
            _Remote, (self._allow, self._revoke, self._ever, self._stop, self._resources)
        )

    async def _allow(self, device: str, serial: str) -> None:
        self.allowed[device] = serial

    async def _revoke(self, device: str) -> None:
        self.allowed.pop(device, None)

    async def _ever(self) -> None:
        await asyncio.Event().wait()

    async def _stop(self) -> None:
        pass

    async def _resources(self) -> dict[str, Any]:
        return {"gateway": {"bytes_sent": len(self.allowed), "energy_joules": math.inf}}


class _Remote:
    def __init__(self, call: Any) -> None:
        self.remote = call


def test_a_device_finds_the_models_that_it_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.coordinator.jobs.driver.ray.kill", lambda actor: None)
    gateways: list[Gateway] = []
    ready = asyncio.Event()

    async def start_stage(task: Any) -> tuple[Any, str]:
        await ready.wait()
        gateways.append(Gateway())
        return gateways[-1], f":{len(gateways)}"

    async def measure(quiet: bool) -> pb.Profile:
        return pb.Profile()

    async def running(database: Database, job: pb.Job, jobs: Jobs) -> None:
        async for _ in jobs.events(job.id, 0):
            if database.jobs.get(job.id).state == pb.RUNNING:
                return

    async def story() -> None:
        database, sessions = Database(tmp_path / "state.db"), Sessions()
        for name in ("laptop", "phone"):
            database.devices.redeem_token(database.devices.create_token(name)[0], f"serial-{name}")
        jobs = Jobs(database, sessions, tmp_path, start_stage, measure, measure)
        model = make_model(tmp_path / "model", "llama", layers=2)

        async def serve(name: str, *users: str) -> pb.Job:
            config = ServingConfig.of(
                spans=parse_stages("cloud:0-1,cloud:1-2"), name=name, users=users, key_sha256="secret"
            )
            return await jobs.submit(pb.JobSpec(method="serve", model=str(model), serving=config.to_json()), "")

        with pytest.raises(NotFound, match="nobody"):
            await serve("m", "nobody")
        with pytest.raises(NotFound, match="no model is served that device laptop may use; there is: none"):
            await jobs.served.find("", "laptop", "serial-laptop")
        one = await serve("one", "laptop")
        with pytest.raises(WrongState, match="one is not served yet"):
            await jobs.served.find("", "laptop", "serial-laptop")
        ready.set()
        await running(database, one, jobs)
        for name in ("", "one", one.id):
            found = await jobs.served.find(name, "laptop", "serial-laptop")
            assert (found.job, found.gateway) == (one.id, ":1")
            assert "secret" not in found.serving
        assert gateways[0].allowed == {"laptop": "serial-laptop"}
        with pytest.raises(NotAllowed, match="device phone may not use one"):
            await jobs.served.find("one", "phone", "serial-phone")
        with pytest.raises(NotFound, match="no model 'two' is served that device laptop may use; there is: one"):
            await jobs.served.find("two", "laptop", "serial-laptop")
        assert jobs.served.user_weights(one.id, "laptop", 1).manifest.tensors.keys() == {
            name
            for name in jobs.served.user_weights(one.id, "laptop", 1).folder.tensor_names()
            if ".layers.1." not in name
        }
        with pytest.raises(NotAllowed, match="device phone may not use job"):
            jobs.served.user_weights(one.id, "phone", 0)
        with pytest.raises(BadRequest, match="may have 0, 1 of its blocks, not 2"):
            jobs.served.user_weights(one.id, "laptop", 2)
        two = await serve("two", "laptop", "phone")
        await running(database, two, jobs)
        with pytest.raises(BadRequest, match=f"several models are served: one .{one.id}., two .{two.id}.; name one"):
            await jobs.served.find("", "laptop", "serial-laptop")
        await jobs.served.find("two", "laptop", "serial-laptop")
        now = json.loads(await jobs.report(two.id))
        assert (now["job"], now["method"]) == (two.id, "serve")
        assert now["gateway"] == {"bytes_sent": 1, "energy_joules": None}
        assert not database.jobs.get(two.id).report  # it goes on
        await jobs.revoke("laptop")
        assert [gateway.allowed for gateway in gateways] == [{}, {}]
        for job in (one, two):
            await jobs.cancel(job.id)
            assert database.jobs.get(job.id).state == pb.CANCELLED
            ended = json.loads(await jobs.report(job.id))
            assert ended["gateway"]["bytes_sent"] == 0  # as it was at the end
            assert json.loads(database.jobs.get(job.id).report) == ended
        database.close()

    asyncio.run(asyncio.wait_for(story(), 60))
