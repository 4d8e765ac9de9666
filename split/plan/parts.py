"""Who holds what of a model in a job: the device's stages, the server's, and the shape of the device's adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from peft import inject_adapter_in_model
from torch import Tensor
from transformers import PretrainedConfig

from isthmus.split.aggregation.adapter_layout import AdapterLayout
from isthmus.split.aggregation.merger import Merger
from isthmus.split.errors import BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import AVERAGE, Shape, aggregation_of, asked
from isthmus.split.lora.lora import A, add_lora, lora_config, lora_parameters
from isthmus.split.lora.sites import Layout, layout_of
from isthmus.split.lora.sites import adapter_of as adapter_of_modules
from isthmus.split.models.architectures import architecture_of
from isthmus.split.models.source import TensorSource
from isthmus.split.models.stage import Stage, StageSpec, build_stages, cut_in_two, cut_u_shaped, skeleton
from isthmus.split.tls import MAX_MESSAGE_BYTES

_LARGEST_FRAME = 0.9 * MAX_MESSAGE_BYTES  # bytes of one tensor: the rest is for labels, values and the envelope


@dataclass(frozen=True)
class Parts:
    """Who holds what of a model.

    device: the device's stages, (front,), or (front, tail) in the U-shape. server: all that the device does not hold.
    adapter: the device's LoRA, as empty tensors by name (meta device).
    """

    device: tuple[StageSpec, ...]
    server: StageSpec
    adapter: dict[str, Tensor]

    def device_tensors(self, config: PretrainedConfig) -> tuple[str, ...]:
        """Names, in the checkpoint, of all tensors that a device holds."""
        return tuple(dict.fromkeys(name for spec in self.device for name in spec.tensor_names(config)))


def parts_of(config: PretrainedConfig, training: TrainingConfig, shape: Shape | None = None) -> Parts:
    """Cut the model for a device of this shape; None: with the job's own cut and rank.

    config: of the whole model. Raises BadRequest for a cut, modules, a batch or an adapter that cannot be.
    """
    cut, rank = (training.devices.cut_layer, training.lora.rank) if shape is None else (shape.cut, shape.rank)
    if training.devices.labels == "device":
        front, server, tail = cut_u_shaped(config, cut)
        device: tuple[StageSpec, ...] = (front, tail)
    else:
        front, server = cut_in_two(config, cut)
        device = (front,)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and training.text.sequence_length > limit:
        raise BadRequest(f"sequence_length {training.text.sequence_length} is more than this model's {limit}")
    frame = 4 * training.batch_size * training.text.sequence_length * config.hidden_size
    if frame > _LARGEST_FRAME:
        raise BadRequest(
            f"hidden states of {frame / 2**20:.0f} MiB a step do not fit a message of "
            f"{MAX_MESSAGE_BYTES / 2**20:.0f} MiB; choose a smaller batch_size or sequence_length"
        )
    if training.devices_train_all:
        layout = layout_of(config, training).cut_at(cut, rank)
        _check_site_frames(training, layout)
        adapter = adapter_of_modules(layout)
    else:
        adapter = adapter_of(config, training, front, rank)  # checks the target modules for every cut
    size = 4 * sum(value.numel() for value in adapter.values())
    if size > _LARGEST_FRAME and training.averages:  # else it stays on the device
        raise BadRequest(
            f"a device's adapter of {size / 2**20:.0f} MiB does not fit a message of {MAX_MESSAGE_BYTES / 2**20:.0f} "
            "MiB; choose a smaller rank or cut_layer, or fewer target_modules"
        )
    return Parts(device, server, adapter)


def _check_site_frames(training: TrainingConfig, layout: Layout) -> None:
    """Raises BadRequest where what modules of one site exchange (DLoRA) is too much for a message."""
    # An evaluation's batches are whole, and so may a step's be where the link decides.
    parts = max(1, training.link.micro_batches) if training.text.validation_fraction == 0 else 1
    frame = 4 * math.ceil(training.batch_size / parts) * training.text.sequence_length * layout.widest
    if frame > _LARGEST_FRAME:
        raise BadRequest(
            f"what LoRA modules with one input exchange, up to {frame / 2**20:.0f} MiB, does not fit a message of "
            f"{MAX_MESSAGE_BYTES / 2**20:.0f} MiB; choose a smaller batch_size or sequence_length, fewer "
            "target_modules or, with validation_fraction 0, more micro_batches"
        )


def segments_of(config: PretrainedConfig, training: TrainingConfig, cuts: Iterable[int]) -> list[StageSpec]:
    """The server's blocks from the smallest cut on, as consecutive stages between the cuts: devices enter at their own.

    The head is on the last stage where labels are at the server.
    """
    edges = [*sorted(set(cuts)), config.num_hidden_layers]
    head = training.devices.labels == "server"
    return [StageSpec(first, last, embeds=False, head=head and last == edges[-1]) for first, last in pairwise(edges)]


def device_stages(
    source: TensorSource, training: TrainingConfig, shape: Shape, where: torch.device | str
) -> list[Stage]:
    """Build the stages of a device of this shape, with its LoRA."""
    stages = build_stages(source, parts_of(source.config, training, shape).device, device=where)
    if shape.rank:
        add_lora(stages[0], lora_config(training, source.config, shape.rank), training.seed)
    return stages


def server_stages(
    source: TensorSource, training: TrainingConfig, shapes: Mapping[str, Shape], where: torch.device | str
) -> list[Stage]:
    """Build the server's segments with LoRA of the job's rank; without LoRA where all modules are the devices'."""
    cuts = [shape.cut for shape in shapes.values()]
    segments = build_stages(source, segments_of(source.config, training, cuts), device=where)
    for segment in segments if not training.devices_train_all else ():
        add_lora(segment, lora_config(training, source.config), training.seed)
    return segments


def merger_of(config: PretrainedConfig, training: TrainingConfig, shapes: Mapping[str, Shape]) -> Merger | None:
    """Make the merger of a job whose devices differ; None where all are alike and A and B are averaged."""
    alike = len(set(shapes.values())) == 1 and all(shape.rank == training.lora.rank for shape in shapes.values())
    moves = asked(training)[0].automatic
    if alike and not moves and aggregation_of(training, shapes) == AVERAGE:
        return None
    deepest = config.num_hidden_layers - 1
    adapter = adapter_of(config, training, StageSpec(0, deepest, embeds=True, head=False), training.lora.rank)
    prefix = architecture_of(config).layers + "."
    modules = [name.removesuffix(A) for name in adapter if name.endswith(A)]
    blocks = {module: int(module.removeprefix(prefix).partition(".")[0]) for module in modules}
    return Merger(training, AdapterLayout(blocks, adapter), dict(shapes))


def adapter_of(config: PretrainedConfig, training: TrainingConfig, front: StageSpec, rank: int) -> dict[str, Tensor]:
    """The LoRA of a front stage as empty tensors (meta device), by their names in the whole model."""
    lora = lora_config(training, config, rank or None)
    model = skeleton(config, front)
    if front.last > front.first and rank:
        with torch.device("meta"):
            inject_adapter_in_model(lora, model)
    stage = Stage(front, model, architecture_of(config))
    return {name: value.detach() for name, value in lora_parameters([stage]).items()}
