"""DLoRA in this process: the backbone and devices as threads on LocalLinks. For tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from isthmus.split.dlora.backbone import Backbone
from isthmus.split.dlora.device import DloraTrainer
from isthmus.split.dlora.host import BackboneHost
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.events import Tell, tell_nobody
from isthmus.split.job.shapes import Shape
from isthmus.split.link.profile import LinkProfile
from isthmus.split.lora.lora import initial_adapter
from isthmus.split.lora.sites import layout_of
from isthmus.split.models.precision import pick_device, pick_precision
from isthmus.split.models.source import TensorSource
from isthmus.split.plan.parts import device_stages, parts_of, server_stages
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.checkpoint import CheckpointFolder, DeviceRecord
from isthmus.split.training.local import LocalJob, Text


@dataclass(frozen=True)
class DloraRun:
    """What a run left: each device's adapter by names in the whole model, its ledger; the server's; the average."""

    adapters: dict[str, dict[str, Tensor]]
    ledgers: dict[str, Ledger]
    server: Ledger
    average: Tensor | None


def backbone_of(
    source: TensorSource, config: TrainingConfig, shapes: Mapping[str, Shape], device: str = "cpu"
) -> Backbone:
    where = pick_device(device)
    stages = server_stages(source, config, shapes, where)
    return Backbone(
        stages, layout_of(source.config, config), Ledger(), dtype=pick_precision(config.optimizer.precision, where)
    )


def device_of(
    source: TensorSource,
    config: TrainingConfig,
    text: Text,
    record: DeviceRecord | None = None,
    device: str = "cpu",
    shape: Shape | None = None,
) -> DloraTrainer:
    """shape: of the device; None: the job's."""
    where, shape = pick_device(device), shape or Shape(config.devices.cut_layer, config.lora.rank)
    stages = device_stages(source, config, shape, where)
    dtype = pick_precision(config.optimizer.precision, where)
    return DloraTrainer(stages, source.config, config, *text, Ledger(), dtype=dtype, record=record, shape=shape)


def train_dlora_locally(
    source: TensorSource,
    config: TrainingConfig,
    texts: Sequence[Text],
    *,
    device: str = "cpu",
    shapes: Sequence[Shape] | None = None,
    profile: LinkProfile = LinkProfile(),
    checkpoints: Path | None = None,
    tell: Tell = tell_nobody,
) -> DloraRun:
    """Trains the devices d0, d1, ... on their texts, as `train_split_locally` does for the other split.

    checkpoints: a folder for records; what is there is gone on from. Raises the first error of a device or the stage.
    """
    own = Shape(config.devices.cut_layer, config.lora.rank)
    named = {f"d{number}": shapes[number] if shapes else own for number in range(len(texts))}
    trainers = {
        name: device_of(
            source, config, text, DeviceRecord(checkpoints / name) if checkpoints else None, device, named[name]
        )
        for name, text in zip(named, texts, strict=True)
    }
    kept = CheckpointFolder(checkpoints / "server") if checkpoints else None
    job = LocalJob(tell)
    host = BackboneHost(
        backbone_of(source, config, named, device),
        config,
        {name: trainer.layout for name, trainer in trainers.items()},
        initial_adapter=initial_adapter(parts_of(source.config, config).adapter, config.seed),
        checkpoints=kept,
        resume=kept.last() if kept else None,
        tell=job.told,
    )

    job.run(host, trainers, profile)
    adapters = {name: trainer.adapter() for name, trainer in trainers.items()}
    ledgers = {name: trainer.ledger for name, trainer in trainers.items()}
    return DloraRun(adapters, ledgers, host.ledger, host.average)
