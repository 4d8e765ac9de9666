"""Jobs from submission to report: gather devices, start the stage, hand out tasks, wait, record."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from isthmus.coordinator.control.database import Database
from isthmus.coordinator.control.sessions import Session, Sessions
from isthmus.coordinator.gateway.actor import GatewayTask
from isthmus.coordinator.jobs.methods import Method, Serving, Training, method_of
from isthmus.coordinator.jobs.report import job_report
from isthmus.coordinator.jobs.weights import DeviceWeights
from isthmus.coordinator.stages.stage_actor import StageTask
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest, IsthmusError, NotAllowed, NotEnrolled, NotFound, WrongState
from isthmus.split.inference.serving import CLOUD
from isthmus.split.job.events import finite, log_line
from isthmus.split.job.shapes import Shape

log = logging.getLogger(__name__)

ALIVE = (pb.WAITING, pb.PREPARING, pb.RUNNING)
_MEASURED, _LOOK = 180.0, 0.25  # seconds for devices to measure themselves, and between looks
_STOP = 30.0  # seconds for a stage to end by itself
_DEFAULT_WAIT = 300.0  # seconds for devices that are missing
Measure = Callable[[bool], Awaitable[pb.Profile]]
StartStage = Callable[[StageTask | GatewayTask], Awaitable[tuple[Any, str]]]


@dataclass
class Run:
    """One run of a job in this coordinator: from submission, or from --resume."""

    job: str
    spec: pb.JobSpec
    method: Method
    task_id: str
    resume: bool
    devices: list[str] = field(default_factory=list)
    stage: Any = None  # handle of the Ray actor: a stage, or a gateway
    stage_address: str = ""
    started: bool = False  # the stage waits no longer for devices to begin
    joined: set[str] = field(default_factory=set)  # at the stage now
    failed: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)  # that have done all of their steps
    worker: asyncio.Task[None] | None = None


class Jobs:
    """start_stage(task) makes a stage actor and returns (handle, HOST:PORT; an empty host: the coordinator's)."""

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
        self._start_stage, self._measure, self._measure_training = start_stage, measure, measure_training
        self._runs: dict[str, Run] = {}
        self._news = asyncio.Condition()

    # ---- what users ask for ----

    async def submit(self, spec: pb.JobSpec, resume: str) -> pb.Job:
        """Records a job and starts to work on it. Everything that can be seen to be wrong is refused here."""
        if resume:
            self._check_resumable(resume)
            spec = self._database.jobs.get(resume).spec
        if not 0 <= spec.wait_seconds < math.inf:
            raise BadRequest(f"a wait of {spec.wait_seconds} s for devices: choose one above 0")
        self._check_devices(spec)
        method = await asyncio.to_thread(method_of, spec, self._state / "digests.json")
        if isinstance(method, Serving):
            self._check_enrolled(method.config.users)
        await asyncio.to_thread(method.folder.tokenizer)
        if resume:
            self._check_resumable(resume)  # again: somebody else may have resumed it meanwhile
        identifier = resume or self._database.jobs.create(spec)
        run = Run(identifier, spec, method, f"{identifier}-{secrets.token_hex(4)}", bool(resume))
        self._runs[identifier] = run
        self._database.jobs.update(identifier, state=pb.WAITING, message="", steps=method.steps)
        await self._tell(run, pb.Event(state=pb.StateChanged(state=pb.WAITING, resumed=bool(resume))))
        run.worker = asyncio.create_task(self._work(run))
        return self._database.jobs.get(identifier)

    async def cancel(self, identifier: str) -> pb.Job:
        job = self._database.jobs.get(identifier)
        run = self._runs.get(identifier)
        if run is None or run.worker is None or job.state not in ALIVE:
            raise WrongState(f"job {identifier} is not at work: it is {pb.JobState.Name(job.state).lower()}")
        run.worker.cancel()
        await asyncio.wait({run.worker})  # unlike `await run.worker`, not another cancel if this caller goes away
        return self._database.jobs.get(identifier)

    async def events(self, identifier: str, after: int) -> AsyncIterator[pb.Event]:
        """Past and coming events; ends with the job."""
        while True:
            job = self._database.jobs.get(identifier)
            for event in self._database.events.of(identifier, after):
                after = event.number
                yield event
            if job.state not in ALIVE:
                return
            async with self._news:
                if (
                    not self._database.events.of(identifier, after)
                    and self._database.jobs.get(identifier).state in ALIVE
                ):
                    await self._news.wait()

    def job_of(self, device: str) -> str:
        """The job that a device works on; empty for none."""
        return next((run.job for run in self._runs.values() if device in run.devices), "")

    async def find_served(self, name: str, device: str, serial: str) -> pb.Served:
        """A model that this device, whose certificate counts, may use itself; its gateway learns the certificate.

        name: as it or one of its adapters is served, or the job's; empty: the only one.
        Raises NotFound, NotAllowed, BadRequest, WrongState.
        """
        mine = {run.job: served for run, served in self._serving() if device in served.config.may_use}
        names = {job: served.config.name for job, served in mine.items()}
        found = [job for job, served in mine.items() if name in ("", job, *served.config.names)]
        if not found:
            if any(name in (run.job, *served.config.names) for run, served in self._serving()):
                raise NotAllowed(f"device {device} may not use {name}: `isthmus serve --users {device}` allows it")
            usable = ", ".join(sorted(names.values())) or "none"
            what = f"no model {name[:80]!r}" if name else "no model"
            raise NotFound(f"{what} is served that device {device} may use; there is: {usable}")
        if len(found) > 1:
            named = ", ".join(f"{names[job]} ({job})" for job in found)
            raise BadRequest(f"several models are served: {named}; name one, or its job, with --model")
        run = self._runs[found[0]]
        if not run.stage_address:
            raise WrongState(f"{names[run.job]} is not served yet: try again in a moment")
        with contextlib.suppress(RayActorError):  # the job's own waiting sees that its gateway has died
            await run.stage.allow.remote(device, serial)
        served = mine[run.job]
        return pb.Served(job=run.job, gateway=run.stage_address, serving=served.for_devices())

    def user_weights_for(self, identifier: str, device: str, blocks: int) -> DeviceWeights:
        for run, served in self._serving():
            if run.job == identifier and device in served.config.may_use:
                return served.user_weights(blocks)
        raise NotAllowed(f"device {device} may not use job {identifier[:32]}")

    def _serving(self) -> list[tuple[Run, Serving]]:
        return [(run, run.method) for run in self._runs.values() if isinstance(run.method, Serving)]

    def weights_for(self, identifier: str, device: str, blocks: int = 0) -> DeviceWeights:
        run = self._runs.get(identifier)
        if run is None or device not in run.devices:
            raise NotAllowed(f"device {device} has no part in job {identifier}")
        return run.method.weights(device, blocks)

    def adapter_folder(self, identifier: str) -> Path:
        """Of a job that is done. Raises WrongState for others."""
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

    # ---- what devices tell ----

    async def device_connected(self, session: Session) -> None:
        """Hands a device that has come back the task of the job that it takes part in."""
        run = self._runs.get(self.job_of(session.name))
        if run is not None and run.stage_address:
            await self._hand_out(run, session)
        for used, served in self._serving():
            if used is not run and used.stage is not None and session.name in served.config.may_use:
                await used.stage.allow.remote(session.name, session.serial)  # and not the certificate before it

    async def task_state(self, session: Session, state: pb.TaskState) -> None:
        run = next((run for run in self._runs.values() if run.task_id == state.task), None)
        if run is None or session.name not in run.devices:
            if state.state in (pb.TaskState.PREPARING, pb.TaskState.RUNNING):
                cancel = pb.CancelTask(id=state.task, reason="the coordinator does not know this task any more")
                session.send(pb.CoordinatorMessage(cancel=cancel))
            return
        await self._tell(run, pb.Event(device=session.name, task=state))
        if state.state == pb.TaskState.FAILED:
            run.failed[session.name] = state.message

    async def stage_event(self, identifier: str, event: pb.Event) -> None:
        run = self._runs.get(identifier)
        if run is None:
            return
        kind, device = event.WhichOneof("kind"), event.device
        if kind in ("joined", "holder_joined"):
            run.joined.add(device)
            run.failed.pop(device, None)
        elif kind in ("left", "holder_left"):
            run.joined.discard(device)
            if event.left.done:
                run.done.add(device)
        elif kind in ("started", "serving"):
            run.started = True
        elif kind == "step":
            self._database.jobs.update(identifier, step=event.step.step)
        elif kind == "shape" and isinstance(run.method, Training):
            run.method.moved(device, Shape(event.shape.cut, event.shape.rank))
        elif kind == "checkpoint":
            self._database.jobs.update(identifier, checkpoint_step=event.checkpoint.step)
        await self._tell(run, event)

    async def revoke(self, device: str) -> None:
        run = self._runs.get(self.job_of(device))
        if run is not None:
            run.failed[device] = "was revoked"
            if run.stage is not None:
                await run.stage.revoke.remote(device)
        for used, served in self._serving():
            if used is not run and used.stage is not None and device in served.config.may_use:
                await used.stage.revoke.remote(device)

    async def stop(self) -> None:
        """The coordinator goes down: jobs at work can be resumed."""
        for run in list(self._runs.values()):
            if run.worker is not None and not run.worker.done():
                run.worker.cancel("stop")
                await asyncio.wait({run.worker})

    # ---- the work ----

    async def _work(self, run: Run) -> None:
        try:
            await self._gather(run)
            if isinstance(run.method, Serving):
                await self._plan(run, run.method)
            elif isinstance(run.method, Training):
                await self._shape(run, run.method)
            await self._state_is(run, pb.PREPARING, "starting the stage")
            await self._start(run)
            finished = await self._wait(run)
            report = job_report(run.job, run.spec, run.devices, self._database.events.of(run.job), finished)
            folder = self._state / "jobs" / run.job
            report["heat_maps"] = await asyncio.to_thread(run.method.heat_maps, report["modules"], folder)
            self._database.jobs.update(run.job, report=json.dumps(finite(report)))
            await self._state_is(run, pb.SUCCEEDED, "")
        except asyncio.CancelledError as cancelled:
            if "stop" in cancelled.args:
                again = f"--resume {run.job} goes on" if run.method.steps else "serve the model again"
                await self._state_is(run, pb.INTERRUPTED, f"the coordinator stopped; {again}")
            else:
                await self._state_is(run, pb.CANCELLED, "cancelled by a user")
        except RayTaskError as error:  # before IsthmusError: Ray makes its errors instances of their causes, too
            cause = error.cause
            known = isinstance(cause, IsthmusError)
            if not known:
                log.error("the stage of job %s failed", run.job, exc_info=error)
            await self._state_is(run, pb.FAILED, str(cause) if known else f"the stage failed: {cause!r}")
        except IsthmusError as error:
            await self._state_is(run, pb.FAILED, str(error))
        except RayActorError:
            again = f"--resume {run.job} goes on from the last checkpoint" if run.method.steps else "serve it again"
            await self._state_is(run, pb.FAILED, f"the stage's process died; {again}")
        except Exception as error:  # a bug must not leave a job at work for ever
            log.exception("job %s failed", run.job)
            await self._state_is(run, pb.FAILED, f"a bug in the coordinator: {error!r}; its log has the details")
        finally:
            await self._clear(run)

    async def _gather(self, run: Run) -> None:
        """Waits until the devices are here, and takes them for this run."""
        wait = run.spec.wait_seconds or _DEFAULT_WAIT
        deadline = time.monotonic() + wait
        async with self._sessions.changed:
            while True:
                names, missing = self._sessions.available(run.spec, self.job_of)
                if not missing:
                    run.devices = names
                    self._database.jobs.update(run.job, devices=names)
                    return
                message = f"waiting for {missing}"
                if self._database.jobs.get(run.job).message != message:
                    self._database.jobs.update(run.job, message=message)
                    await self._tell(run, log_line(message))
                try:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        await self._sessions.changed.wait()
                except TimeoutError:
                    raise WrongState(f"gave up after {wait:.0f} s of waiting for {missing}") from None

    async def _plan(self, run: Run, method: Serving) -> None:
        """Chooses who holds which blocks where the user has not, and tells what speed is to be expected."""
        here, profiles = pb.Profile(memory_bytes=psutil.virtual_memory().total), {}
        for session in self._sessions.all():
            free = not method.asked.spans and session.runs(run.spec.method) and not self.job_of(session.name)
            if free or session.name in run.devices:
                profiles[session.name] = session.profile
        if profiles or len(method.config.spans) > 1:
            everybody = ", ".join(["the coordinator", *sorted(profiles)])
            await self._tell(run, log_line(f"looking at what can be done by {everybody}"))
            try:
                here = await self._measure(len(self._runs) == 1)
            except (RayError, IsthmusError) as error:
                log.warning("job %s: the coordinator's speed could not be measured: %s", run.job, error)
        planned, told = await asyncio.to_thread(method.planned, {CLOUD: here, **profiles})
        if told is not None:
            await self._tell(run, pb.Event(plan=told))
        chosen = planned.config.devices
        taken = next((name for name in chosen if self.job_of(name) not in ("", run.job)), None)
        if taken is not None:
            raise WrongState(f"device {taken} was taken by job {self.job_of(taken)} meanwhile: serve the model again")
        run.method, run.devices = planned, chosen
        self._database.jobs.update(run.job, devices=chosen)

    async def _shape(self, run: Run, method: Training) -> None:
        """Decides what each device holds and trains, and says so where the user left it open or they differ."""
        kept: dict[str, Shape] = {}
        if run.resume:
            kept = method.kept_shapes(self._state / "jobs" / run.job, self._database.events.of(run.job))
        server, profiles = 0.0, {}
        if method.automatic and not kept.keys() >= set(run.devices):
            profiles = await self._measured_profiles(run)
            server = await self._measure_training()
        else:
            profiles = {name: self._session(name).profile for name in run.devices}
        for device, chosen in (await asyncio.to_thread(method.choose, profiles, server, kept)).items():
            await self._tell(run, pb.Event(device=device, shape=chosen))

    async def _measured_profiles(self, run: Run) -> dict[str, pb.Profile]:
        """Of the job's devices, once they have measured their speed and link, which they do when they have no task."""
        told = ""
        for _ in range(int(_MEASURED / _LOOK)):
            profiles = {name: self._session(name).profile for name in run.devices}
            missing = sorted(n for n, one in profiles.items() if not (one.training_flops > 0 and one.HasField("link")))
            if not missing:
                return profiles
            message = f"waiting until {', '.join(missing)} have measured their speed and their link"
            if message != told:
                await self._tell(run, log_line(message))
                told = message
            await asyncio.sleep(_LOOK)
        raise WrongState(
            f"{', '.join(missing)} did not measure their speed within {_MEASURED:.0f} s; name what they are to hold "
            f"(--cut {missing[0]}=N --rank {missing[0]}=R), or update their software"
        )

    def _check_resumable(self, identifier: str) -> None:
        if self._database.jobs.get(identifier).state == pb.SUCCEEDED:
            raise WrongState(f"job {identifier} is done; `isthmus export {identifier} --out DIR` writes its adapter")
        if identifier in self._runs:
            raise WrongState(f"job {identifier} is at work; `isthmus watch {identifier}` follows it")

    def _check_devices(self, spec: pb.JobSpec) -> None:
        if not spec.devices and not spec.device_count and not spec.serving:
            raise BadRequest("no devices: name them, or say how many")
        if len(set(spec.devices)) != len(spec.devices):
            raise BadRequest("a device is named twice")
        self._check_enrolled(spec.devices)
        self._sessions.available(spec, self.job_of)

    def _check_enrolled(self, devices: Iterable[str]) -> None:
        for name in devices:
            if self._database.devices.get(name).revoked:  # raises NotFound for one that was never enrolled
                raise WrongState(f"device {name} is revoked; `isthmus enroll {name}` lets it in again")

    async def _start(self, run: Run) -> None:
        for name in run.devices:
            run.method.check_device(name, self._session(name).profile)
        serials = {name: self._session(name).serial for name in run.devices}
        task = run.method.actor_task(run.job, serials, self._state / "jobs" / run.job, run.resume)
        run.stage, run.stage_address = await self._start_stage(task)
        for name in list(run.failed):  # revoked while the stage started
            await run.stage.revoke.remote(name)
        await self._state_is(run, pb.RUNNING, "")
        for name in run.devices:
            session = self._sessions.get(name)
            if session is not None:
                await self._hand_out(run, session)

    async def _wait(self, run: Run) -> dict[str, Any]:
        """Until the stage has finished. Gives up when devices stay away for longer than the job waits for them."""
        wait = run.spec.wait_seconds or _DEFAULT_WAIT
        finished = asyncio.ensure_future(run.stage.finished.remote())
        complete_since, given_up = time.monotonic(), set[str]()
        while True:
            done, _ = await asyncio.wait({finished}, timeout=0.5)
            if done:
                result: dict[str, Any] = finished.result()
                return result
            if run.failed and run.method.is_lost(run.devices, run.failed.keys(), run.started):
                reasons = "; ".join(f"device {name}: {why}" for name, why in sorted(run.failed.items()))
                raise WrongState(f"every device has failed: {reasons}" if run.started else reasons)
            if not run.method.steps:
                continue  # a chain waits for its holders itself
            if run.started and run.failed.keys() != given_up:
                given_up = set(run.failed)  # they may still come back
                await run.stage.start_without.remote(sorted(given_up))
            if run.joined if run.started else run.joined >= set(run.devices):
                complete_since = time.monotonic()
            if time.monotonic() - complete_since < wait:
                continue
            missing = sorted(set(run.devices) - run.joined - run.done)
            if not run.done and (run.started or not run.joined):
                raise WrongState(
                    f"waited {wait:.0f} s for {', '.join(missing)}; --resume {run.job} goes on from the last checkpoint"
                )
            await run.stage.start_without.remote(missing)
            complete_since = time.monotonic()  # of those that are here now
            sentence = f"going on without {', '.join(missing)}: they did not come in {wait:.0f} s"
            await self._tell(run, log_line(sentence))

    async def _clear(self, run: Run) -> None:
        """Whatever the end was: no device works on, no actor stays."""
        cancel = pb.CoordinatorMessage(cancel=pb.CancelTask(id=run.task_id, reason="the job has ended"))
        for name in run.devices:
            session = self._sessions.get(name)
            if session is not None:
                session.send(cancel)
        try:
            if run.stage is not None:
                with contextlib.suppress(RayActorError, RayTaskError, TimeoutError):
                    async with asyncio.timeout(_STOP):  # it is killed then
                        await run.stage.stop.remote()
        finally:  # cancelled once more, too
            if run.stage is not None:
                ray.kill(run.stage)
            if self._runs.get(run.job) is run:
                del self._runs[run.job]
        await self._sessions.notify()

    async def _hand_out(self, run: Run, session: Session) -> None:
        """The task to a device, whose certificate may be another than when the job began: the stage learns it first.

        Not to a session of a certificate that counts no more, which may be open for a moment yet.
        """
        try:
            self._database.devices.check_certificate(session.name, session.serial)
        except NotEnrolled as refused:
            log.info("job %s: %s", run.job, refused)
            return
        with contextlib.suppress(RayActorError):  # the job's own waiting sees that its stage has died
            await run.stage.allow.remote(session.name, session.serial)
        task = pb.Task(id=run.task_id, job=run.job, spec=run.spec, stage_address=run.stage_address)
        run.method.device_task(task, session.name)
        session.send(pb.CoordinatorMessage(task=task))

    def _session(self, device: str) -> Session:
        session = self._sessions.get(device)
        if session is None:
            raise WrongState(f"device {device} has gone before the job began")
        return session

    async def _state_is(self, run: Run, state: pb.JobState, message: str) -> None:
        self._database.jobs.update(run.job, state=state, message=message)
        await self._tell(run, pb.Event(state=pb.StateChanged(state=state, message=message)))

    async def _tell(self, run: Run, event: pb.Event) -> None:
        self._database.events.append(run.job, event)
        async with self._news:
            self._news.notify_all()
