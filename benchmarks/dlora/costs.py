"""What a DLoRA job costs its device, counted: values on the link, and FLOPs by what they are for.

Gao and Zhang 2024 (arXiv 2404.05182). The device has the embedding, the first blocks, the norm and the head, the text
and all LoRA modules; the frozen blocks in the cloud ask it for the output of each module that takes part.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from isthmus.split.dlora.module_costs import ModuleCost, exchange, module_flops
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import MERGE
from isthmus.split.models.architectures import architecture_of
from isthmus.split.models.stage import StageSpec, skeleton


@dataclass
class Spent:
    """Of a device, so far. Values cross the link, both ways together; flops: by what they are for."""

    u_shape_values: float = 0.0
    module_values: float = 0.0
    given_values: float = 0.0  # A and B of killed modules that the cloud adds to its weights
    module_flops: float = 0.0
    front_flops: float = 0.0
    head_flops: float = 0.0

    @property
    def values(self) -> float:
        return self.u_shape_values + self.module_values + self.given_values

    @property
    def flops(self) -> float:
        return self.module_flops + self.front_flops + self.head_flops


class Costs:
    """Prices of a job's steps."""

    def __init__(self, config: PreTrainedConfig, training: TrainingConfig, modules: Mapping[str, ModuleCost]) -> None:
        self.modules = modules
        self.hidden = int(config.hidden_size)
        self.tokens = training.batch_size * training.text.sequence_length
        self.head = 2 * self.hidden * int(config.vocab_size)
        front = skeleton(config, StageSpec(0, training.devices.cut_layer, embeds=True, head=False))
        layers = architecture_of(config).layers
        weights = sum(
            value.numel() for name, value in front.named_parameters() if name.startswith(layers) and value.dim() == 2
        )
        attention = (
            4 * training.text.sequence_length * self.hidden * training.devices.cut_layer
        )  # scores, and their sum of values
        self.front_weights, self.front_attention = 2 * weights, attention

    def add(self, spent: Spent, active: Collection[str], killed: Collection[str], mode: str = MERGE) -> None:
        """A step with these modules active; killed: those that died in it, and had been trained."""
        front_trains = any(not self.modules[name].remote for name in active)
        spent.u_shape_values += (4 if front_trains else 3 if active else 2) * self.hidden * self.tokens
        spent.module_values += exchange(self.modules, active, mode).total * self.tokens
        if mode == MERGE:
            spent.given_values += sum(self.modules[name].parameters for name in killed if self.modules[name].remote)
        spent.module_flops += module_flops(self.modules, active, mode) * self.tokens
        weights, attention = self.front_weights, self.front_attention
        spent.front_flops += (weights + attention + (weights + 2 * attention if front_trains else 0)) * self.tokens
        spent.head_flops += (2 if active else 1) * self.head * self.tokens
