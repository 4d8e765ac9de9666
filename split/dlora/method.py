"""DLoRA: all that is trained is on the devices; the coordinator has the frozen blocks, and asks for what LoRA adds."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.split.dlora.backbone import Backbone
from isthmus.split.dlora.device import DloraDevice
from isthmus.split.dlora.host import DloraHost
from isthmus.split.errors import BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import MERGE
from isthmus.split.job.shapes import Shape
from isthmus.split.lora.lora import initial_adapter
from isthmus.split.lora.sites import layout_of
from isthmus.split.plan.parts import device_stages, parts_of, server_stages
from isthmus.split.training.device_steps import DeviceContext
from isthmus.split.training.method import DeviceResources, Method, StageResources


class Dlora(Method):
    def check_shapes(self, config: TrainingConfig, shapes: Mapping[str, Shape]) -> None:
        if config.dlora.aggregate and len(set(shapes.values())) > 1:
            raise BadRequest("--aggregate with method dlora: devices that differ have no average; give all one --rank")

    def lets_out(self, config: TrainingConfig) -> str:
        return "--aggregate or --killed merge" if config.dlora.aggregate or config.dlora.killed == MERGE else ""

    def host_steps(self, resources: StageResources) -> DloraHost:
        source, config, shapes = resources.source, resources.config, resources.shapes
        layout = layout_of(source.config, config)
        stages = server_stages(source, config, shapes, resources.device)
        adapter = parts_of(source.config, config, next(iter(shapes.values()))).adapter
        return DloraHost(
            Backbone(stages, layout, resources.ledger, dtype=resources.dtype),
            config,
            {name: layout.cut_at(shape.cut, shape.rank) for name, shape in shapes.items()},
            initial=initial_adapter(adapter, config.seed),
            digests=resources.digests,
        )

    def device_steps(self, context: DeviceContext, resources: DeviceResources) -> DloraDevice:
        stages = device_stages(resources.source, context.config, resources.shape, resources.device)
        return DloraDevice(context, stages, resources.source.config, resources.shape)
