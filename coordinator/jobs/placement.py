"""Decides who holds and trains which part of a job's model, once the job's devices are known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
from ray.exceptions import RayError

from isthmus.coordinator.control.database import Database
from isthmus.coordinator.control.sessions import Session, Sessions
from isthmus.coordinator.jobs.runs import Run, Runs
from isthmus.coordinator.jobs.serving import ServingMethod
from isthmus.coordinator.jobs.timeline import Timeline
from isthmus.coordinator.jobs.training import TrainingMethod
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError, WrongState
from isthmus.split.inference.serving import CLOUD
from isthmus.split.job.events import log_line
from isthmus.split.job.shapes import Shape

log = logging.getLogger(__name__)

_MEASURED, _LOOK = 180.0, 0.25  # seconds for devices to measure themselves, and between looks
Measure = Callable[[bool], Awaitable[pb.Profile]]


class Placer:
    """Places jobs on devices.

    measure: function of `quiet` that measures a node that serves.
    measure_training: measures the FLOP/s of a node that a stage may get.
    """

    def __init__(
        self,
        database: Database,
        sessions: Sessions,
        runs: Runs,
        timeline: Timeline,
        state: Path,
        measure: Measure,
        measure_training: Callable[[], Awaitable[float]],
    ) -> None:
        self._database, self._sessions, self._runs, self._timeline = database, sessions, runs, timeline
        self._state, self._measure, self._measure_training = state, measure, measure_training

    async def decide(self, run: Run) -> None:
        if isinstance(run.method, ServingMethod):
            await self.plan(run, run.method)
        elif isinstance(run.method, TrainingMethod):
            await self.shape(run, run.method)

    async def plan(self, run: Run, method: ServingMethod) -> None:
        """Chooses who holds which blocks, unless that was asked for, and tells what speed to expect.

        Raises BadRequest if nobody has the memory, and WrongState if another job took a device meanwhile.
        """
        here, profiles = pb.Profile(memory_bytes=psutil.virtual_memory().total), {}
        for session in self._sessions.all():
            free = not method.asked.spans and session.runs(run.spec.method) and not self._runs.job_of(session.name)
            if free or session.name in run.devices:
                profiles[session.name] = session.profile
        if profiles or len(method.config.spans) > 1:
            everybody = ", ".join(["the coordinator", *sorted(profiles)])
            await self._timeline.tell(run.job, log_line(f"looking at what can be done by {everybody}"))
            try:
                here = await self._measure(len(self._runs.all()) == 1)
            except (RayError, IsthmusError) as error:
                log.warning("job %s: the coordinator's speed could not be measured: %s", run.job, error)
        planned, told = await asyncio.to_thread(method.planned, {CLOUD: here, **profiles})
        if told is not None:
            await self._timeline.tell(run.job, pb.Event(plan=told))
        chosen = planned.config.devices
        taken = next((name for name in chosen if self._runs.job_of(name) not in ("", run.job)), None)
        if taken is not None:
            raise WrongState(
                f"device {taken} was taken by job {self._runs.job_of(taken)} meanwhile: serve the model again"
            )
        run.method, run.devices = planned, chosen
        self._database.jobs.update(run.job, devices=chosen)

    async def shape(self, run: Run, method: TrainingMethod) -> None:
        """Decides what each device holds and trains, and tells of it if that was left open or devices differ.

        Raises BadRequest where memory does not suffice, and WrongState for devices that do not measure themselves.
        """
        kept: dict[str, Shape] = {}
        if run.resume:
            kept = method.kept_shapes(self._state / "jobs" / run.job, self._database.events.of(run.job))
        server, profiles = 0.0, {}
        if method.automatic and not kept.keys() >= set(run.devices):
            profiles = await self._measured_profiles(run)
            server = await self._measure_training()
        else:
            profiles = {name: session_of(self._sessions, name).profile for name in run.devices}
        for device, chosen in (await asyncio.to_thread(method.choose, profiles, server, kept)).items():
            await self._timeline.tell(run.job, pb.Event(device=device, shape=chosen))

    async def _measured_profiles(self, run: Run) -> dict[str, pb.Profile]:
        """Profiles of the job's devices, once they have measured their speed and link, as they do without a task."""
        told = ""
        for _ in range(int(_MEASURED / _LOOK)):
            profiles = {name: session_of(self._sessions, name).profile for name in run.devices}
            missing = sorted(n for n, one in profiles.items() if not (one.training_flops > 0 and one.HasField("link")))
            if not missing:
                return profiles
            message = f"waiting until {', '.join(missing)} have measured their speed and their link"
            if message != told:
                await self._timeline.tell(run.job, log_line(message))
                told = message
            await asyncio.sleep(_LOOK)
        raise WrongState(
            f"{', '.join(missing)} did not measure their speed within {_MEASURED:.0f} s; name what they are to hold "
            f"(--cut {missing[0]}=N --rank {missing[0]}=R), or update their software"
        )


def session_of(sessions: Sessions, device: str) -> Session:
    """A device's session. Raises WrongState where the device has gone."""
    session = sessions.get(device)
    if session is None:
        raise WrongState(f"device {device} has gone before the job began")
    return session
