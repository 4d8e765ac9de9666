"""A method's own steps at the coordinator, which a job's host calls. All else is in hosted_job.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.aggregation.averager import Share
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.lora.sites import Layout
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.averages import AggregationResult
from isthmus.split.training.barrier import Place
from isthmus.split.training.checkpoint import Checkpoint
from isthmus.split.training.membership import JoinedDevice, not_due

if TYPE_CHECKING:
    from isthmus.split.training.hosted_job import HostedJob


class HostSteps(ABC):
    """A method's side of a job at the coordinator. Everything is called in the host's thread.

    joint: phases that run once every device at work has sent its frame. With STEP among them devices do each step
    together; without it each has steps of its own, and waits only at aggregations.
    keeps_own: whether the adapters stay the devices' own. Then the job ends when each awaited device has closed it,
    else when those at work have.
    job, put: set before anything else is called.
    """

    joint: frozenset[int] = frozenset({Phase.AGGREGATE})
    keeps_own = False
    job: HostedJob
    put: Callable[[Callable[[], None]], None]  # takes work for the host's thread from another one
    ledger: Ledger
    hidden_size: int
    digest: str  # digest of the model files that devices hold; empty if not known

    # ---- what each method has ----

    @abstractmethod
    def adapter_values(self, device: str) -> int:
        """Length of a device's flattened adapter."""

    @abstractmethod
    def check_open(self, device: str, opened: stage_pb2.Open) -> None:
        """Raises BadFrame for a device with another adapter, or other model files, than it has to have."""

    @abstractmethod
    def unfit(self, shares: Mapping[str, Share], last: Tensor | None) -> set[str]:
        """The devices whose adapters have values that nobody could compute with.

        last: the average before, flat; None if there was none.
        """

    @abstractmethod
    def aggregate(self, step: int, shares: Mapping[str, Share], last: Tensor | None) -> AggregationResult:
        """Makes one adapter of those that devices have sent after `step`, or one for each device."""

    @abstractmethod
    def adapter(self, point: Checkpoint) -> dict[str, Tensor] | None:
        """What the job has trained, by names in the whole model; None where each device keeps its own."""

    # ---- what some have ----

    def begin(self, device: JoinedDevice) -> Frame:
        """The answer to a device's OPEN, as it is let in at `device.step`, which this may change."""
        return Frame(Phase.OPEN, tensor=self.job.point.device_adapter)

    def check(self, device: JoinedDevice, frame: Frame) -> None:
        """Raises BadFrame for a frame that is not due from a device of whose steps only STEP tells."""
        owes, at = self.job.owes_adapter(device), frame.step
        between = not owes and at == device.step
        due = {
            Phase.AGGREGATE: owes and at == device.step - 1 and frame.tensor is not None,
            Phase.STEP: between and at < self.job.config.steps,
            Phase.EVALUATE: between and self.job.config.evaluates_after(at),
            Phase.REPORT: between and self.job.config.evaluates_after(at),
            Phase.CLOSE: between and at == self.job.config.steps,
        }
        if not due.get(frame.phase, False):
            raise not_due(device.name, frame)

    def take(self, device: JoinedDevice, frame: Frame) -> None:
        """Takes a frame of the method's own, which was checked."""
        raise not_due(device.name, frame)

    def run(self, place: Place, frames: Mapping[str, Frame]) -> None:  # noqa: B027  # most methods have nothing to do
        """Runs all devices' frames of a joint phase other than AGGREGATE."""

    def after_aggregation(self, step: int, devices: Mapping[str, JoinedDevice]) -> Mapping[str, Frame]:
        """Answers that replace those of the aggregation, by device."""
        return {}

    def answered(self, device: JoinedDevice, frame: Frame) -> None:  # noqa: B027  # most methods have nothing to do
        """Notes an answer that a device has got."""

    def stepped(self, device: JoinedDevice, frame: Frame) -> None:  # noqa: B027  # most methods have nothing to do
        """Notes that a device has done a step of its own."""

    def left(self, device: JoinedDevice) -> None:  # noqa: B027  # most methods have nothing to do
        """Forgets what a device that has gone had under way."""

    def drop(self) -> bool:
        """Forgets a step under way when no device is left. Returns whether a part of it has been applied already."""
        return False

    def into(self, point: Checkpoint) -> Checkpoint:
        """Adds to a checkpoint what this side of the method needs to go on."""
        return point

    def restore(self, point: Checkpoint) -> None:  # noqa: B027  # most methods have nothing to do
        """Goes back to a checkpoint that `into` filled. Raises WrongState where it does not fit this job."""

    def owed_by(self, device: JoinedDevice) -> float | None:
        """Seconds for which a device has owed a frame that a step at the stage waits for; None if no step waits."""
        return None

    def stage_seconds(self) -> Mapping[str, float]:
        """Seconds of `forward` and `backward` of a step at the stage, for plans; empty if not measured."""
        return {}

    def adapter_shapes(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        """Shapes of the matrices of a device's adapter; None where they are the same for all devices."""
        return None

    def layout_for(self, device: str) -> Layout | None:
        """The layout of a device's modules in the stage's blocks; None if none are there."""
        return None
