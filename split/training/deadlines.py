"""How long the others, or the job's end, wait for a device that is connected and silent."""

from __future__ import annotations

import time

from isthmus.split.training.membership import JoinedDevice
from isthmus.split.training.patience import Patience


class Deadlines:
    """Judges one device at a time."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._over_since: dict[str, float] = {}  # when each device was first seen to have no step left

    def late(self, device: JoinedDevice, seconds: float | None, *, waits: bool, waited_for: bool, over: bool) -> str:
        """Why a device is waited for no longer; empty: it is.

        seconds: that it has owed the frame that a step at the stage waits for; None: no step waits. waits: a frame of
        its own waits for others. waited_for: others wait for it. over: it has no step left, and is to close the job.
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
