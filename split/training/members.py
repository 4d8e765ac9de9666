"""The devices of a job as its stage sees them: who may join, and who has."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from isthmus.protos.v1 import stage_pb2
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import missing_families
from isthmus.split.link.coding import Plan
from isthmus.split.link.frames import Frame
from isthmus.split.link.order import Order
from isthmus.split.link.profile import LinkProfile
from isthmus.split.link.stage import Deliver


def problem_with_open(
    device: str, opened: stage_pb2.Open | None, devices: Collection[str], config: TrainingConfig
) -> str:
    """Why a device cannot take part, whatever the method; empty: it can, as far as this goes."""
    if device not in devices:
        return f"device {device} has no part in this job"
    if opened is None:
        return "OPEN without its contents"
    missing = missing_families(config.link.codec, opened.codecs)
    if missing:
        return f"the device lacks codecs of this job: {', '.join(missing)}; update its software, or choose others"
    if not 0 < opened.samples < 2**40:
        return f"{opened.samples} training sequences; at least one is needed"
    return ""


@dataclass
class Member:
    """A device that has joined. order: what its next training frames have to be."""

    deliver: Deliver
    order: Order
    samples: int  # training sequences that it has
    families: frozenset[str] = frozenset()  # of codecs
    measured: stage_pb2.Measured = field(default_factory=stage_pb2.Measured)
    link: LinkProfile = field(default_factory=LinkProfile)  # that the plan was made for
    admitted: bool = False
    moves: bool = False  # its cut has moved, and it does not know yet
    answered: float = field(default_factory=time.monotonic)  # when it last got an answer, so that it is its turn

    @property
    def plan(self) -> Plan:
        return self.order.plan

    def answer(self, frame: Frame) -> None:
        self.answered = time.monotonic()
        self.order.answered(frame)
        self.deliver(frame)

    def admit(self, step: int) -> None:
        self.admitted = True
        self.order.admit(step)
