"""What a LoRA adapter adds to a model's blocks, without peft: which modules, by what scale, and its values.

Whatever would make the answers others than peft's is refused, by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from isthmus.split.errors import BadRequest
from isthmus.split.lora.folder import AdapterSource
from isthmus.split.models.architectures import architecture_of
from isthmus.split.models.source import ADAPTER_FILES
from isthmus.split.models.stage import StageSpec, skeleton

N = TypeVar("N", int, float)

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Settings that say nothing about what is computed, or are read here. Any other that is not at its neutral value would.
_KNOWN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules"),
    *("task_type", "use_rslora"),
}
_SOUND_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights


@dataclass(frozen=True)
class Lora:
    """What one module adds to its output: (x A^T) B^T.

    a: (rank, inputs); b: (outputs, rank) with the scale in it; float32.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class _Module:
    """Rank, widths and scale of one module's adapter."""

    rank: int
    inputs: int
    outputs: int
    scale: float


class LoraAdapter:
    """An adapter, checked against the model that it is for. Only `load` reads values.

    modules: by their names in the whole model. Raises BadRequest for an adapter that cannot be served, BadModelFolder.
    """

    def __init__(self, name: str, source: AdapterSource, config: PreTrainedConfig) -> None:
        """Check an adapter. source: the whole adapter, or what a holder has of it. config: the base model's."""
        self.name, self._source = name, source
        self._layers = architecture_of(config).layers
        settings, shapes, layers = self._settings(), _linear_shapes(config), config.num_hidden_layers
        parts: dict[str, dict[str, str]] = {}
        for tensor in sorted(source.tensor_names()):
            match = _TENSOR.fullmatch(tensor)
            if match is None:
                raise self._refusal(
                    f"has {tensor!r:.200}; only lora_A and lora_B of the blocks' linear modules can be served"
                )
            parts.setdefault(match[1], {})[match[2]] = tensor
        self._tensors = parts
        self.modules = {module: self._module(module, settings, shapes, layers) for module in parts}

    def names(self, first: int, last: int) -> list[str]:
        """Names of the tensors of blocks first..last-1."""
        return [tensor for module in self._within(first, last) for tensor in self._tensors[module].values()]

    def values(self, first: int, last: int) -> int:
        """Number of values in blocks first..last-1."""
        held = [self.modules[module] for module in self._within(first, last)]
        return sum(one.rank * (one.inputs + one.outputs) for one in held)

    def load(self, first: int, last: int) -> dict[str, Lora]:
        """Read the values of blocks first..last-1, by the modules' names in the whole model."""
        return {module: self._lora(module) for module in self._within(first, last)}

    def _block(self, module: str) -> int:
        return int(module.removeprefix(f"{self._layers}.").partition(".")[0])

    def _within(self, first: int, last: int) -> list[str]:
        return [module for module in self.modules if first <= self._block(module) < last]

    def _lora(self, module: str) -> Lora:
        a, b = (self._source.read(self._tensors[module][part]) for part in "AB")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise self._refusal(f"has {a.dtype} and {b.dtype} for {module}; it needs floats")
        # In memory of their own: the source may have mapped a file.
        lora = Lora(a.to(torch.float32, copy=True), b.to(torch.float32) * self.modules[module].scale)
        if not (lora.a.isfinite().all() and lora.b.isfinite().all()):
            raise self._refusal(f"has NaN or infinity in {module}")
        return lora

    def _module(self, module: str, settings: _Settings, shapes: Mapping[str, tuple[int, int]], layers: int) -> _Module:
        block, _, inner = module.removeprefix(f"{self._layers}.").partition(".")
        inside = module.startswith(f"{self._layers}.") and block in map(str, range(layers))
        if not inside or inner not in shapes:
            raise self._refusal(
                f"changes {module!r:.200}, which is not a linear module of the base model's {layers} blocks"
            )
        if set(self._tensors[module]) != {"A", "B"}:
            raise self._refusal(f"has only one of lora_A and lora_B for {module}; export it again")
        a, b = (self._source.shape(self._tensors[module][part]) for part in "AB")
        outputs, inputs = shapes[inner]
        rank = settings.rank(module)
        if (a, b) != ((rank, inputs), (outputs, rank)):
            raise self._refusal(
                f"has A {a} and B {b} for {module}, which in this base with rank {rank} takes "
                f"{(rank, inputs)} and {(outputs, rank)}: it is of another base model, or its configuration is"
            )
        return _Module(rank, inputs, outputs, settings.scale(module))

    def _settings(self) -> _Settings:
        try:
            raw = json.loads(self._source.text(ADAPTER_FILES[0]))
        except ValueError as error:
            raise self._refusal(f"has no valid {ADAPTER_FILES[0]}: {error}") from None
        if not isinstance(raw, dict):
            raise self._refusal(f"has no valid {ADAPTER_FILES[0]}: it is not an object")
        if raw.get("peft_type") != "LORA":
            raise self._refusal(f"is of type {raw.get('peft_type')}; only LORA can be served")
        beyond = sorted(name for name in raw.keys() - _KNOWN if raw[name])
        if raw.get("bias", "none") != "none":
            beyond.insert(0, "bias")
        if beyond:
            raise self._refusal(f"has {beyond[0]} {raw[beyond[0]]!r:.60}, which cannot be served; train it without")
        if raw.get("init_lora_weights") not in _SOUND_STARTS:
            raise self._refusal(
                f"began with {raw['init_lora_weights']!r:.60}, which changes the base model's weights; convert it to a "
                "plain LoRA adapter (peft's path_initial_model_for_weight_conversion)"
            )
        try:
            return _Settings(raw)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, re.error) as error:
            raise self._refusal(f"has a {ADAPTER_FILES[0]} that cannot be read: {error!r:.100}") from None

    def _refusal(self, what: str) -> BadRequest:
        return BadRequest(f"adapter {self.name} {what}")


class _Settings:
    """Ranks and scales by module. As in peft, the first pattern that matches the end of a module's name counts."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Raises what wrong values raise."""
        self._rank, self._alpha = int(raw["r"]), float(raw["lora_alpha"])
        self._ranks = {_pattern(key): int(value) for key, value in (raw.get("rank_pattern") or {}).items()}
        self._alphas = {_pattern(key): float(value) for key, value in (raw.get("alpha_pattern") or {}).items()}
        self._root = bool(raw.get("use_rslora"))
        alphas = [self._alpha, *self._alphas.values()]
        if min([self._rank, *self._ranks.values()]) < 1 or not all(map(math.isfinite, alphas)):
            raise ValueError("a rank below 1, or a lora_alpha that is no number")

    def rank(self, module: str) -> int:
        return _first(self._ranks, module, self._rank)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return _first(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._root else rank)


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _first(values: Mapping[re.Pattern[str], N], module: str, otherwise: N) -> N:
    return next((value for pattern, value in values.items() if pattern.match(module)), otherwise)


def _linear_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear module of a block, by its name inside the block. All blocks are alike."""
    architecture = architecture_of(config)
    block = skeleton(config, StageSpec(0, 1, embeds=False, head=False)).get_submodule(f"{architecture.layers}.0")
    shapes = {}
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in architecture.linear_modules:
            shape = module.get_parameter("weight").shape
            outputs, inputs = shape if isinstance(module, nn.Linear) else shape[::-1]  # GPT-2 has it transposed
            shapes[name] = outputs, inputs
    return shapes
