"""A served model as a job: what each holder gets of the model, and what the gateway's actor is told."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isthmus.coordinator.gateway.actor import GatewayTask
from isthmus.coordinator.jobs.planning import memory_to_use, plan_serving
from isthmus.coordinator.jobs.weights import DeviceWeights, weights_of
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest
from isthmus.split.inference.local import LOOKUP, NONE, context_of, open_draft_model
from isthmus.split.inference.serving import (
    CLOUD,
    AdapterConfig,
    ServingConfig,
    SpanConfig,
    check_spans,
    memory_of,
)
from isthmus.split.inference.using import user_parts
from isthmus.split.lora.folder import AdapterFolder
from isthmus.split.lora.served import LoraAdapter
from isthmus.split.models.source import open_model
from isthmus.split.models.stage import StageSpec
from isthmus.split.plan.memory import adapter_bytes


class ServingMethod:
    """The method `serve`: a device holds the blocks of its span."""

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
            adapter.load(0, layers)  # so that errors in its values show now
        self._weights: dict[str, DeviceWeights] = {}
        for span in self.config.spans:
            names = StageSpec(span.first, span.last, embeds=False, head=False).tensor_names(self.folder.config)
            self._weights[str(span)] = weights_of(self.folder, names, cache, self._loras(span.first, span.last, cache))
        self._user_weights: dict[int, DeviceWeights] = {}
        for blocks in self.config.boundaries if self.config.may_use else ():
            needed = {name for spec in user_parts(layers, blocks) for name in spec.tensor_names(self.folder.config)}
            self._user_weights[blocks] = weights_of(self.folder, needed, cache, self._loras(0, blocks, cache))

    def _loras(self, first: int, last: int, cache: Path) -> dict[str, DeviceWeights]:
        """The adapters' tensors for these blocks, by adapter."""
        return {
            one.name: weights_of(folder, adapter.names(first, last), cache)
            for one, adapter, folder in zip(self.config.adapters, self._adapters, self._folders, strict=True)
        }

    def user_weights(self, blocks: int) -> DeviceWeights:
        """Weights for a guest, which has the ends and the first `blocks` blocks of the model.

        Raises BadRequest for a number of blocks at which no span begins.
        """
        if blocks not in self._user_weights:
            starts = ", ".join(map(str, self._user_weights))
            raise BadRequest(f"a device that uses this model may have {starts} of its blocks, not {blocks}")
        return self._user_weights[blocks]

    def for_devices(self) -> str:
        """The configuration as JSON, without what devices have no need to know."""
        adapters = tuple(AdapterConfig(one.name) for one in self.config.adapters)
        secret = {"key_sha256": "", "tls_certificate": "", "tls_key": "", "draft": NONE}
        return self.config.but(**secret, adapters=adapters).to_json()

    def planned(self, profiles: Mapping[str, pb.Profile]) -> tuple[ServingMethod, pb.ServingPlanned | None]:
        """This method with the spans asked for or, if none were, the best ones; and the event that tells of them.

        profiles: profiles of CLOUD and of the devices that may be used, by name.

        Raises BadRequest if nobody has the memory.
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
        return ServingMethod(spec, self._cache), plan.told

    def weights(self, device: str, blocks: int = 0) -> DeviceWeights:
        return self._weights[str(self.config.span_of(device))]

    def check_device(self, name: str, profile: pb.Profile) -> None:
        span = self.config.span_of(name)
        needed = memory_of(self.folder.config, self.config).held_bytes(span.first, span.last, self._adapters)
        memory = memory_to_use(profile)
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
