"""A stage: some consecutive blocks of a causal LM, with the embedding before them or the head after them or neither.

The architecture's own class is built from a configuration whose layers are cut, on the meta device, so that
mask, position and cache code stay the library's; only the stage's own tensors are ever read or allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from isthmus.split.errors import BadModelFolder, BadRequest, UnsupportedModel
from isthmus.split.models.architectures import Architecture, architecture_of
from isthmus.split.models.source import TensorSource

_DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout")


@dataclass(frozen=True)
class StageSpec:
    """Blocks first..last-1 (none where first == last), with or without the embedding, the final norm and the head."""

    first: int
    last: int
    embeds: bool
    head: bool

    def tensor_names(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """The stage's tensors by their names in the whole model's checkpoint, each once.

        A tied head has the embedding's tensor. config: the whole model's. Raises BadRequest if the stage is not in it.
        """
        empty = skeleton(config, self)
        return tuple(dict.fromkeys(_checkpoint_names(config, self, empty).values()))


def cut_in_two(config: PreTrainedConfig, cut_layer: int) -> tuple[StageSpec, StageSpec]:
    """Cut a model into two stages, (device, server).

    The device has the embedding and cut_layer blocks (0: only the embedding), the server the rest and the head. Raises
    BadRequest for a cut that is not inside the model.
    """
    layers = _check_cut(config, cut_layer)
    return StageSpec(0, cut_layer, embeds=True, head=False), StageSpec(cut_layer, layers, embeds=False, head=True)


def cut_u_shaped(config: PreTrainedConfig, cut_layer: int) -> tuple[StageSpec, StageSpec, StageSpec]:
    """Cut a model into three stages, (front, middle, tail): front and tail are the device's, so text and labels stay
    there.

    front: the embedding and cut_layer blocks (0: only the embedding). middle: the server's blocks. tail: the final norm
    and the head. Raises BadRequest for a cut that is not inside the model.
    """
    layers = _check_cut(config, cut_layer)
    return (
        StageSpec(0, cut_layer, embeds=True, head=False),
        StageSpec(cut_layer, layers, embeds=False, head=False),
        StageSpec(layers, layers, embeds=False, head=True),
    )


class Stage(nn.Module):
    """A stage that computes. Its parameters are frozen, and dropout is off, in training mode too.

    There is no attention mask: a batch is at most padded on the right, where causal attention makes the
    padding invisible to every real token. Gradients flow through hidden states, not into the base weights.
    """

    def __init__(self, spec: StageSpec, model: PreTrainedModel, architecture: Architecture) -> None:
        super().__init__()
        self.spec = spec
        self.model = model
        self.by_layer_type = architecture.layer_types  # whether the model takes a mask for each type of layer
        self._layers = architecture.layers
        self.eval()

    def forward(self, x: Tensor, *, cache: DynamicCache | None = None) -> Tensor:
        """Compute the stage.

        x: token ids (batch, sequence) int64 where the stage embeds, else hidden states (batch, sequence, hidden).
        cache: this stage's own, from new_cache(); it holds what came before x and is extended by it. Returns hidden
        states (batch, sequence, hidden), or logits (batch, sequence, vocabulary) where the stage has the head.
        """
        given = {"input_ids": x} if self.spec.embeds else {"inputs_embeds": x}
        output: Tensor = self.model(**given, past_key_values=cache, use_cache=cache is not None).logits
        if cache is not None and self.spec.first == self.spec.last:
            # No block counts the tokens here, and learned positions need the count: one number a token stands for them.
            count = output.new_zeros(output.shape[0], 1, output.shape[1], 1)
            cache.update(count, count, 0)
        return output

    def new_cache(self) -> DynamicCache:
        """Make an empty cache of keys and values for one batch; sliding-window blocks keep only their window."""
        return DynamicCache(config=self.model.config) if self.spec.first < self.spec.last else DynamicCache()

    def global_name(self, local_module_name: str) -> str:
        """Translate a dotted name inside `model`, of a module or a parameter, to its name in the whole causal LM."""
        return _shift(local_module_name, self._layers, self.spec.first)


def build_stages(
    source: TensorSource,
    specs: Sequence[StageSpec],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Stage]:
    """Build the stages of one holder, with weights on device in dtype (float16 and bfloat16 checkpoints are cast).

    A tensor that two of the stages need, such as a tied embedding, is read and held once. Raises BadRequest (a stage
    outside the model), UnsupportedModel, BadModelFolder (a tensor missing or misshapen).
    """
    config = source.config
    architecture = architecture_of(config)
    held: dict[str, nn.Parameter] = {}
    stages = []
    for spec in specs:
        model = skeleton(config, spec)
        for local, name in _checkpoint_names(config, spec, model).items():
            if name not in held:
                held[name] = _load(source, name, tuple(model.get_parameter(local).shape), device, dtype)
            owner, _, attribute = local.rpartition(".")
            setattr(model.get_submodule(owner), attribute, held[name])
        if architecture.rotary is not None:
            _compute_rotary(model, architecture.rotary, device)
        model.config.dtype = dtype
        stages.append(Stage(spec, model, architecture))
    return stages


def _load(
    source: TensorSource, name: str, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype
) -> nn.Parameter:
    tensor = source.read(name)
    if tuple(tensor.shape) != shape:
        raise BadModelFolder(f"{name} has shape {tuple(tensor.shape)}, its configuration says {shape}")
    if not tensor.is_floating_point():
        raise UnsupportedModel(f"{name} has data type {tensor.dtype}; only float checkpoints can be split")
    return nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)


def skeleton(config: PreTrainedConfig, spec: StageSpec) -> PreTrainedModel:
    """Build the stage's modules without values (meta device). Its state_dict names exactly the stage's tensors."""
    architecture = architecture_of(config)
    layers = config.num_hidden_layers
    inside = 0 <= spec.first <= spec.last <= layers
    if not inside or (spec.embeds and spec.first != 0) or (spec.head and spec.last != layers):
        raise BadRequest(f"{spec} is not a stage of {config.model_type} with {layers} layers")

    cut = copy.deepcopy(config)
    cut.num_hidden_layers = spec.last - spec.first
    if getattr(config, "layer_types", None) is not None:
        cut.layer_types = config.layer_types[spec.first : spec.last]
    cut.tie_word_embeddings = False  # shared tensors are the loader's work: embedding and head may be in two stages
    cut.pad_token_id = None  # else the library looks for padding in every batch, to warn of it
    cut._attn_implementation = "sdpa"
    for setting in _DROPOUTS:
        if hasattr(cut, setting):
            setattr(cut, setting, 0.0)
    with torch.device("meta"):
        model = architecture.load_class()(cut)
    if not spec.embeds:
        model.set_submodule(architecture.embedding, nn.Identity())
        if architecture.positions is not None:
            model.set_submodule(architecture.positions, _NoPositions())
    if not spec.head:
        model.set_submodule(architecture.norm, nn.Identity())
        model.set_submodule(architecture.head, nn.Identity())
    return model


class _NoPositions(nn.Module):
    """A learned position embedding that adds zero, in a stage before which the first stage has added the positions."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return position_ids.new_zeros(())


