"""A training job, by its method: what each device gets of the model, and what the stage's actor is told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.coordinator.jobs.heat_map import heat_map, last_of_each
from isthmus.coordinator.jobs.planning import memory_to_use
from isthmus.coordinator.jobs.weights import DeviceWeights, weights_of
from isthmus.coordinator.stages.stage_actor import StageTask
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest, NotAllowed
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, as_plain, asked, check_named, fixed_shapes, from_plain
from isthmus.split.link.profile import LinkProfile
from isthmus.split.lora.sites import layout_of
from isthmus.split.methods import method_of
from isthmus.split.models.source import open_model
from isthmus.split.plan.costs import Costs
from isthmus.split.plan.parts import parts_of
from isthmus.split.plan.shapes import Capabilities, check_memory, choose_shapes
from isthmus.split.training.checkpoint import CheckpointFolder


class TrainingMethod:
    """A training: a device holds the blocks below its cut, and trains by one of split/methods."""

    def __init__(self, spec: pb.JobSpec, cache: Path) -> None:
        self.config = TrainingConfig.from_json(spec.training)
        if self.config.method != spec.method:
            raise BadRequest(
                f"method {spec.method} with the options of another: say --method {self.config.method} or leave it out"
            )
        self.steps = self.config.steps
        self.folder = open_model(spec.model)
        self._spec, self._cache = spec, cache
        self._weights: dict[int, DeviceWeights] = {}  # by cut
        self.shapes: dict[str, Shape] = {}  # the devices' shapes, once the devices are here
        self._memory: dict[str, float] = {}
        if spec.devices:
            check_named(self.config, spec.devices)
            if not self.automatic:
                method_of(self.config).check_shapes(self.config, fixed_shapes(self.config, spec.devices))
        cuts = asked(self.config)[0]
        for cut in sorted(set(cuts.numbers)):  # reads each one's weights now, so that errors show now
            self._weights_of(cut)

    @property
    def automatic(self) -> bool:
        """Whether a cut or a rank is to be chosen here."""
        return any(wanted.automatic for wanted in asked(self.config))

    def kept_shapes(self, folder: Path, events: Iterable[pb.Event]) -> dict[str, Shape]:
        """The shapes in a job that goes on, by device.

        folder: the job's folder; a checkpoint that has shapes counts more than the events, for cuts may have moved
        since.
        events: the job's events, which told what was chosen.
        """
        shapes = {}
        for event in events:
            if event.HasField("shape"):
                shapes[event.device] = Shape(event.shape.cut, event.shape.rank)
        last = CheckpointFolder(folder / "checkpoints").last()
        return {**shapes, **from_plain(last.shapes)} if last else shapes

    def choose(
        self, profiles: Mapping[str, pb.Profile], server_flops: float, kept: Mapping[str, Shape]
    ) -> dict[str, pb.ShapeChosen]:
        """Decides what each device holds and trains, and returns the events that tell of it, by device.

        profiles: the devices' profiles, by name.
        server_flops: FLOP/s of the stage.
        kept: shapes of an earlier run, which stay.

        There is nothing to tell where all devices are alike and nothing was chosen. Raises BadRequest where memory does
        not suffice.
        """
        costs = Costs(self.folder.config, self.config)
        check_named(self.config, profiles)
        told: dict[str, pb.ShapeChosen] = {}
        if self.automatic and not kept.keys() >= profiles.keys():
            able = {
                name: Capabilities(one.training_flops, memory_to_use(one), _link(one)) for name, one in profiles.items()
            }
            choices = choose_shapes(costs, able, Capabilities(server_flops), kept)
            shapes = {name: choice.shape for name, choice in choices.items()}
            told = {name: choice.told(name) for name, choice in choices.items()}
        elif self.automatic:
            shapes = {name: kept[name] for name in profiles}
        else:
            shapes = fixed_shapes(self.config, profiles)
        self._memory = {name: memory_to_use(profile) for name, profile in profiles.items()}
        for name, shape in shapes.items():
            check_memory(costs, name, shape, memory_to_use(profiles[name]))
        if not told and len(set(shapes.values())) > 1:
            told = {n: pb.ShapeChosen(cut=s.cut, rank=s.rank, message=f"{n}: {s}") for n, s in shapes.items()}
        self.shaped(shapes)
        return told

    def shaped(self, shapes: Mapping[str, Shape]) -> None:
        """Takes up what the devices are to hold, by name. Raises BadRequest for shapes that the method cannot have."""
        method_of(self.config).check_shapes(self.config, shapes)
        for shape in shapes.values():
            parts_of(self.folder.config, self.config, shape)
            self._weights_of(shape.cut)
        self.shapes = dict(shapes)

    def weights(self, device: str, blocks: int = 0) -> DeviceWeights:
        if blocks and blocks not in self._cuts([device]):
            raise NotAllowed(f"device {device} has no part with {blocks} blocks in this job")
        return self._weights_of(blocks or self.shapes[device].cut)

    def moved(self, device: str, shape: Shape) -> None:
        """Notes that a device's cut has moved, so that from now on it gets that part when it asks again."""
        self.shapes[device] = shape

    def _cuts(self, devices: Iterable[str]) -> list[int]:
        """All cuts that these devices may come to have."""
        wanted, layers = asked(self.config)[0], self.folder.config.num_hidden_layers
        free = any(wanted.of(device) is None for device in devices)
        return sorted({self.shapes[device].cut for device in devices} | set(range(1, layers) if free else ()))

    def check_device(self, name: str, profile: pb.Profile) -> None:
        pass  # was checked when its shape was chosen

    def actor_task(self, job: str, devices: Mapping[str, str], folder: Path, resume: bool) -> StageTask:
        return StageTask(
            job=job,
            model=str(self.folder.path),
            base_model=self._spec.model,
            training=self._spec.training,
            devices=dict(devices),
            stage_digests={cut: self._weights_of(cut).digest for cut in self._cuts(devices)},
            shapes=as_plain(self.shapes),
            memory=self._memory,
            folder=str(folder),
            resume=resume,
        )

    def heat_maps(self, changes: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, str]:
        if not changes:
            return {}
        names = [module.name for module in layout_of(self.folder.config, self.config).modules]
        folder.mkdir(parents=True, exist_ok=True)
        drawn = {}
        for device in sorted({change["device"] for change in changes}):
            path = folder / f"modules-{device}.png"
            mine = [(change["step"], change["active"]) for change in changes if change["device"] == device]
            heat_map(path, names, [(0, names), *last_of_each(mine)], self.steps)
            drawn[device] = str(path)
        return drawn

    def device_task(self, task: pb.Task, device: str) -> None:
        shape = self.shapes[device]
        task.shape.cut, task.shape.rank = shape.cut, shape.rank

    def is_lost(self, devices: Collection[str], failed: Collection[str], started: bool) -> bool:
        alone = not self.config.averages  # then no device waits for another
        return set(devices) <= set(failed) if started or alone else bool(failed)

    def _weights_of(self, cut: int) -> DeviceWeights:
        if cut not in self._weights:
            parts = parts_of(self.folder.config, self.config, Shape(cut, self.config.lora.rank))
            self._weights[cut] = weights_of(self.folder, parts.device_tensors(self.folder.config), self._cache)
        return self._weights[cut]


def _link(profile: pb.Profile) -> LinkProfile:
    return LinkProfile.from_proto(profile.link) if profile.HasField("link") else LinkProfile()
