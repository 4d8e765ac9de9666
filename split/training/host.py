"""A job's host: one thread owns the job, and all others only put work into its inbox."""

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
    """The host of a job. Any thread may call its methods.

    steps: the method's steps at the coordinator.
    """

    def __init__(self, steps: HostSteps, context: HostContext) -> None:
        self.steps, self.ledger = steps, steps.ledger
        self.job = HostedJob(steps, context)
        self._inbox = Inbox("job-host", look=self.job.look, fail=self.job.fail)
        steps.put = self._inbox.put
        self._inbox.start()

    def join(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """Takes a device's OPEN, which is answered when the device is admitted.

        A device that joins again takes the place of its earlier stream.
        """
        return self._post(device, deliver, lambda: self.job.join(device, frame, deliver))

    def submit(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """Takes the next frame of a device's stream.

        A frame that is not due is refused with BadFrame, which only this device gets. The future is done when the frame
        has been taken; whoever reads a network waits for it before reading on.
        """
        return self._post(device, deliver, lambda: self.job.submit(device, frame, deliver))

    def leave(self, device: str, deliver: Deliver) -> None:
        """Notes that a device's stream has ended. Does nothing if the device has joined again by another stream."""
        self._inbox.put(lambda: self.job.leave(device, deliver))

    def start_without(self, missing: set[str]) -> None:
        """Stops waiting for devices that have not come. They may still come."""
        self._inbox.put(lambda: self.job.start_without(missing))

    def close(self) -> None:
        """Ends the thread once all submitted work is done."""
        self._inbox.close()
        for device in self.job.members.joined.values():
            self.steps.left(device)

    def outcome(self) -> Outcome:
        """What the job leaves; call it after the event `finished`."""
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
