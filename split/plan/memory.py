"""How much memory a part of a model takes: the one estimate, for those who choose, who refuse and who show.

Everything is in bytes and follows from the model's configuration. What is trained is in float32; what is served is in
the format that was asked for. All blocks of a model are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig

from isthmus.split.lora.served import LoraAdapter
from isthmus.split.models.stage import StageSpec
from isthmus.split.plan.costs import Costs, values_of
from isthmus.split.runtime.speed import BYTES

LIBRARIES = 400 * 2**20  # of a process that has imported what a device imports and has no model (`isthmus demo`)
_FLOAT = 4  # weights, adapters and what is kept for backward are float32
_LORA_COPIES = {"adamw": 4, "sgd": 2}  # the values, their gradients, AdamW's two moments
_WIDE, _NARROW = 8, 4  # what a block keeps for backward, a token: so many hidden vectors and so many of its MLP's width
_LOGITS = 3  # the logits, their logarithms of probabilities, their gradient


def training_bytes(costs: Costs, cut: int, rank: int) -> float:
    """Of a device of a training job: libraries, weights, LoRA with its optimiser, what a step keeps for backward."""
    training = costs.training
    weights = cut * costs.block_values + costs.end_values
    adapter = _LORA_COPIES[training.optimizer.name] * costs.adapter_values(cut, rank)
    kept = cut * (_WIDE * costs.hidden + _NARROW * costs.mlp_width) if rank else 0
    if training.devices_train_all and rank:  # what the server's modules have been given, and have answered
        kept += (costs.layers - cut) * costs.site_values
    kept += 4 * costs.hidden  # what crosses, each way, and the head's own
    if training.devices.labels == "device":
        kept += _LOGITS * int(costs.config.vocab_size)
    return LIBRARIES + _FLOAT * (weights + adapter + costs.tokens * kept)


@dataclass(frozen=True)
class ServedMemory:
    """Of a model that is served. weights: their format. sequences, tokens: that a holder has room for, of each."""

    config: PretrainedConfig
    weights: str
    sequences: int
    tokens: int

    def held_bytes(self, first: int, last: int, adapters: Sequence[LoraAdapter] = ()) -> int:
        """Of a holder of blocks first to last-1: their weights, keys and values, and adapters."""
        blocks = last - first
        return self.weight_bytes(blocks) + self.cache_bytes(blocks) + adapter_bytes(adapters, first, last)

    def weight_bytes(self, blocks: int) -> int:
        return int(BYTES[self.weights] * blocks * self._block_values)

    def cache_bytes(self, blocks: int) -> int:
        """Of keys and values, in float32."""
        config = self.config
        heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * _FLOAT * blocks * self.sequences * self.tokens * heads * head_size

    @property
    def ends_bytes(self) -> float:
        """Of the embedding and the head, which are at the gateway."""
        return self.end_values * (BYTES["float32"] + BYTES[self.head_weights])

    @property
    def end_values(self) -> int:
        """Of the embedding; the head has as many."""
        return int(self.config.vocab_size) * int(self.config.hidden_size)

    @property
    def head_weights(self) -> str:
        """The head's format, as `make_head` has it."""
        return "int8" if self.weights == "int4" else self.weights

    @cached_property
    def _block_values(self) -> int:
        return values_of(self.config, StageSpec(0, 1, embeds=False, head=False))


def adapter_bytes(adapters: Sequence[LoraAdapter], first: int, last: int) -> int:
    """Of A and B for these blocks; as a graph has them, filled up to the largest, with one of zeros for the base."""
    largest = max((adapter.values(first, last) for adapter in adapters), default=0)
    return _FLOAT * (1 + len(adapters)) * largest
