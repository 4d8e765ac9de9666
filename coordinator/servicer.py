"""isthmus.v1.Coordinator on the wire: it checks who calls, translates, and leaves the rest to others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio
from google.protobuf.message import Message

from isthmus.coordinator.control import sessions
from isthmus.coordinator.control.database import Database
from isthmus.coordinator.control.interceptors import caller
from isthmus.coordinator.control.sessions import Sessions
from isthmus.coordinator.jobs.jobs import Jobs
from isthmus.coordinator.jobs.weights import DeviceWeights
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import coordinator_pb2_grpc, stage_pb2
from isthmus.split.errors import BadFrame, BadRequest, IsthmusError, LinkLost
from isthmus.split.plan.link_probe import answer
from isthmus.split.printable import check_label, printable
from isthmus.split.tls import ADMIN, DEVICE, STAGE, EnrolmentToken, Peer, check_name, peer_of

HEARTBEAT_SECONDS = 5
_CHUNK = 1024 * 1024  # bytes
_MAX_PROFILE = 64 * 1024  # bytes
_MAX_TEXT = 2000  # characters kept of what a device says about a task

Context = grpc.aio.ServicerContext[Any, Any]


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServicer):
    def __init__(self, database: Database, sessions: Sessions, jobs: Jobs, pin: bytes, enrolment_port: int) -> None:
        self._database, self._sessions, self._jobs = database, sessions, jobs
        self._pin, self._enrolment_port = pin, enrolment_port

    # ---- devices ----

    async def Session(
        self, requests: AsyncIterator[pb.DeviceMessage], context: Context
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        peer = self._caller(context, DEVICE)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("kind") != "profile":
            raise BadFrame("a session begins with the device's profile")
        session = sessions.Session(peer.name, peer.serial, first.profile)
        self._know(session, first.profile)
        await self._sessions.opened(session)
        welcome = pb.Welcome(name=peer.name, heartbeat_seconds=HEARTBEAT_SECONDS)
        session.send(pb.CoordinatorMessage(welcome=welcome))
        await self._jobs.device_connected(session)
        reading = asyncio.create_task(self._read(session, requests))
        try:
            async for message in session.messages():
                yield message
            if reading.done():
                reading.result()  # raises what ended it
            else:
                self._database.devices.check_certificate(peer.name, peer.serial)  # so that a revoked device is told so
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, IsthmusError):
                await reading
            await self._sessions.ended(session)

    async def _read(self, session: sessions.Session, requests: AsyncIterator[pb.DeviceMessage]) -> None:
        """Reads until the device closes its side. Raises LinkLost when it is silent for three heartbeats."""
        try:
            while True:
                try:
                    async with asyncio.timeout(3 * HEARTBEAT_SECONDS):
                        message = await anext(requests, None)
                except TimeoutError:
                    raise LinkLost(f"no heartbeat for {3 * HEARTBEAT_SECONDS} s") from None
                if message is None:
                    return
                self._database.devices.seen(session.name)
                if message.WhichOneof("kind") == "task":
                    check_name(message.task.task, "a task's id")
                    if message.task.state not in pb.TaskState.State.values():
                        raise BadFrame(f"a task in state {message.task.state}: bring this coordinator up to date")
                    message.task.message = printable(message.task.message, _MAX_TEXT)
                    await self._jobs.task_state(session, message.task)
                elif message.WhichOneof("kind") == "profile":  # the device has measured something
                    self._know(session, message.profile)
        finally:
            session.end()

    def _know(self, session: sessions.Session, profile: pb.Profile) -> None:
        """Keeps a profile as it is. Raises BadRequest for one that is too large, or that has a name which is no label.

        By contrast, what a device says about a task is escaped and cut to what is allowed.
        """
        if profile.ByteSize() > _MAX_PROFILE:
            raise BadRequest(f"a profile of {profile.ByteSize()} bytes; {_MAX_PROFILE} are taken: offer fewer datasets")
        for field, text in _texts(profile):
            check_label(text, f"a profile's {field}")
        session.profile = profile
        self._database.devices.record(session.name, profile)

    async def MeasureLink(
        self, requests: AsyncIterator[stage_pb2.Probe], context: Context
    ) -> AsyncIterator[stage_pb2.Probe]:
        if peer_of(context.auth_context()).role != STAGE:  # a stage has its certificate from this process
            self._caller(context, DEVICE)
        async for message in requests:
            yield answer(message)

    async def GetManifest(self, request: pb.ManifestRequest, context: Context) -> pb.Manifest:
        return self._weights(request, context).part(request.adapter).manifest.to_proto()

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[pb.Chunk]:
        weights = self._weights(request, context)
        async for data in weights.chunks(request.digest, request.offset):
            yield pb.Chunk(data=data)

    async def FindServed(self, request: pb.FindServedRequest, context: Context) -> pb.Served:
        peer = self._caller(context, DEVICE)
        return await self._jobs.served.find(request.name, peer.name, peer.serial)

    # ---- admins ----

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.CreateTokenReply:
        self._caller(context, ADMIN)
        secret, expires = self._database.devices.create_token(request.name, request.lifetime_seconds)
        token = EnrolmentToken(secret, self._pin, self._enrolment_port)
        return pb.CreateTokenReply(token=token.format(), enrolment_port=self._enrolment_port, expires=expires)

    async def ListDevices(self, request: pb.ListDevicesRequest, context: Context) -> pb.ListDevicesReply:
        self._caller(context, ADMIN)
        devices = self._database.devices.all()
        for device in devices:
            device.connected = self._sessions.get(device.name) is not None
            device.job = self._jobs.job_of(device.name)
        return pb.ListDevicesReply(devices=devices)

    async def RevokeDevice(self, request: pb.RevokeDeviceRequest, context: Context) -> pb.RevokeDeviceReply:
        self._caller(context, ADMIN)
        self._database.devices.revoke(request.name)
        await self._jobs.revoke(request.name)
        session = self._sessions.get(request.name)
        if session is not None:
            session.end()
        return pb.RevokeDeviceReply()

    async def SubmitJob(self, request: pb.SubmitJobRequest, context: Context) -> pb.Job:
        self._caller(context, ADMIN)
        return await self._jobs.submit(request.spec, request.resume)

    async def GetJob(self, request: pb.JobRequest, context: Context) -> pb.Job:
        self._caller(context, ADMIN)
        return self._database.jobs.get(request.id)

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsReply:
        self._caller(context, ADMIN)
        jobs = self._database.jobs.all()
        for job in jobs:
            job.ClearField("report")  # GetJob has it; in time the reports of all jobs would not fit a message
        return pb.ListJobsReply(jobs=jobs)

    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> AsyncIterator[pb.Event]:
        self._caller(context, ADMIN)
        async for event in self._jobs.events(request.id, request.after):
            yield event

    async def GetReport(self, request: pb.JobRequest, context: Context) -> pb.JobReport:
        self._caller(context, ADMIN)
        return pb.JobReport(report=await self._jobs.report(request.id))

    async def CancelJob(self, request: pb.JobRequest, context: Context) -> pb.Job:
        self._caller(context, ADMIN)
        return await self._jobs.cancel(request.id)

    async def ExportJob(self, request: pb.JobRequest, context: Context) -> AsyncIterator[pb.ExportedFile]:
        self._caller(context, ADMIN)
        folder = self._jobs.adapter_folder(request.id)
        for path in sorted(folder.iterdir()):
            name = path.name
            with path.open("rb") as file:
                while True:
                    data = await asyncio.to_thread(file.read, _CHUNK)
                    if not data and not name:
                        break
                    yield pb.ExportedFile(name=name, data=data)
                    name = ""

    def _weights(self, request: pb.ManifestRequest | pb.FetchRequest, context: Context) -> DeviceWeights:
        peer = self._caller(context, DEVICE)
        check_name(request.job, "a job's id")
        if request.user:
            return self._jobs.served.user_weights(request.job, peer.name, request.blocks)
        return self._jobs.weights_for(request.job, peer.name, request.blocks)

    def _caller(self, context: Context, role: str) -> Peer:
        return caller(context, self._database.devices, role)


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    """Every text in a message and in the messages in it, keys of maps included, each with its field's name."""
    for field, value in message.ListFields():
        for one in (value,) if isinstance(value, str | bytes | int | float | Message) else value:
            if isinstance(one, Message):
                yield from _texts(one)
            elif isinstance(one, str):
                yield field.name, one
