"""Which LoRA values a device of a given cut and rank has, and in which order they lie in its flat adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from isthmus.split.job.shapes import Shape
from isthmus.split.lora.factors import Factors
from isthmus.split.lora.lora import A, B, factors_of, flatten, initial_adapter, named_tensors


@dataclass(frozen=True)
class AdapterLayout:
    """The layout of one job's adapters.

    blocks: the block of each module (by its name in the whole model), of all blocks that a device may hold.
    like: the adapter of those blocks with the job's rank, as empty tensors by name.
    """

    blocks: Mapping[str, int]
    like: Mapping[str, Tensor]

    def modules_below(self, cut: int) -> list[str]:
        """Modules of the blocks below a cut, in the order of their names."""
        return [module for module in sorted(self.blocks) if self.blocks[module] < cut]

    def like_of(self, shape: Shape) -> dict[str, Tensor]:
        """The adapter of a device of this shape, as empty tensors by name, in the order of its flat vector."""
        like: dict[str, Tensor] = {}
        for module in self.modules_below(shape.cut) if shape.rank else []:
            like[module + A] = self.like[module + A][: shape.rank]
            like[module + B] = self.like[module + B][:, : shape.rank]
        return dict(sorted(like.items()))

    def leading(self, factors: Mapping[str, Factors], shape: Shape) -> dict[str, Factors]:
        """The part of the factors that a device of this shape has, by module: its blocks, its leading rank."""
        modules = self.modules_below(shape.cut) if shape.rank else []
        return {module: factors[module].first(shape.rank) for module in modules}

    def drawn(self, seed: int) -> dict[str, Factors]:
        """LoRA's first values for all modules."""
        values = initial_adapter(self.like, seed)
        return {module: factors_of(values, module) for module in self.blocks}


def flat(factors: Mapping[str, Factors]) -> Tensor:
    """A device's adapter as it crosses, (values,), in the order of `AdapterLayout.like_of`."""
    return flatten(dict(sorted(named_tensors(factors).items())))
