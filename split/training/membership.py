"""The devices of a job as the coordinator sees them: who may take part, who is waited for, who is at work."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import missing_families, remembers_samples
from isthmus.split.link.coding import Plan
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.profile import LinkProfile
from isthmus.split.link.stage import Deliver

_MOST_KEYS = 2**24  # samples of a device that codecs with a memory tell apart: their order takes 8 bytes each


@dataclass
class JoinedDevice:
    """A device whose stream is open, from its OPEN on.

    deliver: takes an answer to the device, and names its stream.
    link: the link that the device's plan was made for.
    step: the step whose STEP has not come yet.
    averaging: whether its AGGREGATE waits for those of others; until then nothing else may come, for the plan may
    change.
    heard: when a frame last came from it or an answer went to it, in seconds of time.monotonic.
    """

    name: str
    deliver: Deliver
    opened: stage_pb2.Open
    measured: stage_pb2.Measured
    plan: Plan = field(default_factory=Plan)
    link: LinkProfile = field(default_factory=LinkProfile)
    admitted: bool = False
    step: int = 0
    averaging: bool = False
    heard: float = field(default_factory=time.monotonic)

    @property
    def samples(self) -> int:
        """The number of training sequences that the device has."""
        return int(self.opened.samples)

    @property
    def families(self) -> frozenset[str]:
        """The families of codecs that the device knows."""
        return frozenset(self.opened.codecs)

    def answer(self, frame: Frame) -> None:
        """Sends an answer to the device. A plan in it counts from here on."""
        self.heard = time.monotonic()
        if frame.plan is not None:
            self.plan = frame.plan
        self.averaging = False
        self.deliver(frame)


class Membership:
    """Who may take part in a job, and who does.

    devices: all that may take part.
    awaited: those that the job's start waits for and, where each device goes on to its own end, the job's end as well.
    done: those that have closed the job, or were given up after its last step.
    joined: those whose stream is open, by name.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self.devices = frozenset(devices)
        self.awaited = set(self.devices)
        self.done: set[str] = set()
        self.joined: dict[str, JoinedDevice] = {}
        self.started = False

    @property
    def at_work(self) -> list[str]:
        """Names of the devices whose OPEN has been answered."""
        return sorted(name for name, device in self.joined.items() if device.admitted)

    @property
    def waiting(self) -> dict[str, JoinedDevice]:
        """Devices whose OPEN has not been answered yet, by name."""
        return {name: device for name, device in sorted(self.joined.items()) if not device.admitted}

    @property
    def all_here(self) -> bool:
        return self.awaited <= self.joined.keys()

    def of_stream(self, name: str, deliver: Deliver) -> JoinedDevice | None:
        """The device of a stream; None for a stream that was replaced by another, was refused, or has ended."""
        device = self.joined.get(name)
        return None if device is None or device.deliver is not deliver else device

    def others_are_done(self, name: str) -> bool:
        """Whether this device is all that is still awaited."""
        return bool(self.done) and self.awaited - {name} <= self.done


def check_open(
    device: str, opened: stage_pb2.Open | None, devices: Collection[str], config: TrainingConfig
) -> stage_pb2.Open:
    """Returns the contents of an OPEN. Raises BadFrame for a device that cannot take part, whatever the method."""
    if device not in devices:
        raise BadFrame(f"device {device} has no part in this job")
    if opened is None:
        raise BadFrame("OPEN without its contents")
    missing = missing_families(config.link.codec, opened.codecs)
    if missing:
        names = ", ".join(missing)
        raise BadFrame(f"the device lacks codecs of this job: {names}; update its software, or choose others")
    if not 0 < opened.samples < 2**40:
        raise BadFrame(f"{opened.samples} training sequences; at least one is needed")
    if opened.samples > _MOST_KEYS and remembers_samples(config.link.codec):
        raise BadFrame(
            f"{opened.samples} training sequences are more than the {_MOST_KEYS} that ef and delta keep apart"
        )
    if opened.last_step > config.steps:
        raise BadFrame(f"a device after step {opened.last_step} of {config.steps}")
    return opened


def not_due(device: str, frame: Frame) -> BadFrame:
    site = f", site {frame.site}" if frame.site else ""
    place = f"step {frame.step}, micro-batch {frame.micro_batch}{site}"
    return BadFrame(f"{Phase.Name(frame.phase)} of {place} is not due from {device}")
