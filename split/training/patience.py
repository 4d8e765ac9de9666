"""The time for which a job waits for a device that is connected and silent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_HALVINGS = 4  # most halvings: the least patience is a sixteenth
_KEEPS_PACE = 20  # steps in a row after which a device that was silent once is waited for as long as any other


@dataclass
class Patience:
    """How long devices are waited for.

    seconds: for how long a device may owe a frame before the others go on without it.
    closing: seconds, in all, that devices have after the job's last step to evaluate, to report and to close.

    A device that was put out for its silence comes back by itself, and could hold up the others again. So its patience
    is halved each time, down to a sixteenth. It is whole again once the device has kept pace for 20 steps in a row, or
    40 if it was silent twice, 80 if three times, and so on.
    """

    seconds: float = 300.0
    closing: float = 1800.0
    _silences: Counter[str] = field(default_factory=Counter, init=False)  # of each device, in all
    _halvings: Counter[str] = field(default_factory=Counter, init=False)  # of each device's patience, now
    _steps: Counter[str] = field(default_factory=Counter, init=False)  # of each device, in a row since its last silence

    def of(self, device: str) -> float:
        """Seconds for which this device may owe a frame."""
        return self.seconds / float(2 ** self._halvings[device])

    def is_least(self, device: str) -> bool:
        """Whether the device has been silent so often that its patience is not halved any more."""
        return self._halvings[device] == _HALVINGS

    def was_silent(self, device: str) -> None:
        self._silences[device] += 1
        self._halvings[device] = min(_HALVINGS, self._halvings[device] + 1)
        self._steps[device] = 0

    def kept_pace(self, device: str) -> None:
        """Notes that the device has done a step."""
        self._steps[device] += 1
        if self._halvings[device] and self._steps[device] >= _KEEPS_PACE * 2 ** (self._silences[device] - 1):
            self._halvings[device] = 0
