"""Frames that wait until every device at work has sent its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from isthmus.protos.v1 import stage_pb2
from isthmus.split.link.frames import Frame


@dataclass(frozen=True, order=True)
class Place:
    """The place of a frame in a job."""

    step: int
    phase: stage_pb2.Phase
    micro_batch: int


@dataclass
class Barrier:
    """The waiting frames, by place and device."""

    _groups: dict[Place, dict[str, Frame]] = field(default_factory=dict)

    def put(self, device: str, frame: Frame) -> None:
        self._groups.setdefault(Place(frame.step, frame.phase, frame.micro_batch), {})[device] = frame

    def take_complete(self, devices: Collection[str]) -> tuple[Place, dict[str, Frame]] | None:
        """Removes and returns the first group that has a frame of each of these devices; None if there is none."""
        for place in sorted(self._groups):
            if devices and set(devices) <= self._groups[place].keys():
                group = self._groups.pop(place)
                return place, {device: group[device] for device in sorted(devices)}
        return None

    def missing(self, devices: Iterable[str]) -> set[str]:
        """Those of these devices that the others wait for: the earliest group lacks their frames."""
        if not self._groups:
            return set()
        return set(devices) - self._groups[min(self._groups)].keys()

    def has(self, device: str) -> bool:
        """Whether a frame of this device waits for those of others."""
        return any(device in group for group in self._groups.values())

    def drop(self, device: str) -> None:
        """Removes the frames of a device that has gone."""
        for group in self._groups.values():
            group.pop(device, None)
        self._groups = {place: group for place, group in self._groups.items() if group}

    def clear(self) -> None:
        self._groups.clear()
