"""The edge daemon: one session with the coordinator, kept up through bad links and restarts; tasks run in threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
from collections.abc import AsyncIterator
from importlib.metadata import version

import grpc
import grpc.aio
import psutil
import torch

from isthmus.client.identity import Identity
from isthmus.client.measurements import DeviceMeasurements
from isthmus.client.runner import DeviceOptions, Runner
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.split.errors import IsthmusError, NotAllowed, NotEnrolled
from isthmus.split.link.backoff import Backoff
from isthmus.split.tls import aio_channel, check_name, error_of

log = logging.getLogger(__name__)

_FIRST_RETRY, _LAST_RETRY = 1.0, 20.0  # seconds up to which the first wait, and any wait, is drawn
_LEAVE_SECONDS = 10.0  # seconds that a task gets to end when the daemon is told to
_ENDED = (pb.TaskState.DONE, pb.TaskState.FAILED, pb.TaskState.CANCELLED)


class Daemon:
    """Takes part in a coordinator's jobs.

    `run` returns after `stop`, and raises NotEnrolled or NotAllowed when the coordinator does not want this device any
    more.
    """

    def __init__(self, identity: Identity, options: DeviceOptions) -> None:
        self._identity, self._options = identity, options
        self._stopping = asyncio.Event()
        self._runners: dict[str, Runner] = {}
        self._states: dict[str, pb.TaskState] = {}  # of tasks whose end the coordinator has not been told
        self._outbox: asyncio.Queue[pb.DeviceMessage | None] | None = None  # of the session, while it is open
        self._measurements = DeviceMeasurements(identity, options)
        self.connected = asyncio.Event()

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        backoff = Backoff(_FIRST_RETRY, _LAST_RETRY)
        try:
            while not self._stopping.is_set():
                try:
                    if await self._session():
                        backoff.reset()
                    if self._stopping.is_set():
                        break
                    why = "the coordinator closed the session"
                except (NotEnrolled, NotAllowed):
                    raise
                except IsthmusError as error:
                    why = str(error)
                seconds = backoff.wait()
                log.warning("%s; trying again in %.1f s", why, seconds)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._stopping.wait()
        finally:
            await self._end_tasks()

    async def _session(self) -> bool:
        """Runs one stream from profile to end; returns whether the coordinator had answered. Raises what ended it."""
        outbox: asyncio.Queue[pb.DeviceMessage | None] = asyncio.Queue()
        outbox.put_nowait(pb.DeviceMessage(profile=self._profile()))
        welcomed = False
        async with aio_channel(self._identity.address, self._identity.credentials) as channel:
            call = CoordinatorStub(channel).Session(_until_none(outbox))
            leaving = asyncio.create_task(self._leave(outbox))
            beating: asyncio.Task[None] | None = None
            measuring: asyncio.Task[None] | None = None
            try:
                async for message in call:
                    kind = message.WhichOneof("kind")
                    if kind == "welcome":
                        check_name(message.welcome.name)
                        welcomed = True
                        log.info("connected to %s as %s", self._identity.address, message.welcome.name)
                        self._outbox = outbox
                        for state in list(self._states.values()):
                            self._tell(state)
                        self.connected.set()
                        beating = asyncio.create_task(_heartbeats(outbox, message.welcome.heartbeat_seconds))
                        measuring = asyncio.create_task(self._measure(outbox))
                    elif kind == "task":
                        self._start(message.task)
                    elif kind == "cancel":
                        self._cancel(message.cancel)
            except grpc.aio.AioRpcError as error:
                raise error_of(error, self._identity.address) from None
            finally:
                self._outbox = None
                self.connected.clear()
                for task in (leaving, beating, measuring):
                    if task is not None:
                        task.cancel()
        return welcomed

    async def _leave(self, outbox: asyncio.Queue[pb.DeviceMessage | None]) -> None:
        """Closes this side of the stream when the daemon stops; the coordinator then closes its own."""
        await self._stopping.wait()
        await self._end_tasks()
        outbox.put_nowait(None)

    async def _measure(self, outbox: asyncio.Queue[pb.DeviceMessage | None]) -> None:
        """Tells what this device can do once that has been measured, which is while there is nothing else to do."""
        async for _ in self._measurements.news(busy=lambda: bool(self._runners)):
            outbox.put_nowait(pb.DeviceMessage(profile=self._profile()))

    def _start(self, task: pb.Task) -> None:
        if task.id in self._runners:
            return
        for other in self._runners.values():
            if other.task.job == task.job:  # an earlier run of the job, given by a coordinator that has started again
                other.cancel()
        log.info("task %s: %s on %s", task.id, task.spec.method, task.spec.dataset)
        loop = asyncio.get_running_loop()

        def tell(state: pb.TaskState) -> None:  # in the runner's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended, so that nobody is left to tell
                loop.call_soon_threadsafe(self._task_state, state)

        runner = Runner(task, self._identity, self._options, tell)
        self._runners[task.id] = runner
        runner.start()

    def _cancel(self, cancel: pb.CancelTask) -> None:
        runner = self._runners.get(cancel.id)
        if runner is not None:
            log.info("task %s is cancelled: %s", cancel.id, cancel.reason)
            runner.cancel()

    def _task_state(self, state: pb.TaskState) -> None:
        log.info("task %s: %s %s", state.task, pb.TaskState.State.Name(state.state).lower(), state.message)
        if state.state in _ENDED:
            self._runners.pop(state.task, None)
        self._states[state.task] = state
        self._tell(state)

    def _tell(self, state: pb.TaskState) -> None:
        """Tells a state now, if a session is open, and again when the next one opens, unless the task has ended."""
        if self._outbox is None:
            return
        self._outbox.put_nowait(pb.DeviceMessage(task=state))
        if state.state in _ENDED:
            self._states.pop(state.task, None)

    async def _end_tasks(self) -> None:
        runners = list(self._runners.values())
        for runner in runners:
            runner.cancel()
        for runner in runners:
            await asyncio.to_thread(runner.join, _LEAVE_SECONDS)

    def _profile(self) -> pb.Profile:
        offered = [
            pb.Dataset(name=name, bytes=path.stat().st_size if path.is_file() else 0)
            for name, path in self._options.data.items()
        ]
        return pb.Profile(
            version=version("isthmus"),
            platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            cores=os.cpu_count() or 1,
            memory_bytes=psutil.virtual_memory().total,
            accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
            datasets=offered,
            task_kinds=self._options.allow,
            **self._measurements.told(),
        )


async def _heartbeats(outbox: asyncio.Queue[pb.DeviceMessage | None], seconds: int) -> None:
    while True:
        await asyncio.sleep(seconds)
        outbox.put_nowait(pb.DeviceMessage(heartbeat=pb.Heartbeat()))


async def _until_none(outbox: asyncio.Queue[pb.DeviceMessage | None]) -> AsyncIterator[pb.DeviceMessage]:
    while (message := await outbox.get()) is not None:
        yield message
