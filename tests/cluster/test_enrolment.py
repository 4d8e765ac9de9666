"""From a token to a certificate to a call, over real sockets, and all the ways in which that has to be refused."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from isthmus.client.identity import Identity, enrol
from isthmus.coordinator.control.authority import Authority
from isthmus.coordinator.control.database import Database
from isthmus.coordinator.control.enrolment import (
    MAX_FAILURES,
    WINDOW_SECONDS,
    FailureLimit,
    _address_of,
    start_enrolment,
)
from isthmus.coordinator.control.interceptors import ErrorInterceptor, caller
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import coordinator_pb2_grpc as rpc
from isthmus.split.errors import BadRequest, IsthmusError, LinkLost, NotAllowed, NotEnrolled, WrongState
from isthmus.split.tls import (
    SERVER_NAME,
    SERVER_OPTIONS,
    Credentials,
    Token,
    aio_channel,
    bind,
    error_of,
    server_credentials,
)
from isthmus.split.tls import channel as sync_channel


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Control(rpc.CoordinatorServicer):
    """Two calls: one for anybody with a certificate, which answers who called, and one for users alone."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def ListDevices(self, request: Any, context: Any) -> pb.ListDevicesReply:
        peer = caller(context, self.database.devices)
        return pb.ListDevicesReply(devices=[pb.Device(name=f"{peer.role}/{peer.name}")])

    async def RevokeDevice(self, request: Any, context: Any) -> pb.RevokeDeviceReply:
        caller(context, self.database.devices, role="user")
        return pb.RevokeDeviceReply()


@dataclass
class House:
    """A coordinator's two servers in this process."""

    authority: Authority
    database: Database
    clock: Clock
    address: str
    enrolment_port: int

    def token(self, name: str = "edge") -> Token:
        return Token(self.database.devices.create_token(name)[0], self.authority.pin, self.enrolment_port)

    async def enrol(self, state: Path, token: Token | str) -> Identity:
        text = token if isinstance(token, str) else token.format()
        return await asyncio.to_thread(enrol, state, self.address, text)


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    clock = Clock()
    authority, database = Authority.open(folder), Database(folder / "db.sqlite", clock)
    control = grpc.aio.server(interceptors=[ErrorInterceptor()], options=SERVER_OPTIONS)
    rpc.add_CoordinatorServicer_to_server(Control(database), control)
    port = bind(control, "127.0.0.1", 0, authority.control_credentials())
    await control.start()
    enrolment, enrolment_port = await start_enrolment(authority, database.devices, "127.0.0.1", 0, port)
    try:
        yield House(authority, database, clock, f"127.0.0.1:{port}", enrolment_port)
    finally:
        await enrolment.stop(None)
        await control.stop(None)
        database.close()


def in_a_house(tmp_path: Path, story: Callable[[House], Awaitable[None]]) -> None:
    async def go() -> None:
        async with house(tmp_path / "coordinator") as it:
            await story(it)

    asyncio.run(go())


async def whoami(address: str, credentials: Credentials) -> str:
    """Who the control server says we are. Raises what a client would show."""
    async with aio_channel(address, credentials) as channel:
        try:
            reply = await rpc.CoordinatorStub(channel).ListDevices(pb.ListDevicesRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, address) from error
    return str(reply.devices[0].name)


def test_a_token_becomes_an_identity_that_the_control_server_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def story(it: House) -> None:
        token = it.token("edge-1")
        identity = await it.enrol(tmp_path / "device", token)
        assert identity.name == "edge-1"
        assert identity.address == it.address
        assert Identity.open(tmp_path / "device") == identity
        assert await whoami(identity.address, identity.credentials) == "device/edge-1"
        assert await whoami(it.address, it.authority.issue_user("me")) == "user/me"
        for secret in (token.secret, identity.credentials.key.decode().splitlines()[1]):
            assert secret not in caplog.text
        assert "device edge-1 enrolled from 127.0.0.1" in caplog.text

    in_a_house(tmp_path, story)


