"""Which causal language models can be split, and what their parts are called.

A model is split only when its class is known here and nothing in its configuration depends on a
layer's place in a way that a cut would shift. Everything else is refused, never split wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from isthmus.split.errors import BadModelFolder, UnsupportedModel


@dataclass(frozen=True)
class Architecture:
    """The names of one architecture's parts, as dotted module names inside its causal LM class.

    Checkpoints use the same names, but one of the bare base model leaves `base` and its dot out, and see stored_head.
    """

    model_type: str
    model_class: str  # in transformers
    base: str  # the base model inside the causal LM: "model", "transformer", "gpt_neox"
    layers: str
    embedding: str
    norm: str
    default_targets: tuple[str, ...]  # linear modules of a block that get LoRA unless the user chooses others
    linear_modules: tuple[str, ...]  # all linear modules of a block, by the last part of their name
    positions: str | None = None  # learned position embedding, which only the first stage may add
    rotary: str | None = None
    layer_types: bool = False  # whether the class reads config.layer_types
    head: str = "lm_head"
    stored_head: str = "lm_head"  # the head's name in checkpoints

    @property
    def embedding_tensor(self) -> str:
        return f"{self.embedding}.weight"

    @property
    def head_tensor(self) -> str:
        return f"{self.head}.weight"

    def load_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], getattr(transformers, self.model_class))

    def load_config_class(self) -> type[PreTrainedConfig]:
        return cast(type[PreTrainedConfig], self.load_class().config_class)


def _llama_like(model_type: str, model_class: str, *, layer_types: bool = False) -> Architecture:
    return Architecture(
        model_type=model_type,
        model_class=model_class,
        base="model",
        layers="model.layers",
        embedding="model.embed_tokens",
        norm="model.norm",
        rotary="model.rotary_emb",
        layer_types=layer_types,
        default_targets=("q_proj", "v_proj"),
        linear_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        _llama_like("llama", "LlamaForCausalLM"),
        _llama_like("mistral", "MistralForCausalLM"),
        _llama_like("qwen2", "Qwen2ForCausalLM", layer_types=True),
        _llama_like("qwen3", "Qwen3ForCausalLM", layer_types=True),
        Architecture(
            model_type="phi3",
            model_class="Phi3ForCausalLM",
            base="model",
            layers="model.layers",
            embedding="model.embed_tokens",
            norm="model.norm",
            rotary="model.rotary_emb",
            default_targets=("qkv_proj",),
            linear_modules=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        ),
        Architecture(
            model_type="gpt2",
            model_class="GPT2LMHeadModel",
            base="transformer",
            layers="transformer.h",
            embedding="transformer.wte",
            positions="transformer.wpe",
            norm="transformer.ln_f",
            default_targets=("c_attn",),
            linear_modules=("c_attn", "c_proj", "c_fc"),
        ),
        Architecture(
            model_type="gpt_neox",
            model_class="GPTNeoXForCausalLM",
            base="gpt_neox",
            layers="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
            norm="gpt_neox.final_layer_norm",
            stored_head="embed_out",
            rotary="gpt_neox.rotary_emb",
            default_targets=("query_key_value",),
            linear_modules=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ),
    )
}

_KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

# Settings that do something else in another place of the model, or need code or kernels that a stage does not have.
_REFUSED_SETTINGS: Mapping[str, str] = {
    "quantization_config": "quantised checkpoints cannot be split; use the float checkpoint",
    "scale_attn_by_inverse_layer_idx": "attention scaled by the layer's index would change under a cut",
    "add_cross_attention": "models with cross-attention cannot be split",
    "per_layer_config": "a configuration of its own for each layer cannot be split",
    "kv_sharing_modes": "layers that share keys and values cannot be split",
}


def supported() -> str:
    """The supported architectures, for messages."""
    return ", ".join(sorted(ARCHITECTURES))


def parse_config(text: str, origin: str) -> PreTrainedConfig:
    """The configuration in a config.json, checked to be one that can be split.

    origin: where the text came from, for messages. No code that the file may name is ever imported.
    Raises BadModelFolder (not a usable config.json) or UnsupportedModel.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise BadModelFolder(f"{origin} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BadModelFolder(f"{origin} is not a model configuration: expected a JSON object")
    architecture = _find(raw.get("model_type"), raw)
    try:
        config = architecture.load_config_class().from_dict(raw)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise BadModelFolder(f"{origin} is not a valid {architecture.model_type} configuration: {reason}") from None
    architecture_of(config)
    return config


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The table's entry for a configuration; raises UnsupportedModel if a cut could not be right for it."""
    if config.is_heterogeneous:
        raise _refusal("per_layer_config")
    raw: dict[str, Any] = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    architecture = _find(config.model_type, raw)
    _check_layer_types(architecture, config)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        # Its frequencies follow the longest sequence that a module has seen, and stages do not all see the same ones.
        raise UnsupportedModel("this model cannot be split: rope_type dynamic depends on what each stage has seen")
    return architecture


def rotary_boundary(config: PreTrainedConfig) -> int | None:
    """The tokens of a text beyond which, with longrope, all its keys are rotated by other frequencies; None without."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None


def _find(model_type: object, raw: Mapping[str, Any]) -> Architecture:
    for setting in _REFUSED_SETTINGS:
        if raw.get(setting):
            raise _refusal(setting)
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise UnsupportedModel(f"models of type {model_type!r} are not supported; supported: {supported()}")
    named = raw.get("architectures") or [architecture.model_class]
    known = {architecture.model_class, *_base_classes(architecture)}
    if not isinstance(named, list) or not known.intersection(map(str, named)):
        raise UnsupportedModel(f"this is a {named}, not a {architecture.model_class}; supported: {supported()}")
    return architecture


def _base_classes(architecture: Architecture) -> tuple[str, ...]:
    name = architecture.model_class.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return (f"{name}Model",)


def _refusal(setting: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"this model cannot be split: its configuration has {setting}: {_REFUSED_SETTINGS[setting]}"
    )


def _check_layer_types(architecture: Architecture, config: PreTrainedConfig) -> None:
    types = getattr(config, "layer_types", None)
    if types is None:
        return
    if len(types) != config.num_hidden_layers:
        raise UnsupportedModel(
            f"layer_types has {len(types)} entries for {config.num_hidden_layers} layers; correct config.json"
        )
    allowed = _KNOWN_LAYER_TYPES if architecture.layer_types else frozenset({"full_attention"})
    if unknown := sorted(set(types) - allowed):
        raise UnsupportedModel(
            f"this model cannot be split: {architecture.model_type} with layer_types {', '.join(unknown)}; "
            f"supported: {', '.join(sorted(allowed))}"
        )
