"""What happened in each job, in order."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from isthmus.coordinator.control.jobs import no_job
from isthmus.coordinator.control.schema import DatabaseFile, events
from isthmus.protos.v1.events_pb2 import Event


class EventTable:
    """clock: seconds since the epoch."""

    def __init__(self, file: DatabaseFile, clock: Callable[[], float]) -> None:
        self._file, self._clock = file, clock

    def append(self, job: str, event: Event) -> Event:
        """Returns it with its time and its number in its job, from 1. Raises NotFound."""
        kept = Event()
        kept.CopyFrom(event)
        kept.time = self._clock()
        last = sa.select(sa.func.coalesce(sa.func.max(events.c.number), 0)).where(events.c.job == job)
        with self._file.write() as connection:
            kept.number = int(connection.execute(last).scalar_one()) + 1
            values = {
                "job": job,
                "number": kept.number,
                "time": kept.time,
                "kind": kept.WhichOneof("kind") or "",
                "device": kept.device,
                "event": kept.SerializeToString(),
            }
            try:
                connection.execute(events.insert().values(**values))
            except IntegrityError as error:
                raise no_job(job) from error
        return kept

    def of(self, job: str, after: int = 0) -> list[Event]:
        """Those with a number above `after`, in order."""
        query = sa.select(events.c.event).where(events.c.job == job, events.c.number > after).order_by(events.c.number)
        return [Event.FromString(row.event) for row in self._file.rows(query)]