def test_the_blocking_channel_works_too(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        def call() -> Any:
            with sync_channel(it.address, it.authority.issue_user("me")) as channel:
                return rpc.CoordinatorStub(channel).ListDevices(pb.ListDevicesRequest(), timeout=10)

        assert (await asyncio.to_thread(call)).devices[0].name == "user/me"

    in_a_house(tmp_path, story)


def test_what_a_device_keeps_is_only_for_its_owner(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        state = tmp_path / "device"
        old = os.umask(0)
        try:
            await it.enrol(state, it.token())
        finally:
            os.umask(old)
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in state.iterdir()}
        assert files == dict.fromkeys(["ca.pem", "cert.pem", "key.pem", "coordinator.json"], 0o600)

    in_a_house(tmp_path, story)


def test_a_used_an_expired_and_a_made_up_token_are_refused_and_leave_no_identity(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(it: House) -> None:
        used = it.token()
        await it.enrol(tmp_path / "first", used)
        expired = it.token()
        it.clock.now += 3600
        made_up = Token("A" * 32, it.authority.pin, it.enrolment_port)
        for token, message in [(used, "used already"), (expired, "expired"), (made_up, "not known")]:
            with pytest.raises(NotEnrolled, match=message):
                await it.enrol(tmp_path / "second", token)
            assert message in caplog.text  # on the coordinator's side too
            assert token.secret not in caplog.text
        assert Identity.open(tmp_path / "second") is None
        with pytest.raises(BadRequest, match="not an enrolment token"):
            await it.enrol(tmp_path / "second", "hello")

    in_a_house(tmp_path, story)


def test_a_token_of_another_coordinator_is_never_shown_to_this_one(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        elsewhere = Authority.open(tmp_path / "elsewhere")
        good = it.token()
        with pytest.raises(NotEnrolled, match="not the coordinator that the token was made for"):
            await it.enrol(tmp_path / "device", Token(good.secret, elsewhere.pin, good.port))
        assert it.database.devices.token_name(good.secret) == "edge"  # still unused

    in_a_house(tmp_path, story)


def test_a_failed_enrolment_keeps_the_identity_that_was_there(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        first = await it.enrol(tmp_path / "device", it.token())
        with pytest.raises(NotEnrolled):
            await it.enrol(tmp_path / "device", Token("A" * 32, it.authority.pin, it.enrolment_port))
        assert Identity.open(tmp_path / "device") == first
        assert await whoami(it.address, first.credentials) == "device/edge"

    in_a_house(tmp_path, story)


def test_a_coordinator_that_is_not_there_gives_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    token = Token("A" * 32, b"\0" * 32, port)
    with pytest.raises(LinkLost, match=r"cannot be reached: Connection refused; is `isthmus up` running"):
        enrol(tmp_path / "device", f"127.0.0.1:{port}", token.format())


def test_a_request_that_cannot_be_signed_does_not_cost_the_token(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        token = it.token()
        credentials = grpc.ssl_channel_credentials(it.authority.ca_pem)
        options = [("grpc.ssl_target_name_override", "enrolment.isthmus")]
        async with grpc.aio.secure_channel(f"127.0.0.1:{it.enrolment_port}", credentials, options) as channel:
            stub = rpc.EnrolmentStub(channel)
            for csr, status in [
                (b"nonsense", grpc.StatusCode.INVALID_ARGUMENT),
                (b"x" * 100_000, grpc.StatusCode.RESOURCE_EXHAUSTED),  # not even read
            ]:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Enroll(pb.EnrollRequest(token=token.secret, csr=csr), timeout=10)
                assert caught.value.code() is status
        assert it.database.devices.token_name(token.secret) == "edge"

    in_a_house(tmp_path, story)


def test_of_racing_devices_with_one_token_exactly_one_is_enrolled(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        token = it.token()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(6))
        results = await asyncio.gather(
            *(it.enrol(tmp_path / f"device{number}", token) for number in range(6)), return_exceptions=True
        )
        winners = [result for result in results if isinstance(result, Identity)]
        assert len(winners) == 1
        assert await whoami(it.address, winners[0].credentials) == "device/edge"
        losers = [result for result in results if not isinstance(result, Identity)]
        assert all(isinstance(loser, NotEnrolled) and "used already" in str(loser) for loser in losers)

    in_a_house(tmp_path, story)


def test_a_revoked_device_is_put_out_and_a_fresh_token_lets_it_in(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        first = await it.enrol(tmp_path / "device", it.token())
        it.database.devices.revoke("edge")
        with pytest.raises(NotEnrolled, match="device edge is revoked"):
            await whoami(it.address, first.credentials)
        second = await it.enrol(tmp_path / "device", it.token())
        assert await whoami(it.address, second.credentials) == "device/edge"
        with pytest.raises(NotEnrolled, match="enrolled again since"):
            await whoami(it.address, first.credentials)

    in_a_house(tmp_path, story)


def test_a_device_may_not_make_a_users_call(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        identity = await it.enrol(tmp_path / "device", it.token())
        async with aio_channel(it.address, identity.credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc.CoordinatorStub(channel).RevokeDevice(pb.RevokeDeviceRequest(), timeout=10)
        assert isinstance(error_of(caught.value, it.address), NotAllowed)
        assert "for a user's certificate" in str(caught.value.details())

    in_a_house(tmp_path, story)


def test_the_control_server_wants_a_client_certificate_of_its_own_authority(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        ca, stranger = it.authority.ca_pem, Authority.open(tmp_path / "elsewhere").issue_user("me")
        server_certificate, server_key = it.authority.issue_server()
        refused = "does not take this certificate"
        with pytest.raises(LinkLost, match=refused):
            await whoami(it.address, Credentials(ca, stranger.certificate, stranger.key))
        with pytest.raises(LinkLost, match=refused):
            await whoami(it.address, Credentials(ca, server_certificate, server_key))
        options = [("grpc.ssl_target_name_override", SERVER_NAME)]
        async with grpc.aio.secure_channel(it.address, grpc.ssl_channel_credentials(ca), options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc.CoordinatorStub(channel).ListDevices(pb.ListDevicesRequest(), timeout=10)
        assert refused in str(error_of(caught.value, it.address))
        with pytest.raises(NotEnrolled, match="not the coordinator that this certificate is from"):
            await whoami(it.address, stranger)  # which trusts only its own authority

    in_a_house(tmp_path, story)


def test_a_device_cannot_pose_as_the_coordinator(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        thief, victim = [await it.enrol(tmp_path / name, it.token(name)) for name in ("thief", "victim")]
        server = grpc.aio.server()
        rpc.add_CoordinatorServicer_to_server(Control(it.database), server)
        stolen = server_credentials(thief.credentials.certificate, thief.credentials.key, it.authority.ca_pem)
        port = bind(server, "127.0.0.1", 0, stolen)
        await server.start()
        try:
            with pytest.raises(NotEnrolled, match="not the coordinator"):
                await whoami(f"127.0.0.1:{port}", victim.credentials)
        finally:
            await server.stop(None)

    in_a_house(tmp_path, story)


def test_an_expired_certificate_is_noticed_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.coordinator.control.authority._CLIENT_LIFE", datetime.timedelta(hours=-1))

    async def story(it: House) -> None:
        identity = await it.enrol(tmp_path / "device", it.token())
        with pytest.raises(LinkLost, match="expired"):
            await whoami(it.address, identity.credentials)
        with pytest.raises(NotEnrolled, match=r"expired on .*enrol this device again"):
            Identity.open(tmp_path / "device")

    in_a_house(tmp_path, story)


def test_a_taken_port_gives_one_line(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        with pytest.raises(WrongState, match="the port is taken"):
            await start_enrolment(it.authority, it.database.devices, "127.0.0.1", it.enrolment_port, 1)

    in_a_house(tmp_path, story)


@pytest.mark.parametrize("damage", ["key of another", "cut certificate", "no key", "bad marker", "bad port"])
def test_a_damaged_identity_says_to_enrol_again(tmp_path: Path, damage: str) -> None:
    async def story(it: House) -> None:
        state, other = tmp_path / "device", tmp_path / "other"
        await it.enrol(state, it.token())
        await it.enrol(other, it.token("other"))

    in_a_house(tmp_path, story)
    state, marker = tmp_path / "device", tmp_path / "device" / "coordinator.json"
    if damage == "key of another":
        (state / "key.pem").write_bytes((tmp_path / "other" / "key.pem").read_bytes())
    elif damage == "cut certificate":
        (state / "cert.pem").write_bytes((state / "cert.pem").read_bytes()[:100])
    elif damage == "no key":
        (state / "key.pem").unlink()
    elif damage == "bad marker":
        marker.write_text("{")
    else:
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"port": None}))
    with pytest.raises(NotEnrolled, match=r"damaged.*enrol this device again") as caught:
        Identity.open(state)
    assert "\n" not in str(caught.value)


def test_an_address_that_keeps_failing_has_to_wait_and_others_have_not() -> None:
    clock = Clock()
    limit = FailureLimit(clock)
    for _ in range(MAX_FAILURES):
        limit.check("10.0.0.1")
        limit.failed("10.0.0.1")
    with pytest.raises(NotEnrolled, match="try again in 60 s"):
        limit.check("10.0.0.1")
    limit.check("10.0.0.2")
    clock.now += WINDOW_SECONDS
    limit.check("10.0.0.1")


def test_guessing_over_the_wire_is_stopped(tmp_path: Path) -> None:
    async def story(it: House) -> None:
        answers = []
        for number in range(MAX_FAILURES + 1):
            guess = Token(f"{number:032d}", it.authority.pin, it.enrolment_port)
            with pytest.raises(IsthmusError) as caught:
                await it.enrol(tmp_path / "device", guess)
            answers.append(str(caught.value))
        assert all("not known" in answer for answer in answers[:-1])
        assert "too many failed enrolments from 127.0.0.1" in answers[-1]
        token = it.token()
        with pytest.raises(NotEnrolled, match="too many"):
            await it.enrol(tmp_path / "device", token)
        assert it.database.devices.token_name(token.secret) == "edge"

    in_a_house(tmp_path, story)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.1.2.3:5555", "10.1.2.3"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5555", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:10.1.2.3]:5555", "10.1.2.3"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5555", "fe80::/64"),
        ("unix:", "unix:"),
    ],
)
def test_attempts_are_counted_by_host(peer: str, address: str) -> None:
    assert _address_of(peer) == address
