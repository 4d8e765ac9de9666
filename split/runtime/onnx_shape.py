"""What a graph of a stage's blocks is made from: sizes, windows and rotary tables, as the library's own code has them.

Whatever the graph's operators cannot compute exactly is refused, so that the caller can take torch instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from isthmus.split.errors import BadRequest, UnsupportedModel
from isthmus.split.models.architectures import Architecture, architecture_of, rotary_boundary
from isthmus.split.models.stage import StageSpec, skeleton

_QKV = ("q_proj", "k_proj", "v_proj")
SUPPORTED = ("llama", "mistral", "phi3", "qwen2", "qwen3")


@dataclass(frozen=True)
class StageShape:
    """The blocks first..last-1 of a model, all alike but for their windows.

    windows: for each block, how many tokens a token sees, itself included (None: all before it).
    tensors: the shapes of the blocks' tensors, by their names in the checkpoint.
    adapted: the linear modules beside which adapters are computed.
    """

    first: int
    last: int
    layers: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    epsilon: float
    windows: tuple[int | None, ...]
    tensors: Mapping[str, tuple[int, ...]]
    adapted: frozenset[str] = frozenset()


def shape_of(config: PreTrainedConfig, first: int, last: int) -> StageShape:
    """Raises BadRequest for blocks that are not in the model, UnsupportedModel for what a graph cannot compute."""
    architecture = check_supported(config)
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(f"no ONNX graph with hidden_act {config.hidden_act}; there is one with silu")
    if first >= last:
        raise BadRequest(f"blocks {first} to {last - 1} are not a stage")
    spec = StageSpec(first, last, embeds=False, head=False)
    model = skeleton(config, spec)
    block: Any = model.get_submodule(f"{architecture.layers}.0")
    window = getattr(config, "sliding_window", None)
    if architecture.layer_types:
        windows = [window if kind == "sliding_attention" else None for kind in config.layer_types[first:last]]
    else:
        windows = [window] * (last - first)
    shapes = [tuple(tensor.shape) for tensor in model.state_dict().values()]
    shape = StageShape(
        first=first,
        last=last,
        layers=architecture.layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=block.self_attn.head_dim,
        scale=block.self_attn.scaling,
        epsilon=block.input_layernorm.variance_epsilon,
        windows=tuple(windows),
        tensors=dict(zip(spec.tensor_names(config), shapes, strict=True)),
    )
    width = RotaryTables(config, 1).width
    if shape.head_size % 16 or width % 8:
        raise UnsupportedModel(
            f"no ONNX graph for heads of {shape.head_size} with {2 * width} rotary dimensions: both have to be "
            "multiples of 16"
        )
    return shape


def check_supported(config: PreTrainedConfig) -> Architecture:
    """The architecture of a configuration; raises UnsupportedModel if there are no graphs for it."""
    if config.model_type not in SUPPORTED:
        raise UnsupportedModel(f"no ONNX graph for {config.model_type}; there is one for {', '.join(SUPPORTED)}")
    return architecture_of(config)


def together(module: str) -> tuple[str, ...]:
    """The linear modules that a graph computes as one, of which this is one."""
    place, _, name = module.rpartition(".")
    return tuple(f"{place}.{part}" for part in _QKV) if name in _QKV else (module,)


class RotaryTables:
    """Cosines and sines by position, (positions, rotary dimensions / 2) float32, from the library's own module.

    There is more than one table only for longrope, where the length of the text chooses the frequencies.
    """

    def __init__(self, config: PreTrainedConfig, tokens: int) -> None:
        """Compute the tables for texts of up to so many tokens."""
        boundary = rotary_boundary(config)
        limits = [tokens] if boundary is None or tokens <= boundary else [boundary, tokens]
        self._tables = [(limit, *_rotary_table(config, limit)) for limit in limits]
        self.width: int = self._tables[0][1].shape[1]

    def number(self, length: int, long: bool) -> int:
        """Which table a text has with so many tokens so far. long: as in Row."""
        return (
            len(self._tables) - 1
            if long
            else next(i for i, (limit, _, _) in enumerate(self._tables) if length <= limit)
        )

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """(cosines, sines)."""
        _, cosines, sines = self._tables[number]
        return cosines, sines


@torch.inference_mode()
def _rotary_table(config: PreTrainedConfig, positions: int) -> tuple[Tensor, Tensor]:
    architecture = architecture_of(config)
    assert architecture.rotary is not None
    skeleton_rotary = skeleton(config, StageSpec(0, 0, embeds=False, head=False)).get_submodule(architecture.rotary)
    rotary = type(skeleton_rotary)(config=config)
    cosines, sines = rotary(torch.zeros(1), torch.arange(positions)[None])
    width = cosines.shape[-1] // 2  # both halves of a head are turned by the same angles
    return cosines[0, :, :width].contiguous(), sines[0, :, :width].contiguous()
