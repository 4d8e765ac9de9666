"""The runs of jobs that this coordinator has under way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from isthmus.coordinator.jobs.methods import JobMethod
from isthmus.coordinator.jobs.serving import ServingMethod
from isthmus.protos.v1 import coordinator_pb2 as pb


@dataclass
class Run:
    """One run of a job in this coordinator, from its submission or from --resume on."""

    job: str
    spec: pb.JobSpec
    method: JobMethod
    task_id: str
    resume: bool
    devices: list[str] = field(default_factory=list)
    stage: Any = None  # handle of the Ray actor: a stage, or a gateway
    stage_address: str = ""
    started: bool = False  # whether the stage waits for devices no longer
    joined: set[str] = field(default_factory=set)  # devices that are at the stage now
    failed: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)  # devices that have done all of their steps
    worker: asyncio.Task[None] | None = None

    def heard(self, event: pb.Event) -> None:
        """Notes who is at the stage, from an event that the stage told."""
        kind = event.WhichOneof("kind")
        if kind in ("joined", "holder_joined"):
            self.joined.add(event.device)
            self.failed.pop(event.device, None)
        elif kind in ("left", "holder_left"):
            self.joined.discard(event.device)
            if event.left.done:
                self.done.add(event.device)
        elif kind in ("started", "serving"):
            self.started = True


class Runs:
    """The runs, by job. A device takes part in one of them at most, but may use the models of others."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}

    def add(self, run: Run) -> None:
        self._runs[run.job] = run

    def remove(self, run: Run) -> None:
        """Removes a run, unless the job has another one by now."""
        if self._runs.get(run.job) is run:
            del self._runs[run.job]

    def get(self, job: str) -> Run | None:
        return self._runs.get(job)

    def all(self) -> list[Run]:
        return list(self._runs.values())

    def of_task(self, task: str) -> Run | None:
        return next((run for run in self._runs.values() if run.task_id == task), None)

    def job_of(self, device: str) -> str:
        """The job that a device works on; empty for none."""
        return next((run.job for run in self._runs.values() if device in run.devices), "")

    def of_device(self, device: str) -> Run | None:
        return self._runs.get(self.job_of(device))

    def usable_by(self, device: str) -> Iterable[tuple[Run, ServingMethod]]:
        """Served models that this device may use itself, with their runs."""
        return [(run, served) for run, served in self.served() if device in served.config.may_use]

    def served(self) -> list[tuple[Run, ServingMethod]]:
        return [(run, run.method) for run in self._runs.values() if isinstance(run.method, ServingMethod)]
