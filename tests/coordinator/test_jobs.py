"""Jobs without Ray: what becomes of a job whose stage cannot do its work."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from coordinator.jobs import Jobs
from coordinator.sessions import Session, Sessions
from coordinator.stage_actor import StageTask
from coordinator.store import Store
from protos.v1 import coordinator_pb2 as pb
from split.config import TrainingConfig
from split.errors import IsthmusError, WrongState
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
        store, sessions = Store(tmp_path / "state.db"), Sessions()
        device = pb.Profile(datasets=[pb.Dataset(name="notes")], task_kinds=["splitlora"])
        await sessions.opened(Session("edge", "1", device))
        jobs = Jobs(store, sessions, tmp_path, start_stage, measure)
        model = make_model(tmp_path / "model", "llama", layers=2)
        training = TrainingConfig(sequence_length=16).to_json()
        spec = pb.JobSpec(method="splitlora", model=str(model), dataset="notes", device_count=1, training=training)
        job = await jobs.submit(spec, "")
        last = [event async for event in jobs.events(job.id, 0)][-1]
        assert last.kind == "state"
        ended = store.job(job.id)
        assert jobs.job_of("edge") == ""
        store.close()
        return ended

    ended = asyncio.run(asyncio.wait_for(story(), 60))
    assert ended.state == pb.FAILED
    assert ended.message == line.replace("JOB", ended.id)
