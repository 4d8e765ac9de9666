"""The ways to run a job, by the name of its method."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from isthmus.coordinator.gateway.actor import GatewayTask
from isthmus.coordinator.jobs.serving import ServingMethod
from isthmus.coordinator.jobs.training import TrainingMethod
from isthmus.coordinator.jobs.weights import DeviceWeights
from isthmus.coordinator.stages.stage_actor import StageTask
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest
from isthmus.split.methods import METHODS as TRAINING_METHODS
from isthmus.split.models.source import ModelFolder


class JobMethod(Protocol):
    """A job as the coordinator runs it. `method_of` makes one.

    folder: the whole model.
    steps: the job's steps; 0 for a job that goes on until it is cancelled.
    """

    folder: ModelFolder
    steps: int

    def weights(self, device: str, blocks: int = 0) -> DeviceWeights:
        """The device's part of the model.

        blocks: the cut that the device moves to; 0 for the one that it has.

        Raises NotAllowed for another part than the device may have.
        """

    def check_device(self, name: str, profile: pb.Profile) -> None:
        """Raises BadRequest for a device that cannot take part."""

    def actor_task(self, job: str, devices: Mapping[str, str], folder: Path, resume: bool) -> StageTask | GatewayTask:
        """Makes the task of the job's actor.

        devices: serial of each device's certificate, by name.
        folder: the job's folder.
        resume: whether the job goes on from its last checkpoint.
        """

    def heat_maps(self, changes: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, str]:
        """Draws, for each device that killed modules, which modules trained when; returns the paths, by device.

        changes: the report's changes of modules.
        """

    def device_task(self, task: pb.Task, device: str) -> None:
        """Adds to a task what its device has to know beside the job's spec."""

    def is_lost(self, devices: Collection[str], failed: Collection[str], started: bool) -> bool:
        """Whether the job cannot go on without those of its devices that have failed."""


METHODS: Mapping[str, type[TrainingMethod] | type[ServingMethod]] = {
    **dict.fromkeys(TRAINING_METHODS, TrainingMethod),
    "serve": ServingMethod,
}


def method_of(spec: pb.JobSpec, cache: Path) -> JobMethod:
    """Reads and digests what devices need of the model, which is slow for large ones.

    cache: the file that keeps the digests.

    Raises BadRequest for an unknown method and for what is wrong with a spec, and BadModelFolder for a model that
    cannot be used.
    """
    if spec.method not in METHODS:
        raise BadRequest(f"method {spec.method!r} is not one of {', '.join(METHODS)}")
    return METHODS[spec.method](spec, cache)
