"""The LoRA modules of a model: where they sit, and which of them share one message.

A *site* is a place in a block whose input some LoRA modules read: q, k and v share one, gate and up share another. What
a site's modules need crosses the link once for all of them. Modules are numbered through the whole model, in the order
in which a forward pass comes to them; sites likewise, from 1.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from isthmus.split.codecs.packing import pack_bits, unpack_bits
from isthmus.split.errors import BadFrame
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.lora import lora_config
from isthmus.split.models.architectures import architecture_of
from isthmus.split.models.stage import Stage, StageSpec, skeleton

_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class LoraModule:
    """A linear module that has LoRA: y = W x + scale * B (A x). name: in the whole model."""

    number: int
    name: str
    block: int
    inputs: int
    outputs: int

    def shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        """Shapes of A and B at a rank, by their names."""
        return {
            f"{self.name}.lora_A.weight": (rank, self.inputs),
            f"{self.name}.lora_B.weight": (self.outputs, rank),
        }


@dataclass(frozen=True)
class Site:
    """The modules of one block that read the same input."""

    number: int
    modules: tuple[LoraModule, ...]

    @property
    def name(self) -> str:
        """The name of its first module, which no other site has."""
        return self.modules[0].name

    @property
    def block(self) -> int:
        return self.modules[0].block

    @property
    def inputs(self) -> int:
        return self.modules[0].inputs

    def among(self, numbers: Container[int]) -> list[LoraModule]:
        """The modules of the site whose numbers are among these."""
        return [module for module in self.modules if module.number in numbers]

    def outputs(self, numbers: Container[int]) -> int:
        """Values a row that the modules with these numbers give."""
        return sum(module.outputs for module in self.among(numbers))


@dataclass(frozen=True)
class Layout:
    """All LoRA modules and their sites, as one device has them: modules in blocks below its cut are in front."""

    modules: tuple[LoraModule, ...]
    sites: tuple[Site, ...]
    cut: int
    rank: int
    scale: float  # the job's alpha / rank

    def cut_at(self, cut: int, rank: int) -> Layout:
        """The layout of a device of this shape; with rank 0 it has no modules."""
        modules, sites = (self.modules, self.sites) if rank else ((), ())
        return replace(self, modules=modules, sites=sites, cut=cut, rank=rank)

    @cached_property
    def by_name(self) -> Mapping[str, LoraModule]:
        return {module.name: module for module in self.modules}

    @cached_property
    def front(self) -> frozenset[int]:
        """Numbers of the modules in the device's own blocks."""
        return frozenset(module.number for module in self.modules if module.block < self.cut)

    @cached_property
    def remote(self) -> frozenset[int]:
        """Numbers of the modules in the server's blocks."""
        return frozenset(module.number for module in self.modules) - self.front

    def site(self, number: int) -> Site:
        """The site of this number. Raises BadFrame for one that the server's blocks do not have."""
        if not 1 <= number <= len(self.sites) or self.sites[number - 1].block < self.cut:
            raise BadFrame(f"site {number} is none of the server's blocks")
        return self.sites[number - 1]

    @cached_property
    def widest(self) -> int:
        """The most values a row that cross for one site in one direction."""
        everything = range(len(self.modules))
        return max((max(site.inputs, site.outputs(everything)) for site in self.sites), default=0)

    def shapes(self, number: int) -> dict[str, tuple[int, int]]:
        """Shapes of a module's A and B, by their names."""
        return self.modules[number].shapes(self.rank)

    def pack(self, numbers: frozenset[int]) -> bytes:
        """Write a set of modules with a bit for each, the lowest first."""
        return pack_bits(torch.tensor([module.number in numbers for module in self.modules], dtype=torch.bool))

    def unpack(self, data: bytes) -> frozenset[int]:
        """Raises BadFrame unless it is as long as `pack` makes it."""
        if len(data) != (len(self.modules) + 7) // 8:
            raise BadFrame(f"{len(data)} bytes for a set of {len(self.modules)} modules")
        flags = unpack_bits(data, (len(self.modules),))
        return frozenset(int(number) for number in flags.nonzero().flatten())

    def names(self, numbers: Iterable[int]) -> list[str]:
        return [self.modules[number].name for number in sorted(numbers)]


def layout_of(config: PreTrainedConfig, training: TrainingConfig) -> Layout:
    """The layout of a device of the job's own cut and rank. config: of the whole model.

    Raises BadRequest for target modules that the model does not have.
    """
    targets = set(lora_config(training, config).target_modules or ())
    spec = StageSpec(0, config.num_hidden_layers, embeds=False, head=False)
    model = skeleton(config, spec)
    stage = Stage(spec, model, architecture_of(config))
    layers = architecture_of(config).layers
    modules: list[LoraModule] = []
    groups: dict[tuple[str, str], list[LoraModule]] = {}  # parent, kind of input -> modules
    for name, module in model.named_modules():
        parent, _, kind = name.rpartition(".")
        if kind not in targets or not name.startswith(f"{layers}."):
            continue
        block = int(name.removeprefix(f"{layers}.").partition(".")[0])
        inputs, outputs = widths(module)
        modules.append(LoraModule(len(modules), stage.global_name(name), block, inputs, outputs))
        shared = next((group[0] for group in _SHARED_INPUTS if kind in group), kind)
        groups.setdefault((parent, shared), []).append(modules[-1])
    sites = tuple(Site(number, tuple(group)) for number, group in enumerate(groups.values(), start=1))
    return Layout(tuple(modules), sites, training.devices.cut_layer, training.lora.rank, training.lora.scale)


def adapter_of(layout: Layout) -> dict[str, Tensor]:
    """All LoRA tensors of a device, empty (meta device), by their names in the whole model and in their order."""
    shapes = {name: shape for module in layout.modules for name, shape in module.shapes(layout.rank).items()}
    return {name: torch.empty(shape, device="meta") for name, shape in sorted(shapes.items())}


def widths(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear module; GPT-2's stores its weight the other way round."""
    weight = linear.get_parameter("weight")
    if isinstance(linear, nn.Linear):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight.shape[1]
