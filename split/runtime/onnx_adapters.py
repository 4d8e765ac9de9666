"""Adapters as inputs of a graph: two stacks for a linear operator, of which each row of a call takes its own layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from isthmus.split.lora.served import Lora
from isthmus.split.runtime.onnx_shape import StageShape, together


def adapter_stacks(shape: StageShape, adapters: Sequence[Mapping[str, Lora]]) -> dict[str, Tensor]:
    """Stack adapters, by the name of the graph's input: A (1 + adapters, inputs, rank) and B (1 + adapters, rank,
    outputs).

    Layer 0 is the base model's, of zeros. The modules of one operator have their ranks after one another: x A is
    computed for all of them at once, and B has a block for each. An adapter of smaller rank is filled up with zeros.
    """
    stacks: dict[str, Tensor] = {}
    for modules in sorted({together(module) for module in shape.adapted}):
        sizes = [shape.tensors[f"{module}.weight"] for module in modules]
        parts = [[adapter.get(module) for module in modules] for adapter in adapters]
        rank = max(sum(len(part.a) for part in one if part) for one in parts)
        a = torch.zeros(1 + len(adapters), sizes[0][1], rank)
        b = torch.zeros(1 + len(adapters), rank, sum(outputs for outputs, _ in sizes))
        for layer, one in enumerate(parts, start=1):
            at = column = 0
            for part, (outputs, _) in zip(one, sizes, strict=True):
                if part is not None:
                    end = at + len(part.a)
                    a[layer, :, at:end] = part.a.T
                    b[layer, at:end, column : column + outputs] = part.b.T
                    at = end
                column += outputs
        stacks[f"{modules[0]}.lora_a"], stacks[f"{modules[0]}.lora_b"] = a, b
    return stacks


def without_adapters(stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacks of rank 0 for calls in which no row has an adapter: they add nothing, at hardly any cost."""
    empty = {}
    for name, stack in stacks.items():
        _, rows, columns = stack.shape
        empty[name] = torch.empty((1, rows, 0) if name.endswith("a") else (1, 0, columns))
    return empty
