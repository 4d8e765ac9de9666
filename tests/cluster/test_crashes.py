"""Processes that die in the middle of a job, and what is left of the job: all of it, from the last checkpoint on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from isthmus.coordinator.connection import Connection
from isthmus.coordinator.emulation.local_cluster import LocalCluster, alive_after, submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.data.sequences import sequences_of_file
from isthmus.split.job.config import TrainingConfig
from isthmus.split.models.source import ModelFolder
from tests.cluster.house import LIMIT, TINY, House, ended, events_of, events_until, step_reached, succeeded
from tests.split.jobs import split_run

pytestmark = pytest.mark.cluster


@pytest.mark.processes
def test_a_device_that_is_killed_and_started_again_rejoins_its_job(house: House) -> None:
    config = TINY.but(steps=200, aggregate_every=5, checkpoint_every=50)
    with house.connect() as connection:
        job = house.submit(connection, config, ["d0"])
        step_reached(connection, job, 20)
        house.cluster.kill("d0")
        left = events_until(connection, job, lambda event: event.HasField("left"))
        house.start("d0")
        report = succeeded(connection, job)
        joined = [event.number for event in events_of(connection, job, "joined")]
        steps = [(event.number, event.step.step) for event in events_of(connection, job, "step")]
    assert left.left.done is False
    assert len(joined) == 2
    assert joined[0] < left.number < joined[1]
    before = [step for number, step in steps if number < left.number]
    after = [step for number, step in steps if number > left.number]
    merged = after[0] - 1  # the last aggregation: what the device alone knew of later steps has gone with it
    assert merged % config.devices.aggregate_every == 0
    assert before[-1] - config.devices.aggregate_every <= merged <= before[-1]
    assert before == list(range(1, before[-1] + 1))
    assert after == list(range(merged + 1, config.steps + 1))
    assert len(report["losses"]) == config.steps
    assert report["perplexity_after"] < report["perplexity_before"]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=[pytest.mark.processes, pytest.mark.exhaustive])],
    ids=["ended", "killed"],
)
def test_a_device_that_is_enrolled_anew_goes_on_with_its_job(house: House, number: int) -> None:
    """Its new certificate, which the stage did not know when the job began, counts there too."""
    config = TINY.but(steps=200, aggregate_every=5, checkpoint_every=50)
    with house.connect() as connection:
        job = house.submit(connection, config, ["d0"])
        step_reached(connection, job, 20)
        house.cluster.kill("d0", number)
        events_until(connection, job, lambda event: event.HasField("left"))
        shutil.rmtree(house.cluster.folder / "d0")
        house.start("d0")
        succeeded(connection, job)
        joined = events_of(connection, job, "joined")
        steps = [event.step.step for event in events_of(connection, job, "step")]
    assert len(joined) == 2
    assert steps[-1] == config.steps


@pytest.mark.processes
def test_a_job_survives_the_death_of_its_stage_and_of_its_coordinator(house: House, tmp_path: Path) -> None:
    """And its adapter is that of a job which nothing happened to, for each side keeps its optimiser's state."""
    config = TINY.but(steps=600, aggregate_every=5, checkpoint_every=20, learning_rate=1e-4)
    devices = ["d0", "d1"]
    with house.connect() as connection:
        job = house.submit(connection, config, devices)
        events_until(connection, job, lambda event: event.HasField("checkpoint"))
        coordinator = psutil.Process(house.cluster.processes["coordinator"].pid)
        with house.stopped("d0"), house.stopped("d1"):  # without whom the job does not come to its end meanwhile
            house.stage().kill()
        row = ended(connection, job)
        assert (row.state, row.checkpoint_step > 0) == (pb.FAILED, True)
        assert row.message == f"the stage's process died; --resume {job} goes on from the last checkpoint"

        submit(connection, pb.JobSpec(), resume=job)
        assert first_step_after_resume(connection, job, 1) in firsts_after(row, config)
        later = row.checkpoint_step + 20
        events_until(connection, job, lambda event: event.HasField("checkpoint") and event.checkpoint.step >= later)

    ports = house.cluster.ports
    ray = coordinator.children(recursive=True)
    assert len(ray) > 3
    house.cluster.kill("coordinator")
    started = house.cluster.start_coordinator(port=ports[0], enrolment_port=ports[1])
    assert (house.cluster.ports, started["interrupted"]) == (ports, [job])
    house.cluster.wait_connected(devices)  # by themselves
    with house.connect() as connection:
        row = connection.stub.GetJob(pb.JobRequest(id=job))
        assert row.state == pb.INTERRUPTED
        status, out, err = house.cli("finetune", "--resume", job, "--json", "--out", str(tmp_path / "adapter"))
        assert (status, err) == (0, "")
        assert first_step_after_resume(connection, job, 2) in firsts_after(row, config)
    report = json.loads(out.splitlines()[-1])
    assert not alive_after(ray, LIMIT)  # of the killed one; Ray's agents take half a minute to see it

    tokenizer = ModelFolder(house.model).tokenizer()
    texts = [sequences_of_file(house.texts[name], config.text, tokenizer) for name in devices]
    local = split_run(house.model, config, [train for train, _ in texts], [held_out for _, held_out in texts])
    assert report["losses"] == pytest.approx(local.outcome.losses, rel=1e-6)
    for name, value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, local.adapter[name.removeprefix("base_model.model.")], rtol=1e-4, atol=1e-6)


def firsts_after(row: pb.Job, config: TrainingConfig) -> range:
    """Where a resumed job may begin: after the last checkpoint that the coordinator heard of, or after a later one that
    the stage had written and not told when one of the two died."""
    return range(row.checkpoint_step + 1, config.steps + 1, config.devices.checkpoint_every)


def first_step_after_resume(connection: Connection, job: str, time: int) -> int:
    """The first step that was done after the job was resumed for the first or second time."""
    resumed = 0

    def wanted(event: pb.Event) -> bool:
        nonlocal resumed
        resumed += event.state.resumed
        return resumed == time and event.HasField("step")

    return events_until(connection, job, wanted).step.step


@pytest.mark.processes
def test_a_coordinator_that_is_told_to_stop_leaves_no_process(tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "one") as cluster:
        cluster.start_coordinator()
        process = cluster.processes["coordinator"]
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 3

        command = [
            sys.executable,
            "-m",
            "isthmus.coordinator.cli.main",
            "up",
            "--host",
            "127.0.0.1",
            "--enrolment-port",
            "0",
        ]
        command += ["--port", str(cluster.ports[0]), "--json"]
        refused = {
            cluster.state: f"another coordinator is at work in {cluster.state}",
            tmp_path / "two": f"cannot listen on 127.0.0.1:{cluster.ports[0]}: the port is taken",
        }
        for folder, line in refused.items():
            second = subprocess.run(
                [*command, "--state-dir", str(folder)],
                capture_output=True,
                text=True,
                timeout=LIMIT,
                env=dict(os.environ),
                check=False,
            )
            assert second.returncode == 1
            assert second.stderr.count("\n") == 1, second.stderr
            assert line in second.stderr
            assert second.stdout == ""

        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not alive_after(children, 30)
