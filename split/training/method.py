"""What a method is to the coordinator and to devices: a maker of its two sides. split/methods has them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape
from isthmus.split.models.precision import pick_precision
from isthmus.split.models.source import TensorSource
from isthmus.split.plan.cut_mover import CutMover
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.device_steps import DeviceContext, DeviceSteps
from isthmus.split.training.steps import HostSteps

Reload = Callable[[int], tuple[TensorSource, str]]
"""Function from a cut to what a device with this cut holds of the model, and its digest."""


@dataclass(frozen=True)
class StageResources:
    """What a job's stage is made of.

    source: the whole model.
    shapes: the devices' shapes, by name.
    device: the torch device to compute on.
    digests: digests of the model files that a device holds, by cut; empty if not known.
    mover: decides when cuts move; None if they never do.
    """

    source: TensorSource
    config: TrainingConfig
    shapes: Mapping[str, Shape]
    device: torch.device
    ledger: Ledger
    digests: Mapping[int, str] = field(default_factory=dict)
    mover: CutMover | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which training computes."""
        return pick_precision(self.config.optimizer.precision, self.device)


@dataclass(frozen=True)
class DeviceResources:
    """What a device's part of a job is made of.

    source: the device's part of the model.
    device: the torch device to compute on.
    reload: loads the part for another cut; None where the cut stays.
    """

    source: TensorSource
    shape: Shape
    device: torch.device
    reload: Reload | None = None


class Method(ABC):
    """A way to train with several devices."""

    @abstractmethod
    def host_steps(self, resources: StageResources) -> HostSteps:
        """Makes the method's steps at the coordinator. Raises BadRequest for shapes that it cannot have."""

    @abstractmethod
    def device_steps(self, context: DeviceContext, resources: DeviceResources) -> DeviceSteps:
        """Makes the method's steps on a device."""

    @abstractmethod
    def check_shapes(self, config: TrainingConfig, shapes: Mapping[str, Shape]) -> None:
        """Raises BadRequest for devices that cannot take part in one job.

        shapes: the devices' shapes, by name.
        """

    def lets_out(self, config: TrainingConfig) -> str:
        """Options of a job by which more leaves devices than by the method itself, and which owners have to allow.

        Empty if none of them is chosen.
        """
        return ""
