"""Who may call what: certificates of nobody, of another authority, of another role, of another job, of the revoked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest

from isthmus.client.cli import main as client_main
from isthmus.client.identity import enrol
from isthmus.coordinator.control.authority import Authority
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.protos.v1.stage_pb2_grpc import StageStub
from isthmus.split.errors import IsthmusError, LinkLost, NotAllowed, NotEnrolled
from isthmus.split.tls import SERVER_NAME, Credentials, channel, error_of
from tests.cluster.house import LIMIT, TINY, House, events_of, events_until, refusal, run_cli

pytestmark = pytest.mark.cluster

ENDLESS = TINY.but(steps=100_000, checkpoint_every=1000)

Call = Callable[[grpc.Channel], Any]


def list_devices(opened: grpc.Channel) -> Any:
    return CoordinatorStub(opened).ListDevices(pb.ListDevicesRequest(), timeout=LIMIT)


def open_session(opened: grpc.Channel) -> Any:
    return next(CoordinatorStub(opened).Session(iter([pb.DeviceMessage(profile=pb.Profile())]), timeout=LIMIT))


def get_manifest(opened: grpc.Channel) -> Any:
    return CoordinatorStub(opened).GetManifest(pb.ManifestRequest(job="any"), timeout=LIMIT)


def fetch(opened: grpc.Channel) -> Any:
    return list(CoordinatorStub(opened).Fetch(pb.FetchRequest(job="any"), timeout=LIMIT))


def find_served(opened: grpc.Channel) -> Any:
    return CoordinatorStub(opened).FindServed(pb.FindServedRequest(), timeout=LIMIT)


def measure_link(opened: grpc.Channel) -> Any:
    return list(CoordinatorStub(opened).MeasureLink(iter([stage_pb2.Probe()]), timeout=LIMIT))


def create_token(opened: grpc.Channel) -> Any:
    return CoordinatorStub(opened).CreateToken(pb.CreateTokenRequest(name="mine"), timeout=LIMIT)


def submit_job(opened: grpc.Channel) -> Any:
    return CoordinatorStub(opened).SubmitJob(pb.SubmitJobRequest(), timeout=LIMIT)


def export_job(opened: grpc.Channel) -> Any:
    return list(CoordinatorStub(opened).ExportJob(pb.JobRequest(id="any"), timeout=LIMIT))


def revoke_device(opened: grpc.Channel) -> Any:
    return CoordinatorStub(opened).RevokeDevice(pb.RevokeDeviceRequest(name="d0"), timeout=LIMIT)


def open_stage(opened: grpc.Channel) -> Any:
    frame = stage_pb2.Frame(job="any", session="s", phase=stage_pb2.OPEN)
    return next(StageStub(opened).Exchange(iter([frame]), timeout=LIMIT))


def outcome(address: str, credentials: Credentials | None, call: Call, ca: bytes = b"") -> IsthmusError:
    """What a caller with these credentials (None: a client that has none) is told."""
    if credentials is None:
        options = [("grpc.ssl_target_name_override", SERVER_NAME)]
        opened = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca), options)
    else:
        opened = channel(address, credentials)
    with opened:
        return error_of(refusal(lambda: call(opened)), address)


def test_each_call_is_for_the_role_that_it_is_for(house: House) -> None:
    device = house.identity("d0").credentials
    for call in (list_devices, create_token, submit_job, export_job, revoke_device):
        error = outcome(house.address, device, call)
        assert isinstance(error, NotAllowed), call
        assert str(error) == "device d0 may not make this call: it needs a certificate of the role admin"
    for call in (open_session, measure_link, get_manifest, fetch, find_served):
        error = outcome(house.address, house.user, call)
        assert isinstance(error, NotAllowed), call
        assert "it needs a certificate of the role device" in str(error)


def test_a_job_keeps_out_whoever_has_no_part_in_it_and_goes_on_without_whoever_leaves(
    house: House, tmp_path: Path
) -> None:
    stranger = enrol(tmp_path / "stranger", house.address, house.cluster.token("stranger")).credentials
    d1 = house.identity("d1").credentials
    ours = Authority.open(house.cluster.state)
    another = Authority.open(tmp_path / "another").issue_admin("me")
    forged = Credentials(ours.ca_pem, another.certificate, another.key)  # it trusts us; we do not trust it
    with house.connect() as connection:
        job = house.submit(connection, ENDLESS, ["d0", "d1", "d2"])
        events_until(connection, job, lambda event: event.HasField("step"))
        stage = stage_address(house, connection, job)

        for address, call in ((house.address, list_devices), (stage, open_stage)):
            for credentials in (None, forged):
                error = outcome(address, credentials, call, ours.ca_pem)
                assert isinstance(error, LinkLost)
                assert "does not take this certificate" in str(error) or "cannot be reached" in str(error)
        for credentials in (stranger, house.user):
            error = outcome(stage, credentials, open_stage)
            assert isinstance(error, NotAllowed)
            assert f"has no part in job {job}, or is revoked" in str(error)

        process = house.cluster.processes["d1"]
        assert house.cli("revoke", "d1", "--json")[:2] == (0, '{"name": "d1", "revoked": true}\n')
        events_until(connection, job, lambda event: event.HasField("step") and event.step.devices == ["d0", "d2"])
        assert process.wait(LIMIT) == 1
        assert house.cluster.last_line("d1").startswith("isthmus-client: device d1 is revoked: to let it in again")
        assert isinstance(outcome(stage, d1, open_stage), NotAllowed)
        for call in (open_session, list_devices):
            error = outcome(house.address, d1, call)
            assert isinstance(error, NotEnrolled)
            assert "is revoked" in str(error)

        process = house.cluster.processes["d2"]
        process.send_signal(signal.SIGTERM)
        events_until(connection, job, lambda event: event.HasField("step") and event.step.devices == ["d0"])
        assert process.wait(LIMIT) == 0
        assert house.cluster.last_line("d2").endswith("left the coordinator")

        assert connection.stub.CancelJob(pb.JobRequest(id=job)).state == pb.CANCELLED
        left = {event.device for event in events_of(connection, job, "left") if not event.left.done}
        assert left >= {"d1", "d2"}

        # Its owner gets a new token and runs the printed command with the state folder that is there.
        house.cluster.start_device("d1", {"notes": house.texts["d1"]}, arguments=["--threads", "1"])
        house.cluster.wait_connected(["d1"])
        assert isinstance(outcome(house.address, d1, open_session), NotEnrolled)  # the old certificate stays dead


def stage_address(house: House, connection: Any, job: str) -> str:
    """Where the stage listens: a device of the job that opens its session again is told its task again."""
    identity = house.identity("d0")
    with channel(identity.address, identity.credentials) as opened:
        call = CoordinatorStub(opened).Session(iter([pb.DeviceMessage(profile=pb.Profile())]), timeout=LIMIT)
        port = next(message.task.stage_address for message in call if message.WhichOneof("kind") == "task")
        call.cancel()
    return f"127.0.0.1{port}"


def test_tokens_that_were_used_or_are_too_old_are_refused_with_one_line(house: House, tmp_path: Path) -> None:
    used = house.cluster.token("late")
    enrol(tmp_path / "first", house.address, used)
    with house.connect() as connection:
        old = connection.stub.CreateToken(pb.CreateTokenRequest(name="later", lifetime_seconds=1e-3)).token
    text = str(house.texts["d0"])
    words = ["run", "--coordinator", house.address, "--data", f"notes={text}"]
    lines = []
    for number, token in enumerate((used, old, "ist1.nonsense")):
        given = {"ISTHMUS_TOKEN": token, "ISTHMUS_STATE_DIR": str(tmp_path / str(number))}
        with mock.patch.dict(os.environ, given):
            status, out, err = run_cli(*words, main=client_main)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1, err
        assert token not in err
        lines.append(err)
    assert "this token was used already: get a new one for late" in lines[0]
    assert "this token has expired: get a new one for later" in lines[1]
    assert "the token is damaged" in lines[2]
