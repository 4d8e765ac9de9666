"""Costs of a job's parts from the model's configuration: operations and numbers of values, by cut and rank.

Operations are counted as the ledger counts them: matrix products and attention. Forward through frozen weights and
backward to the hidden states take the same number; LoRA's own weights take their gradient besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig

from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.sites import Site, layout_of
from isthmus.split.models.stage import StageSpec, skeleton
from isthmus.split.plan.parts import adapter_of


@dataclass(frozen=True)
class Costs:
    """Operations, values and bytes of one job on one model."""

    config: PretrainedConfig
    training: TrainingConfig

    @property
    def tokens(self) -> int:
        """Tokens of one device's step."""
        return self.training.batch_size * self.training.text.sequence_length

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @cached_property
    def block_values(self) -> int:
        """Number of weights of one block."""
        return values_of(self.config, StageSpec(0, 1, embeds=False, head=False))

    @cached_property
    def end_values(self) -> int:
        """Number of a device's weights beside its blocks: the embedding, and the head where the labels are with it."""
        embedding = values_of(self.config, StageSpec(0, 0, embeds=True, head=False))
        if self.training.devices.labels == "server" or self.config.tie_word_embeddings:
            return embedding
        layers = self.layers
        return embedding + values_of(self.config, StageSpec(layers, layers, embeds=False, head=True))

    @cached_property
    def lora_values(self) -> int:
        """Number of LoRA values of one block, at rank 1."""
        shapes = adapter_of(self.config, self.training, StageSpec(0, 1, embeds=True, head=False), 1)
        return sum(value.numel() for value in shapes.values())

    @cached_property
    def site_values(self) -> int:
        """Values a token that the LoRA modules of one block exchange each way (DLoRA).

        These are the widths of what the modules read, each once for those that share it, and of what they give.
        """
        return sum(site.inputs + sum(module.outputs for module in site.modules) for site in self._sites)

    @property
    def sites(self) -> int:
        """Number of sites of one block."""
        return len(self._sites)

    @cached_property
    def _sites(self) -> list[Site]:
        return [site for site in layout_of(self.config, self.training).sites if site.block == 0]

    def forward(self, blocks: int, rank: int, tokens: int) -> float:
        """Operations of a forward pass through so many blocks, for so many tokens."""
        attention = 4 * self.training.text.sequence_length * self.hidden
        return tokens * blocks * (2 * self.block_values + attention + 2 * rank * self.lora_values)

    def backward(self, blocks: int, rank: int, tokens: int) -> float:
        """Operations of a backward pass through so many blocks, for so many tokens."""
        attention = 10 * self.training.text.sequence_length * self.hidden
        return tokens * blocks * (2 * self.block_values + attention + 4 * rank * self.lora_values)

    @property
    def tail(self) -> float:
        """Operations of the head on a device, forward and backward; 0 with labels at the server."""
        return 0.0 if self.training.devices.labels == "server" else self._head

    @property
    def head_at_server(self) -> float:
        """Operations of the head at the server for one device's rows; 0 with labels on the device."""
        return self._head if self.training.devices.labels == "server" else 0.0

    @property
    def _head(self) -> float:
        return 4.0 * self.tokens * int(self.config.vocab_size) * self.hidden

    def device_work(self, cut: int, rank: int) -> float:
        """Operations of a device's step."""
        backward = self.backward(cut, rank, self.tokens) if rank and cut else 0.0
        return self.forward(cut, rank, self.tokens) + backward + self.tail

    def server_work(self, cuts: Iterable[int]) -> float:
        """Operations of a step at the server, for the rows of devices with these cuts."""
        rank = self.training.lora.rank
        return sum(
            self.forward(self.layers - cut, rank, self.tokens)
            + self.backward(self.layers - cut, rank, self.tokens)
            + self.head_at_server
            for cut in cuts
        )

    def adapter_values(self, cut: int, rank: int) -> int:
        """Number of LoRA values of a device with this cut and rank."""
        return (self.layers if self.training.devices_train_all else cut) * rank * self.lora_values

    @property
    def mlp_width(self) -> int:
        width = getattr(self.config, "intermediate_size", None) or getattr(self.config, "n_inner", None)
        return int(width or 4 * self.hidden)


def values_of(config: PretrainedConfig, spec: StageSpec) -> int:
    """How many weights a part of the model has."""
    return sum(tensor.numel() for tensor in skeleton(config, spec).state_dict().values())
