"""The part of an adapter that is frozen: what stacking has gathered in earlier rounds, added to the base's output.

    y = W x + scale * B A x

It is kept as factors and not added to W, so that it can be replaced, restored to the bit and exported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs.wire import Expected, decode_tensor, encode_tensor
from isthmus.split.errors import BadTensor
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.factors import Factors, stacked
from isthmus.split.models.architectures import architecture_of
from isthmus.split.models.stage import Stage


@dataclass(frozen=True)
class Frozen:
    """A change of a frozen part: factors by module. replaces: whether they take the place of all that was there."""

    replaces: bool
    factors: Mapping[str, Factors]

    def to_proto(self) -> stage_pb2.Frozen:
        parts = [part.reshape(-1) for _, one in sorted(self.factors.items()) for part in (one.a, one.b)]
        values = torch.cat(parts) if parts else torch.empty(0)
        ranks = {module: factors.rank for module, factors in self.factors.items()}
        return stage_pb2.Frozen(replaces=self.replaces, ranks=ranks, values=encode_tensor(values))


class FrozenPart:
    """The frozen part of the adapters of a holder's stages; a module may have one with LoRA or without."""

    def __init__(self, stages: Sequence[Stage], config: TrainingConfig) -> None:
        self._scale = config.lora.scale
        self.factors: dict[str, Factors] = {}  # by module, on the stages' device
        self._modules: dict[str, nn.Module] = {}
        for stage in stages:
            architecture = architecture_of(stage.model.config)
            targets = set(config.lora.target_modules or architecture.default_targets)
            for name, module in stage.model.named_modules():
                if name.startswith(f"{architecture.layers}.") and name.rpartition(".")[2] in targets:
                    self._modules[stage.global_name(name)] = module
        for name, module in self._modules.items():
            module.register_forward_hook(self._hook(name))

    def take(self, frozen: Frozen) -> None:
        """Add to the frozen part, or replace it. Raises BadTensor for modules that are not here."""
        if frozen.replaces:
            self.factors.clear()
        for name, factors in frozen.factors.items():
            if name not in self._modules:
                raise BadTensor(f"a frozen adapter for {name[:100]}, which this stage does not have")
            where = next(self._modules[name].parameters()).device
            more = Factors(factors.a.to(where), factors.b.to(where))
            had = self.factors.get(name)
            self.factors[name] = more if had is None else stacked([(had, 1.0), (more, 1.0)])

    def decode(self, message: stage_pb2.Frozen) -> Frozen:
        """Raises BadTensor when it does not fit this holder's modules."""
        sizes = {}
        for name, rank in sorted(message.ranks.items()):
            if name not in self._modules:
                raise BadTensor(f"a frozen adapter for {name[:100]}, which this stage does not have")
            inner, outer = self._widths(name)
            sizes[name] = ((rank, inner), (outer, rank))
        total = sum(math.prod(shape) for shapes in sizes.values() for shape in shapes)
        values = decode_tensor(message.values, Expected("float32", (total,), total))
        if not bool(values.isfinite().all()):
            raise BadTensor("a frozen adapter with NaN or infinity")
        factors, at = {}, 0
        for name, shapes in sizes.items():
            parts = []
            for shape in shapes:
                size = math.prod(shape)
                parts.append(values[at : at + size].reshape(shape))
                at += size
            factors[name] = Factors(*parts)
        return Frozen(message.replaces, factors)

    def _widths(self, name: str) -> tuple[int, int]:
        """(in, out) of a linear module; gpt2's, a Conv1D, has its weight transposed."""
        module: Any = self._modules[name]
        base = getattr(module, "base_layer", module)
        outer, inner = base.weight.shape
        return (outer, inner) if type(base).__name__ == "Conv1D" else (inner, outer)

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            factors = self.factors.get(name)
            if factors is None or not factors.rank:
                return output
            x = given[0].to(factors.a.dtype)
            return output + self._scale * ((x @ factors.a.T) @ factors.b.T)

        return add
