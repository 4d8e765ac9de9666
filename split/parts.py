"""Who holds what of a model in a job: the device's stages, the server's, and the shape of the device's adapter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import inject_adapter_in_model
from torch import Tensor
from transformers import PretrainedConfig

from split.adapters.lora import lora_config, lora_parameters
from split.config import TrainingConfig
from split.errors import BadRequest
from split.models.architectures import architecture_of
from split.models.stage import Stage, StageSpec, cut_in_two, cut_u_shaped, skeleton
from split.tls import MAX_MESSAGE_BYTES

_LARGEST_FRAME = 0.9 * MAX_MESSAGE_BYTES  # bytes of one tensor: the rest is for labels, values and the envelope


@dataclass(frozen=True)
class Parts:
    """device: (front,), or (front, tail) in the U-shape. adapter: the device's LoRA, as empty tensors (meta device)."""

    device: tuple[StageSpec, ...]
    server: StageSpec
    adapter: dict[str, Tensor]

    def device_tensors(self, config: PretrainedConfig) -> tuple[str, ...]:
        """Names in the checkpoint of all that a device holds."""
        return tuple(dict.fromkeys(name for spec in self.device for name in spec.tensor_names(config)))


def parts_of(config: PretrainedConfig, training: TrainingConfig) -> Parts:
    """Cuts the model as the job says. Raises BadRequest for a cut, modules, a batch or an adapter that cannot be."""
    if training.labels == "device":
        front, server, tail = cut_u_shaped(config, training.cut_layer)
        device: tuple[StageSpec, ...] = (front, tail)
    else:
        front, server = cut_in_two(config, training.cut_layer)
        device = (front,)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and training.sequence_length > limit:
        raise BadRequest(f"sequence_length {training.sequence_length} is more than this model's {limit}")
    frame = 4 * training.batch_size * training.sequence_length * config.hidden_size
    if frame > _LARGEST_FRAME:
        raise BadRequest(
            f"hidden states of {frame / 2**20:.0f} MiB a step do not fit a message of "
            f"{MAX_MESSAGE_BYTES / 2**20:.0f} MiB; choose a smaller batch_size or sequence_length"
        )
    lora = lora_config(training, config)  # checks the target modules for every cut
    model = skeleton(config, front)
    if front.last > front.first:
        with torch.device("meta"):
            inject_adapter_in_model(lora, model)
    stage = Stage(front, model, architecture_of(config))
    adapter = {name: value.detach() for name, value in lora_parameters([stage]).items()}
    size = 4 * sum(value.numel() for value in adapter.values())
    if size > _LARGEST_FRAME:
        raise BadRequest(
            f"a device's adapter of {size / 2**20:.0f} MiB does not fit a message of {MAX_MESSAGE_BYTES / 2**20:.0f} "
            "MiB; choose a smaller rank or cut_layer, or fewer target_modules"
        )
    return Parts(device, server, adapter)
