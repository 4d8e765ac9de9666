"""Jobs: what admins ask for, and what devices and stages tell."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from isthmus.coordinator.control.database import Database
from isthmus.coordinator.control.sessions import Session, Sessions
from isthmus.coordinator.jobs.driver import RunDriver, StartStage
from isthmus.coordinator.jobs.methods import method_of
from isthmus.coordinator.jobs.placement import Measure, Placer
from isthmus.coordinator.jobs.runs import Run, Runs
from isthmus.coordinator.jobs.served_models import ServedModels
from isthmus.coordinator.jobs.serving import ServingMethod
from isthmus.coordinator.jobs.timeline import ALIVE, Timeline
from isthmus.coordinator.jobs.training import TrainingMethod
from isthmus.coordinator.jobs.weights import DeviceWeights
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest, NotAllowed, WrongState
from isthmus.split.job.events import finite
from isthmus.split.job.shapes import Shape


class Jobs:
    """All jobs of this coordinator.

    start_stage: as in RunDriver.
    measure, measure_training: as in Placer.

    The attribute `served` is for devices that use served models.
    """

    def __init__(
        self,
        database: Database,
        sessions: Sessions,
        state: Path,
        start_stage: StartStage,
        measure: Measure,
        measure_training: Callable[[], Awaitable[float]],
    ) -> None:
        self._database, self._sessions, self._state = database, sessions, state
        self._runs, self._timeline = Runs(), Timeline(database)
        placement = Placer(database, sessions, self._runs, self._timeline, state, measure, measure_training)
        self._driver = RunDriver(database, sessions, self._runs, self._timeline, placement, state, start_stage)
        self.served = ServedModels(self._runs)

    # ---- what admins ask for ----

    async def submit(self, spec: pb.JobSpec, resume: str) -> pb.Job:
        """Records a job, or takes up an earlier one, and starts to work on it.

        resume: the job to go on with; empty for a new one.

        Whatever is visibly wrong is refused here: raises BadRequest, WrongState or NotFound, and BadModelFolder for a
        model that cannot be used.
        """
        if resume:
            self._check_resumable(resume)
            spec = self._database.jobs.get(resume).spec
        if not 0 <= spec.wait_seconds < math.inf:
            raise BadRequest(f"a wait of {spec.wait_seconds} s for devices: choose one above 0")
        self._check_devices(spec)
        method = await asyncio.to_thread(method_of, spec, self._state / "digests.json")
        if isinstance(method, ServingMethod):
            self._check_enrolled(method.config.access.users)
        await asyncio.to_thread(method.folder.tokenizer)
        if resume:
            self._check_resumable(resume)  # again, for somebody else may have resumed it meanwhile
        identifier = resume or self._database.jobs.create(spec)
        run = Run(identifier, spec, method, f"{identifier}-{secrets.token_hex(4)}", bool(resume))
        self._runs.add(run)
        self._database.jobs.update(identifier, state=pb.WAITING, message="", steps=method.steps)
        await self._timeline.tell(run.job, pb.Event(state=pb.StateChanged(state=pb.WAITING, resumed=bool(resume))))
        run.worker = asyncio.create_task(self._driver.work(run))
        return self._database.jobs.get(identifier)

    async def cancel(self, identifier: str) -> pb.Job:
        job = self._database.jobs.get(identifier)
        run = self._runs.get(identifier)
        if run is None or run.worker is None or job.state not in ALIVE:
            raise WrongState(f"job {identifier} is not at work: it is {pb.JobState.Name(job.state).lower()}")
        run.worker.cancel()
        await asyncio.wait({run.worker})  # unlike `await run.worker`, it cancels nothing if the caller goes
        return self._database.jobs.get(identifier)

    async def report(self, identifier: str) -> str:
        """The report, as JSON, of a job that has ended or of a model that is served.

        Raises WrongState where there is none.
        """
        job, run = self._database.jobs.get(identifier), self._runs.get(identifier)
        live = None if run is None else await self._driver.served_report(run)
        if live is not None:
            return json.dumps(finite(live))
        if not job.report:
            state = pb.JobState.Name(job.state).lower()
            raise WrongState(f"job {identifier} has no report: it is {state}; `isthmus watch {identifier}` follows it")
        return job.report

    def events(self, identifier: str, after: int) -> AsyncIterator[pb.Event]:
        """Past and coming events of a job; ends with the job."""
        return self._timeline.follow(identifier, after)

    def job_of(self, device: str) -> str:
        """The job that a device works on; empty for none."""
        return self._runs.job_of(device)

    def weights_for(self, identifier: str, device: str, blocks: int = 0) -> DeviceWeights:
        run = self._runs.get(identifier)
        if run is None or device not in run.devices:
            raise NotAllowed(f"device {device} has no part in job {identifier}")
        return run.method.weights(device, blocks)

    def adapter_folder(self, identifier: str) -> Path:
        """The folder of the adapter of a job that is done. Raises WrongState for other jobs, and if there is none."""
        job = self._database.jobs.get(identifier)
        folder = self._state / "jobs" / identifier / "adapter"
        if job.state == pb.SUCCEEDED and not folder.is_dir():
            raise WrongState(
                f"job {identifier} has left its adapters on its devices, each in its state folder under "
                f"jobs/{identifier}/adapter; with --aggregate there is one here"
            )
        if job.state != pb.SUCCEEDED or not folder.is_dir():
            state = pb.JobState.Name(job.state).lower()
            raise WrongState(
                f"job {identifier} has no adapter yet: it is {state}; `isthmus watch {identifier}` follows it"
            )
        return folder

    # ---- what devices and stages tell ----

    async def device_connected(self, session: Session) -> None:
        """Hands a device that has come back the task of the job that it takes part in."""
        run = self._runs.of_device(session.name)
        if run is not None and run.stage_address:
            await self._driver.hand_out(run, session)
        await self.served.device_connected(session)

    async def task_state(self, session: Session, state: pb.TaskState) -> None:
        run = self._runs.of_task(state.task)
        if run is None or session.name not in run.devices:
            if state.state in (pb.TaskState.PREPARING, pb.TaskState.RUNNING):
                cancel = pb.CancelTask(id=state.task, reason="the coordinator does not know this task any more")
                session.send(pb.CoordinatorMessage(cancel=cancel))
            return
        await self._timeline.tell(run.job, pb.Event(device=session.name, task=state))
        if state.state == pb.TaskState.FAILED:
            run.failed[session.name] = state.message

    async def stage_event(self, identifier: str, event: pb.Event) -> None:
        run = self._runs.get(identifier)
        if run is None:
            return
        run.heard(event)
        if event.HasField("step"):
            self._database.jobs.update(identifier, step=event.step.step)
        elif event.HasField("checkpoint"):
            self._database.jobs.update(identifier, checkpoint_step=event.checkpoint.step)
        elif event.HasField("shape") and isinstance(run.method, TrainingMethod):
            run.method.moved(event.device, Shape(event.shape.cut, event.shape.rank))
        await self._timeline.tell(identifier, event)

    async def revoke(self, device: str) -> None:
        run = self._runs.of_device(device)
        if run is not None:
            run.failed[device] = "was revoked"
            if run.stage is not None:
                await run.stage.revoke.remote(device)
        await self.served.revoke(device)

    async def stop(self) -> None:
        """Ends all runs because the coordinator goes down; their jobs can be resumed."""
        for run in self._runs.all():
            if run.worker is not None and not run.worker.done():
                run.worker.cancel("stop")
                await asyncio.wait({run.worker})

    # ---- what is refused ----

    def _check_resumable(self, identifier: str) -> None:
        if self._database.jobs.get(identifier).state == pb.SUCCEEDED:
            raise WrongState(f"job {identifier} is done; `isthmus export {identifier} --out DIR` writes its adapter")
        if self._runs.get(identifier) is not None:
            raise WrongState(f"job {identifier} is at work; `isthmus watch {identifier}` follows it")

    def _check_devices(self, spec: pb.JobSpec) -> None:
        if not spec.devices and not spec.device_count and not spec.serving:
            raise BadRequest("no devices: name them, or say how many")
        if len(set(spec.devices)) != len(spec.devices):
            raise BadRequest("a device is named twice")
        self._check_enrolled(spec.devices)
        self._sessions.available(spec, self._runs.job_of)

    def _check_enrolled(self, devices: Iterable[str]) -> None:
        for name in devices:
            if self._database.devices.get(name).revoked:  # raises NotFound for one that was never enrolled
                raise WrongState(f"device {name} is revoked; `isthmus enroll {name}` lets it in again")
