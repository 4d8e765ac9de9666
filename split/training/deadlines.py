"""The time for which a job's end, or its other devices, wait for a device that is connected and silent."""

from __future__ import annotations

import time

from isthmus.split.training.membership import JoinedDevice
from isthmus.split.training.patience import Patience


class Deadlines:
    """Judges, one device at a time, whether it is still waited for."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._over_since: dict[str, float] = {}  # when each device was seen to have no step left

    def late(self, device: JoinedDevice, seconds: float | None, *, waits: bool, waited_for: bool, over: bool) -> str:
        """The reason why a device is waited for no longer; empty while it is waited for.

        seconds: for how long the device has owed the frame that a step at the stage waits for; None if no step waits.
        waits: whether a frame of the device waits for those of others.
        waited_for: whether others wait for the device.
        over: whether the device has no step left and only has to close the job.
        """
        now, patience = time.monotonic(), self.patience.of(device.name)
        silent = (0.0 if waits else now - device.heard) if seconds is None else seconds
        if over:
            since = now - self._over_since.setdefault(device.name, now)
            if silent > patience or since > self.patience.closing:
                return f"{device.name} has not closed the job {max(silent, since):.0f} s after it was done"
        elif silent > patience and (seconds is not None or waited_for):
            return f"{device.name} owed a frame for {patience:.0f} s; the others went on without it"
        return ""
