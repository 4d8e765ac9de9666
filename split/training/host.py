"""Hosts a job's stage for its devices: one thread owns the job, and everybody else only puts work into its inbox."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from isthmus.split.errors import BadRequest
from isthmus.split.link.frames import Frame
from isthmus.split.link.stage import Deliver
from isthmus.split.lora.sites import Layout
from isthmus.split.training.hosted_job import HostContext, HostedJob, Outcome
from isthmus.split.training.inbox import Inbox
from isthmus.split.training.steps import HostSteps


class JobHost:
    """What may be called from any thread. steps: the method's."""

    def __init__(self, steps: HostSteps, context: HostContext) -> None:
        self.steps, self.ledger = steps, steps.ledger
        self.job = HostedJob(steps, context)
        self._inbox = Inbox("job-host", look=self.job.look, fail=self.job.fail)
        steps.put = self._inbox.put
        self._inbox.start()

    def join(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """A device's OPEN. Its answer comes when it is admitted. A device that joins again replaces itself."""
        return self._post(device, deliver, lambda: self.job.join(device, frame, deliver))

    def submit(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """The next frame of a device's stream. One that is not due is refused with BadFrame, to that device alone.

        The future is done when the frame has been taken: who reads a network waits for it before reading on.
        """
        return self._post(device, deliver, lambda: self.job.submit(device, frame, deliver))

    def leave(self, device: str, deliver: Deliver) -> None:
        """A device's stream has ended. Nothing happens if the device has joined again by another one since."""
        self._inbox.put(lambda: self.job.leave(device, deliver))

    def start_without(self, missing: set[str]) -> None:
        """Stops waiting for devices that have not come. They may still come."""
        self._inbox.put(lambda: self.job.start_without(missing))

    def close(self) -> None:
        """Ends the thread once what was submitted is done."""
        self._inbox.close()
        for device in self.job.members.joined.values():
            self.steps.left(device)

    def outcome(self) -> Outcome:
        """After `finished`."""
        job, point = self.job, self.job.point
        return Outcome(
            adapter=self.steps.adapter(point),
            server=point.server,
            device_adapter=point.device_adapter,
            losses=job.progress.losses,
            perplexities=job.evaluations.perplexities,
            resources=job.resources,
        )

    def adapter_shapes(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        return self.steps.adapter_shapes(device)

    def layout_for(self, device: str) -> Layout | None:
        return self.steps.layout_for(device)

    def _post(self, device: str, deliver: Deliver, work: Callable[[], None]) -> Future[None]:
        def refused(error: BadRequest) -> None:
            deliver(error)
            self.job.leave(device, deliver)

        return self._inbox.post(work, refused)
