"""Every job that was ever submitted: what was asked for, and how far it has come."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from isthmus.coordinator.control.schema import DatabaseFile, jobs
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import NotFound

_COLUMNS = {"state", "message", "step", "steps", "checkpoint_step", "report", "devices"}  # that change
_ALIVE = (int(pb.WAITING), int(pb.PREPARING), int(pb.RUNNING))


class JobTable:
    """clock: seconds since the epoch."""

    def __init__(self, file: DatabaseFile, clock: Callable[[], float]) -> None:
        self._file, self._clock = file, clock

    def create(self, spec: pb.JobSpec) -> str:
        """A new job in state WAITING; returns its id, 8 lower-case letters and digits."""
        values = {"spec": spec.SerializeToString(), "created": self._clock()}
        while True:
            job = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
            try:
                with self._file.write() as connection:
                    connection.execute(jobs.insert().values(id=job, **values))
            except IntegrityError:  # the id is taken
                continue
            return job

    def get(self, job: str) -> pb.Job:
        """Raises NotFound."""
        rows = self._file.rows(sa.select(jobs).where(jobs.c.id == job))
        if not rows:
            raise no_job(job)
        return _job_to_proto(rows[0])

    def all(self) -> list[pb.Job]:
        """All, oldest first."""
        return [_job_to_proto(row) for row in self._file.rows(sa.select(jobs).order_by(jobs.c.created, jobs.c.id))]

    def update(self, job: str, **columns: Any) -> None:
        """Set any of state, message, step, steps, checkpoint_step, report (JSON text), devices (list of names)."""
        if not columns or not columns.keys() <= _COLUMNS:
            raise TypeError(f"not columns of a job: {sorted(columns.keys() - _COLUMNS)}")
        with self._file.write() as connection:
            if not connection.execute(jobs.update().where(jobs.c.id == job).values(**columns)).rowcount:
                raise no_job(job)

    def interrupt_running(self) -> list[str]:
        """At start: what an earlier coordinator left WAITING, PREPARING or RUNNING is INTERRUPTED; returns the ids."""
        message = "the coordinator stopped; go on with `isthmus finetune --resume`"
        alive = jobs.c.state.in_(_ALIVE)
        update = jobs.update().where(alive).values(state=int(pb.INTERRUPTED), message=message)
        with self._file.write() as connection:
            interrupted = [str(job) for job in connection.execute(sa.select(jobs.c.id).where(alive)).scalars()]
            connection.execute(update)
        return interrupted


def no_job(job: str) -> NotFound:
    return NotFound(f"no job {job!r}: `isthmus jobs` lists them")


def _job_to_proto(row: sa.Row[Any]) -> pb.Job:
    return pb.Job(
        id=row.id,
        spec=pb.JobSpec.FromString(row.spec),
        state=row.state,
        message=row.message,
        created=row.created,
        step=row.step,
        steps=row.steps,
        checkpoint_step=row.checkpoint_step,
        report=row.report,
        devices=row.devices,
    )
