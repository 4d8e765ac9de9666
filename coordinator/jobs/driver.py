"""Takes one run of a job from its submission to its end: gathers devices, starts the stage, hands out tasks, waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from isthmus.coordinator.control.database import Database
from isthmus.coordinator.control.sessions import Session, Sessions
from isthmus.coordinator.gateway.actor import GatewayTask
from isthmus.coordinator.jobs.placement import Placer, session_of
from isthmus.coordinator.jobs.report import job_report
from isthmus.coordinator.jobs.runs import Run, Runs
from isthmus.coordinator.jobs.serving import ServingMethod
from isthmus.coordinator.jobs.timeline import Timeline
from isthmus.coordinator.stages.stage_actor import StageTask
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError, NotEnrolled, WrongState
from isthmus.split.job.events import finite, log_line

log = logging.getLogger(__name__)

_REPORT = 10.0  # seconds for a gateway to say what it has used
_STOP = 30.0  # seconds for a stage to end by itself
_DEFAULT_WAIT = 300.0  # seconds for devices that are missing
StartStage = Callable[[StageTask | GatewayTask], Awaitable[tuple[Any, str]]]


class RunDriver:
    """Drives the runs of jobs.

    start_stage: makes the stage actor of a task, and returns its handle and its HOST:PORT, where an empty host stands
    for the coordinator's.
    """

    def __init__(
        self,
        database: Database,
        sessions: Sessions,
        runs: Runs,
        timeline: Timeline,
        placement: Placer,
        state: Path,
        start_stage: StartStage,
    ) -> None:
        self._database, self._sessions, self._runs, self._timeline = database, sessions, runs, timeline
        self._placement, self._state, self._start_stage = placement, state, start_stage

    async def work(self, run: Run) -> None:
        try:
            await self._gather(run)
            await self._placement.decide(run)
            await self._timeline.state_is(run.job, pb.PREPARING, "starting the stage")
            await self._start(run)
            await self._succeeded(run, await self._wait(run))
        except asyncio.CancelledError as cancelled:
            await self._keep_report(run)
            if "stop" in cancelled.args:
                again = f"--resume {run.job} goes on" if run.method.steps else "serve the model again"
                await self._timeline.state_is(run.job, pb.INTERRUPTED, f"the coordinator stopped; {again}")
            else:
                await self._timeline.state_is(run.job, pb.CANCELLED, "cancelled by a user")
        except RayTaskError as error:  # before IsthmusError, since Ray makes its errors instances of their causes too
            cause = error.cause
            known = isinstance(cause, IsthmusError)
            if not known:
                log.error("the stage of job %s failed", run.job, exc_info=error)
            await self._timeline.state_is(run.job, pb.FAILED, str(cause) if known else f"the stage failed: {cause!r}")
        except IsthmusError as error:
            await self._timeline.state_is(run.job, pb.FAILED, str(error))
        except RayActorError:
            again = f"--resume {run.job} goes on from the last checkpoint" if run.method.steps else "serve it again"
            await self._timeline.state_is(run.job, pb.FAILED, f"the stage's process died; {again}")
        except Exception as error:  # a bug must not leave a job at work for ever
            log.exception("job %s failed", run.job)
            await self._timeline.state_is(
                run.job, pb.FAILED, f"a bug in the coordinator: {error!r}; its log has the details"
            )
        finally:
            await self._clear(run)

    async def served_report(self, run: Run) -> dict[str, Any] | None:
        """Resources that a served model has used so far; None for other jobs, and where the gateway does not say."""
        if not isinstance(run.method, ServingMethod) or run.stage is None:
            return None
        try:
            async with asyncio.timeout(_REPORT):
                resources: dict[str, Any] = await run.stage.resources.remote()
        except (RayError, TimeoutError) as error:
            log.warning("job %s: its gateway does not say what it has taken: %s", run.job, error)
            return None
        return {"job": run.job, "method": run.spec.method, "model": run.spec.model, **resources}

    async def _keep_report(self, run: Run) -> None:
        """Keeps the report of a served model, which never ends by itself, before anybody hears that it has ended."""
        report = await self.served_report(run)
        if report is not None:
            self._database.jobs.update(run.job, report=json.dumps(finite(report)))

    async def _succeeded(self, run: Run, finished: dict[str, Any]) -> None:
        report = job_report(run.job, run.spec, run.devices, self._database.events.of(run.job), finished)
        folder = self._state / "jobs" / run.job
        report["heat_maps"] = await asyncio.to_thread(run.method.heat_maps, report["modules"], folder)
        self._database.jobs.update(run.job, report=json.dumps(finite(report)))
        await self._timeline.state_is(run.job, pb.SUCCEEDED, "")

    async def _gather(self, run: Run) -> None:
        """Waits until the devices are here, and takes them for this run. Raises WrongState when it gives up."""
        wait = run.spec.wait_seconds or _DEFAULT_WAIT
        deadline = time.monotonic() + wait
        async with self._sessions.changed:
            while True:
                names, missing = self._sessions.available(run.spec, self._runs.job_of)
                if not missing:
                    run.devices = names
                    self._database.jobs.update(run.job, devices=names)
                    return
                message = f"waiting for {missing}"
                if self._database.jobs.get(run.job).message != message:
                    self._database.jobs.update(run.job, message=message)
                    await self._timeline.tell(run.job, log_line(message))
                try:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        await self._sessions.changed.wait()
                except TimeoutError:
                    raise WrongState(f"gave up after {wait:.0f} s of waiting for {missing}") from None

    async def _start(self, run: Run) -> None:
        for name in run.devices:
            run.method.check_device(name, session_of(self._sessions, name).profile)
        serials = {name: session_of(self._sessions, name).serial for name in run.devices}
        task = run.method.actor_task(run.job, serials, self._state / "jobs" / run.job, run.resume)
        run.stage, run.stage_address = await self._start_stage(task)
        for name in list(run.failed):  # revoked while the stage started
            await run.stage.revoke.remote(name)
        await self._timeline.state_is(run.job, pb.RUNNING, "")
        for name in run.devices:
            session = self._sessions.get(name)
            if session is not None:
                await self.hand_out(run, session)

    async def _wait(self, run: Run) -> dict[str, Any]:
        """Waits until the stage has finished, and returns what it knows at the end.

        Raises WrongState when devices stay away for longer than the job waits for them, or have failed.
        """
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
            complete_since = time.monotonic()  # the devices that are here now are complete
            sentence = f"going on without {', '.join(missing)}: they did not come in {wait:.0f} s"
            await self._timeline.tell(run.job, log_line(sentence))

    async def _clear(self, run: Run) -> None:
        """Ends what is left of a run, whatever its end was: no device works on, and no actor stays."""
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
        finally:  # even if this is cancelled once more
            if run.stage is not None:
                ray.kill(run.stage)
            self._runs.remove(run)
        await self._sessions.notify()

    async def hand_out(self, run: Run, session: Session) -> None:
        """Gives a device its task. Its certificate may have changed since the job began, so the stage learns it first.

        Does nothing for a session whose certificate counts no more, which may still be open for a moment.
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
