"""Which devices are connected now, what they offer, and how to send them something."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest


@dataclass(eq=False)
class Session:
    """One open stream of a device."""

    name: str
    serial: str
    profile: pb.Profile
    outbox: asyncio.Queue[pb.CoordinatorMessage | None] = field(default_factory=asyncio.Queue)

    def send(self, message: pb.CoordinatorMessage) -> None:
        """Queue a message for the device."""
        self.outbox.put_nowait(message)

    def end(self) -> None:
        """End the stream after the messages that are queued."""
        self.outbox.put_nowait(None)

    async def messages(self) -> AsyncIterator[pb.CoordinatorMessage]:
        while (message := await self.outbox.get()) is not None:
            yield message

    def offers(self, dataset: str) -> bool:
        """Whether the device offers a dataset of this name."""
        return any(offered.name == dataset for offered in self.profile.datasets)

    def runs(self, kind: str) -> bool:
        """Whether the device's owner allows this kind of task."""
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

    def available(self, spec: pb.JobSpec, job_of: Callable[[str], str]) -> tuple[list[str], str]:
        """Find devices that can take part in a job now. Returns them, and in words which are missing (empty: none).

        job_of: gives the job that a device works on; empty for none. Raises BadRequest for a device that never could.
        """
        if spec.devices or not spec.device_count:
            missing = []
            for name in spec.devices:
                session = self.get(name)
                if session is None:
                    missing.append(f"{name} (not connected)")
                    continue
                if spec.dataset and not session.offers(spec.dataset):
                    offered = ", ".join(offer.name for offer in session.profile.datasets) or "nothing"
                    raise BadRequest(
                        f"device {name} does not offer the dataset {spec.dataset!r} (it offers {offered}); "
                        f"its owner offers it with --data {spec.dataset}=FILE"
                    )
                if not session.runs(spec.method):
                    raise BadRequest(f"the owner of device {name} does not allow {spec.method} tasks")
                if job_of(name):
                    missing.append(f"{name} (at work on job {job_of(name)})")
            return list(spec.devices), ", ".join(missing)
        free = [
            session.name
            for session in self.all()
            if session.offers(spec.dataset) and session.runs(spec.method) and not job_of(session.name)
        ]
        lacking = spec.device_count - len(free)
        what = f"{lacking} more free {'devices that offer' if lacking > 1 else 'device that offers'} {spec.dataset!r}"
        return sorted(free)[: spec.device_count], what if lacking > 0 else ""

    async def opened(self, session: Session) -> None:
        """Add a session. A device that connects again replaces its earlier stream."""
        earlier = self._open.get(session.name)
        if earlier is not None:
            earlier.end()
        self._open[session.name] = session
        await self.notify()

    async def ended(self, session: Session) -> None:
        """Take a session out, unless a newer one has replaced it."""
        if self._open.get(session.name) is session:
            del self._open[session.name]
            await self.notify()

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()
