"""The events of jobs: each is kept first, and then told to everybody who watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from isthmus.coordinator.control.database import Database
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.printable import printable

ALIVE = (pb.WAITING, pb.PREPARING, pb.RUNNING)


class Timeline:
    """The events of all jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._news = asyncio.Condition()

    async def tell(self, job: str, event: pb.Event) -> None:
        self._database.events.append(job, event)
        async with self._news:
            self._news.notify_all()

    async def state_is(self, job: str, state: pb.JobState, message: str) -> None:
        message = printable(message)  # it may quote what devices say
        self._database.jobs.update(job, state=state, message=message)
        await self.tell(job, pb.Event(state=pb.StateChanged(state=state, message=message)))

    async def follow(self, job: str, after: int) -> AsyncIterator[pb.Event]:
        """Past and coming events of a job; ends with the job."""
        while True:
            state = self._database.jobs.get(job).state
            for event in self._database.events.of(job, after):
                after = event.number
                yield event
            if state not in ALIVE:
                return
            async with self._news:
                if not self._database.events.of(job, after) and self._database.jobs.get(job).state in ALIVE:
                    await self._news.wait()
