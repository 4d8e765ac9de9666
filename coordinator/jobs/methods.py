"""What a job does, by its method."""

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
    """Made by `method_of`. folder: the whole model. steps: of the job; 0: it goes on until it is cancelled."""

    folder: ModelFolder
    steps: int

    def weights(self, device: str, blocks: int = 0) -> DeviceWeights:
        """The device's part of the model. blocks: of one whose cut moves, the cut that it is to have."""

    def check_device(self, name: str, profile: pb.Profile) -> None:
        """Raises BadRequest for a device that cannot do it."""

    def actor_task(self, job: str, devices: Mapping[str, str], folder: Path, resume: bool) -> StageTask | GatewayTask:
        """devices: name -> serial of its certificate. folder: of the job."""

    def heat_maps(self, changes: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, str]:
        """Draws, for each device that killed modules, which trained when; returns where. changes: of the report."""

    def device_task(self, task: pb.Task, device: str) -> None:
        """Adds what a device has to know beside the job's spec."""

    def is_lost(self, devices: Collection[str], failed: Collection[str], started: bool) -> bool:
        """Whether the job cannot go on without those of its devices that have failed."""


METHODS: Mapping[str, type[TrainingMethod] | type[ServingMethod]] = {
    **dict.fromkeys(TRAINING_METHODS, TrainingMethod),
    "serve": ServingMethod,
}


def method_of(spec: pb.JobSpec, cache: Path) -> JobMethod:
    """Reads and digests what devices need of the model (slow for large ones; `cache` keeps the digests).

    Raises BadRequest for a method that there is not, and for what is wrong with a spec.
    """
    if spec.method not in METHODS:
        raise BadRequest(f"method {spec.method!r} is not one of {', '.join(METHODS)}")
    return METHODS[spec.method](spec, cache)
