"""What a job does, by its method: what each device gets of the model, and what the actor at the coordinator is told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from isthmus.coordinator.gateway.actor import GatewayTask
from isthmus.coordinator.jobs.heat_map import heat_map, last_of_each
from isthmus.coordinator.jobs.planning import plan_serving
from isthmus.coordinator.jobs.weights import DeviceWeights, weights_of
from isthmus.coordinator.stages.stage_actor import StageTask
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest, NotAllowed
from isthmus.split.inference.local import LOOKUP, NONE, context_of, open_draft_model
from isthmus.split.inference.serving import (
    CLOUD,
    AdapterConfig,
    ServingConfig,
    SpanConfig,
    adapter_bytes,
    check_spans,
    memory_of,
)
from isthmus.split.inference.using import user_parts
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, as_plain, asked, check_named, fixed_shapes, from_plain
from isthmus.split.link.profile import LinkProfile
from isthmus.split.lora.folder import AdapterFolder
from isthmus.split.lora.served import LoraAdapter
from isthmus.split.lora.sites import layout_of
from isthmus.split.methods import METHODS as TRAINING_METHODS
from isthmus.split.methods import method_of as training_method
from isthmus.split.models.source import ModelFolder, open_model
from isthmus.split.models.stage import StageSpec
from isthmus.split.plan.costs import Costs
from isthmus.split.plan.parts import parts_of
from isthmus.split.plan.shapes import Capabilities, check_memory, choose_shapes
from isthmus.split.training.checkpoint import CheckpointFolder


class Method(Protocol):
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


class Training:
    """A device holds the blocks below its cut, and trains by one of split/methods."""

    def __init__(self, spec: pb.JobSpec, cache: Path) -> None:
        self.config = TrainingConfig.from_json(spec.training)
        if self.config.method != spec.method:
            raise BadRequest(f"method {spec.method} with the options of another: say --method {self.config.method}")
        self.steps = self.config.steps
        self.folder = open_model(spec.model)
        self._spec, self._cache = spec, cache
        self._weights: dict[int, DeviceWeights] = {}  # by cut
        self.shapes: dict[str, Shape] = {}  # of the devices, once they are here
        self._memory: dict[str, float] = {}
        if spec.devices:
            check_named(self.config, spec.devices)
            if not self.automatic:
                training_method(self.config).check_shapes(self.config, fixed_shapes(self.config, spec.devices))
        cuts = asked(self.config)[0]
        for cut in sorted(set(cuts.numbers)):  # what is wrong with one, and reading its weights, comes now
            self._weights_of(cut)

    @property
    def automatic(self) -> bool:
        """Whether a cut or a rank is to be chosen here."""
        return any(wanted.automatic for wanted in asked(self.config))

    def kept_shapes(self, folder: Path, events: Iterable[pb.Event]) -> dict[str, Shape]:
        """Of a job that goes on. events: of the job, which told what was chosen; a checkpoint that has shapes counts
        more, for cuts may have moved since."""
        shapes = {}
        for event in events:
            if event.HasField("shape"):
                shapes[event.device] = Shape(event.shape.cut, event.shape.rank)
        last = CheckpointFolder(folder / "checkpoints").last()
        return {**shapes, **from_plain(last.shapes)} if last else shapes

    def choose(
        self, profiles: Mapping[str, pb.Profile], server_flops: float, kept: Mapping[str, Shape]
    ) -> dict[str, pb.ShapeChosen]:
        """Decides what each device holds and trains. kept: of an earlier run; they stay. Returns what is to be told, by
        device: nothing where all are alike and nothing was chosen. Raises BadRequest where memory does not suffice."""
        costs = Costs(self.folder.config, self.config)
        check_named(self.config, profiles)
        told: dict[str, pb.ShapeChosen] = {}
        if self.automatic and not kept.keys() >= profiles.keys():
            able = {name: Capabilities(one.training_flops, _memory(one), _link(one)) for name, one in profiles.items()}
            choices = choose_shapes(costs, able, Capabilities(server_flops), kept)
            shapes = {name: choice.shape for name, choice in choices.items()}
            told = {name: choice.told(name) for name, choice in choices.items()}
        elif self.automatic:
            shapes = {name: kept[name] for name in profiles}
        else:
            shapes = fixed_shapes(self.config, profiles)
        self._memory = {name: _memory(profile) for name, profile in profiles.items()}
        for name, shape in shapes.items():
            check_memory(costs, name, shape, _memory(profiles[name]))
        if not told and len(set(shapes.values())) > 1:
            told = {n: pb.ShapeChosen(cut=s.cut, rank=s.rank, message=f"{n}: {s}") for n, s in shapes.items()}
        self.shaped(shapes)
        return told

    def shaped(self, shapes: Mapping[str, Shape]) -> None:
        """Takes up what the devices are to hold. Raises BadRequest for what cannot be."""
        training_method(self.config).check_shapes(self.config, shapes)
        for shape in shapes.values():
            parts_of(self.folder.config, self.config, shape)
            self._weights_of(shape.cut)
        self.shapes = dict(shapes)

    def weights(self, device: str, blocks: int = 0) -> DeviceWeights:
        if blocks and blocks not in self._cuts([device]):
            raise NotAllowed(f"device {device} has no part with {blocks} blocks in this job")
        return self._weights_of(blocks or self.shapes[device].cut)

    def moved(self, device: str, shape: Shape) -> None:
        """A device's cut has moved: it is given that from now on when it asks anew."""
        self.shapes[device] = shape

    def _cuts(self, devices: Iterable[str]) -> list[int]:
        """All that these devices may come to have."""
        wanted, layers = asked(self.config)[0], self.folder.config.num_hidden_layers
        free = any(wanted.of(device) is None for device in devices)
        return sorted({self.shapes[device].cut for device in devices} | set(range(1, layers) if free else ()))

    def check_device(self, name: str, profile: pb.Profile) -> None:
        pass  # was done when its shape was chosen

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
        alone = not self.config.averages  # then nobody waits for anybody
        return set(devices) <= set(failed) if started or alone else bool(failed)

    def _weights_of(self, cut: int) -> DeviceWeights:
        if cut not in self._weights:
            parts = parts_of(self.folder.config, self.config, Shape(cut, self.config.lora.rank))
            self._weights[cut] = weights_of(self.folder, parts.device_tensors(self.folder.config), self._cache)
        return self._weights[cut]


