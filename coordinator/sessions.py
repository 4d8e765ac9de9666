"""Which devices are connected now, what they offer, and how to send them something."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from protos.v1 import coordinator_pb2 as pb


@dataclass(eq=False)
class Session:
    """One open stream of a device."""

    name: str
    serial: str
    profile: pb.Profile
    outbox: asyncio.Queue[pb.CoordinatorMessage | None] = field(default_factory=asyncio.Queue)

    def send(self, message: pb.CoordinatorMessage) -> None:
        self.outbox.put_nowait(message)

    def end(self) -> None:
        self.outbox.put_nowait(None)

    async def messages(self) -> AsyncIterator[pb.CoordinatorMessage]:
        while (message := await self.outbox.get()) is not None:
            yield message

    def offers(self, dataset: str) -> bool:
        return any(offered.name == dataset for offered in self.profile.datasets)

    def runs(self, kind: str) -> bool:
        return kind in self.profile.task_kinds


class Sessions:
    """The open streams by device name; `changed` is notified when one opens or ends."""

    def __init__(self) -> None:
        self._open: dict[str, Session] = {}
        self.changed = asyncio.Condition()

    def get(self, name: str) -> Session | None:
        return self._open.get(name)

    def all(self) -> list[Session]:
        return list(self._open.values())

    async def opened(self, session: Session) -> None:
        """A device that connects again replaces its earlier stream."""
        earlier = self._open.get(session.name)
        if earlier is not None:
            earlier.end()
        self._open[session.name] = session
        await self.notify()

    async def ended(self, session: Session) -> None:
        if self._open.get(session.name) is session:
            del self._open[session.name]
            await self.notify()

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()