def _compute_rotary(model: PreTrainedModel, name: str, device: torch.device | str) -> None:
    """Compute the rotary frequencies, which are not stored, again: off the meta device, always in float32."""
    rotary = model.get_submodule(name)
    model.set_submodule(name, type(rotary)(config=model.config).to(device))


def _checkpoint_names(config: PreTrainedConfig, spec: StageSpec, model: PreTrainedModel) -> dict[str, str]:
    """The name of each tensor of the stage in the whole model's checkpoint, by its name inside the stage's model."""
    architecture = architecture_of(config)
    names = {local: _shift(local, architecture.layers, spec.first) for local in model.state_dict()}
    if config.tie_word_embeddings and architecture.head_tensor in names:
        names[architecture.head_tensor] = architecture.embedding_tensor
    return names


def _shift(name: str, layers: str, by: int) -> str:
    """Raise the index that follows `layers` in a dotted name."""
    if not name.startswith(f"{layers}."):
        return name
    index, dot, rest = name.removeprefix(f"{layers}.").partition(".")
    return f"{layers}.{int(index) + by}{dot}{rest}"


def _check_cut(config: PreTrainedConfig, cut_layer: int) -> int:
    """Return the number of layers. Raises BadRequest if the cut leaves one side without its part."""
    layers: int = config.num_hidden_layers
    if cut_layer < 0:
        raise BadRequest(
            f"cut_layer {cut_layer} is not a place in the model: {config.model_type} has {layers} layers; "
            f"choose 1 to {layers - 1}"
        )
    if cut_layer >= layers:
        raise BadRequest(
            f"cut_layer {cut_layer} leaves the server no layers: {config.model_type} has {layers}; "
            f"choose 1 to {layers - 1}"
        )
    return layers