class Serving:
    """serve: a device holds the blocks of its span."""

    steps = 0

    def __init__(self, spec: pb.JobSpec, cache: Path) -> None:
        self._spec, self._cache = spec, cache
        self.folder = open_model(spec.model)
        asked, layers = ServingConfig.from_json(spec.serving), self.folder.config.num_hidden_layers
        spans = asked.spans or (SpanConfig(0, layers, (CLOUD,)),)
        check_spans(spans, layers)
        self.asked = asked.but(context=context_of(self.folder, asked.limits.context or None))
        self.config = replace(self.asked, spans=spans)
        if asked.drafts.exit_threshold and len(asked.spans) < 2:
            raise BadRequest("--exit-threshold: name --stages with two spans at least: with one no way is saved")
        if asked.drafts.draft not in (NONE, LOOKUP):
            open_draft_model(asked.drafts.draft, self.folder)
        if sorted(self.config.devices) != sorted(spec.devices):
            raise BadRequest("the devices of a served model are those of its stages")
        self._folders = [AdapterFolder(one.folder) for one in asked.adapters]
        self._adapters = [
            LoraAdapter(one.name, folder, self.folder.config)
            for one, folder in zip(asked.adapters, self._folders, strict=True)
        ]
        for adapter in self._adapters:
            adapter.load(0, layers)  # what is wrong with values shall be said now
        self._weights: dict[str, DeviceWeights] = {}
        for span in self.config.spans:
            names = StageSpec(span.first, span.last, embeds=False, head=False).tensor_names(self.folder.config)
            self._weights[str(span)] = weights_of(self.folder, names, cache, self._loras(span.first, span.last, cache))
        self._user_weights: dict[int, DeviceWeights] = {}
        for blocks in self.config.boundaries if self.config.may_use else ():
            needed = {name for spec in user_parts(layers, blocks) for name in spec.tensor_names(self.folder.config)}
            self._user_weights[blocks] = weights_of(self.folder, needed, cache, self._loras(0, blocks, cache))

    def _loras(self, first: int, last: int, cache: Path) -> dict[str, DeviceWeights]:
        """What the adapters have for these blocks, by name."""
        return {
            one.name: weights_of(folder, adapter.names(first, last), cache)
            for one, adapter, folder in zip(self.config.adapters, self._adapters, self._folders, strict=True)
        }

    def user_weights(self, blocks: int) -> DeviceWeights:
        """Of a device that uses the chain itself. Raises BadRequest for a number of blocks at which no span begins."""
        if blocks not in self._user_weights:
            starts = ", ".join(map(str, self._user_weights))
            raise BadRequest(f"a device that uses this model may have {starts} of its blocks, not {blocks}")
        return self._user_weights[blocks]

    def for_devices(self) -> str:
        """JSON of the configuration, without what is not theirs to know."""
        adapters = tuple(AdapterConfig(one.name) for one in self.config.adapters)
        secret = {"key_sha256": "", "tls_certificate": "", "tls_key": "", "draft": NONE}
        return self.config.but(**secret, adapters=adapters).to_json()

    def planned(self, profiles: Mapping[str, pb.Profile]) -> tuple[Serving, pb.ServingPlanned | None]:
        """With the spans that were asked for or, where none were, the best ones; and what is to be told of them.

        profiles: of CLOUD and of the devices that may be used. Raises BadRequest if nobody has the memory.
        """
        layers = self.folder.config.num_hidden_layers
        adapters = max(adapter_bytes(self._adapters, block, block + 1) for block in range(layers))
        plan = plan_serving(self.folder, self.asked, profiles, adapters)
        if self.asked.spans:
            return self, plan.told
        config = replace(self.asked, spans=plan.spans)
        spec = pb.JobSpec()
        spec.CopyFrom(self._spec)
        spec.serving = config.to_json()
        spec.devices[:] = config.devices
        return Serving(spec, self._cache), plan.told

    def weights(self, device: str, blocks: int = 0) -> DeviceWeights:
        return self._weights[str(self.config.span_of(device))]

    def check_device(self, name: str, profile: pb.Profile) -> None:
        span = self.config.span_of(name)
        needed = memory_of(self.folder, span, self.config, self._adapters)
        memory = profile.accelerator_bytes or profile.memory_bytes
        if memory and needed > memory:
            raise BadRequest(
                f"device {name} has {memory / 2**30:.1f} GiB of memory; blocks {span} take "
                f"{needed / 2**30:.1f} GiB with room for {self.config.room} sequences of {self.config.limits.context} "
                "tokens: give it fewer blocks, or serve fewer sequences or a shorter context"
            )

    def actor_task(self, job: str, devices: Mapping[str, str], folder: Path, resume: bool) -> GatewayTask:
        return GatewayTask(
            job=job,
            model=str(self.folder.path),
            serving=self.config.to_json(),
            devices=dict(devices),
            digests={span: weights.digest for span, weights in self._weights.items()},
            user_digests={blocks: weights.digest for blocks, weights in self._user_weights.items()},
            cache=str(self._cache.parent / "onnx"),
        )

    def heat_maps(self, changes: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, str]:
        return {}

    def device_task(self, task: pb.Task, device: str) -> None:
        task.spec.serving = self.for_devices()
        span = self.config.span_of(device)
        task.first_block, task.last_block = span.first, span.last

    def is_lost(self, devices: Collection[str], failed: Collection[str], started: bool) -> bool:
        return any(set(span.holders) <= set(failed) for span in self.config.spans)


METHODS: Mapping[str, type[Training] | type[Serving]] = {
    **dict.fromkeys(TRAINING_METHODS, Training),
    "serve": Serving,
}


def _memory(profile: pb.Profile) -> float:
    return float(profile.accelerator_bytes or profile.memory_bytes)


def _link(profile: pb.Profile) -> LinkProfile:
    return LinkProfile.from_proto(profile.link) if profile.HasField("link") else LinkProfile()


def method_of(spec: pb.JobSpec, cache: Path) -> Method:
    """Reads and digests what devices need of the model (slow for large ones; `cache` keeps the digests).

    Raises BadRequest for a method that there is not, and for what is wrong with a spec.
    """
    if spec.method not in METHODS:
        raise BadRequest(f"method {spec.method!r} is not one of {', '.join(METHODS)}")
    return METHODS[spec.method](spec, cache)
