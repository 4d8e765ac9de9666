"""SplitLoRA: devices hold the first blocks, the coordinator the others, and each side trains the LoRA of its own."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, aggregation_of
from isthmus.split.lora.lora import initial_adapter
from isthmus.split.models.stage import Stage
from isthmus.split.plan.parts import device_stages, merger_of, parts_of, server_stages
from isthmus.split.training.device_steps import DeviceContext
from isthmus.split.training.job_adapters import JobAdapters, Moving
from isthmus.split.training.method import DeviceResources, Method, StageResources
from isthmus.split.training.server import ServerTrainer
from isthmus.split.training.splitlora_device import SplitLoraDevice
from isthmus.split.training.splitlora_host import SplitLoraHost


class SplitLora(Method):
    def check_shapes(self, config: TrainingConfig, shapes: Mapping[str, Shape]) -> None:
        aggregation_of(config, shapes)

    def host_steps(self, resources: StageResources) -> SplitLoraHost:
        source, config, shapes = resources.source, resources.config, resources.shapes
        parts = parts_of(source.config, config, next(iter(shapes.values())))
        cuts = {name: shape.cut for name, shape in shapes.items()}
        stages = server_stages(source, config, shapes, resources.device)
        trainer = ServerTrainer(stages, config, resources.ledger, dtype=resources.dtype, cuts=cuts)
        moving = None
        if resources.mover is not None:
            moving = Moving(resources.mover, lambda now: server_stages(source, config, now, resources.device))
        adapters = JobAdapters(
            trainer,
            config,
            initial_adapter(parts.adapter, config.seed),
            merging=merger_of(source.config, config, shapes),
            moving=moving,
            digests=resources.digests,
        )
        return SplitLoraHost(trainer, adapters)

    def device_steps(self, context: DeviceContext, resources: DeviceResources) -> SplitLoraDevice:
        config, device, reload = context.config, resources.device, resources.reload
        stages = device_stages(resources.source, config, resources.shape, device)
        if reload is None:
            return SplitLoraDevice(context, stages)

        def reshape(shape: Shape) -> tuple[list[Stage], str]:
            source, digest = reload(shape.cut)
            return device_stages(source, config, shape, device), digest

        return SplitLoraDevice(context, stages, shape=resources.shape, reshape=reshape)
