"""Devices and the coordinator measure themselves; `serve` tells what speed is to be expected, and of what one node."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from isthmus.coordinator.emulation.local_cluster import submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.inference.serving import ServingConfig
from tests.cluster.house import LIMIT, House, ended, events_until, wait_for

pytestmark = pytest.mark.cluster


def profile_of(house: House, device: str) -> pb.Profile:
    with house.connect() as connection:
        listed = connection.stub.ListDevices(pb.ListDevicesRequest()).devices
    return next(one.profile for one in listed if one.name == device)


@pytest.fixture
def measured(house: House) -> House:
    """With devices that have told all that they measure."""
    for name in ("d0", "d1", "d2"):
        wait_for(lambda name=name: profile_of(house, name).HasField("link"), f"{name} has measured its link")
    return house


def test_a_device_tells_its_speed_and_its_link(measured: House) -> None:
    profile = profile_of(measured, "d0")
    assert {(one.runtime, one.weights) for one in profile.speeds} == {
        ("torch", "float32"),
        ("onnxruntime", "float32"),
        ("onnxruntime", "int8"),
        ("onnxruntime", "int4"),
    }
    assert all(one.bytes_per_second > 1e7 for one in profile.speeds)
    assert 0 < profile.link.round_trip_seconds < 1
    _, table, _ = measured.cli("devices")
    assert "GB/s" in table
    assert "unknown" not in table


def test_serve_tells_both_predictions(measured: House) -> None:
    command = [sys.executable, "-m", "isthmus.coordinator.cli.main", "serve", "--model", str(measured.model)]
    command += ["--stages", "d0:0-2,cloud:2-4", "--credentials", str(measured.cluster.credentials)]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "is served at" in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 130
    (line,) = [line for line in lines if "is predicted at" in line]
    found = re.match(
        r"d0:0-2,cloud:2-4 is predicted at (\S+) tokens/s \(one answer at a time\); (\w+) alone has the memory and "
        r"would give (\S+?)(: use --stages \w+:0-4)?$",
        line,
    )
    assert found is not None, line
    assert (float(found[1]) < float(found[3])) == (found[4] is not None)


def test_auto_chooses_one_node_where_one_has_the_memory(measured: House) -> None:
    config = ServingConfig((), "model")
    spec = pb.JobSpec(method="serve", model=str(measured.model), serving=config.to_json(), wait_seconds=LIMIT)
    with measured.connect() as connection:
        job = submit(connection, spec).id
        plan = events_until(connection, job, lambda event: event.HasField("plan"))
        told = plan.plan
        assert told.stages == "cloud:0-4"  # which has the memory, whatever the devices' speed
        assert told.slower == (told.tokens_per_second < told.single_tokens_per_second)
        assert not told.slower or told.single in ("d0", "d1", "d2")
        events_until(connection, job, lambda event: event.HasField("serving"))
        assert not connection.stub.GetJob(pb.JobRequest(id=job)).devices
        connection.stub.CancelJob(pb.JobRequest(id=job))
        assert ended(connection, job).state == pb.CANCELLED
