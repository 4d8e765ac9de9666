"""LoRA beside a stage's linear modules in torch: the base's weights are shared, and each row gets its own adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from isthmus.split.lora.served import Lora
from isthmus.split.models.stage import Stage


class TorchAdapters:
    """Hooks on the modules that some adapter changes; those of no adapter are as they were."""

    def __init__(self, stage: Stage, adapters: Sequence[Mapping[str, Lora]]) -> None:
        """Take adapters by the modules' names in the whole model, of the stage's own blocks."""
        like = next(stage.parameters())
        self._device = like.device
        self._loras = [
            {module: Lora(lora.a.to(like), lora.b.to(like)) for module, lora in adapter.items()} for adapter in adapters
        ]
        self._groups: list[tuple[Mapping[str, Lora], Tensor | None]] = []
        changed = {module for adapter in adapters for module in adapter}
        for local, module in stage.model.named_modules():
            name = stage.global_name(local)
            if name in changed:
                module.register_forward_hook(partial(self._add, name))

    def use(self, adapters: Sequence[int]) -> None:
        """Set the adapter of each row of the next forward pass; 0: none."""
        members: dict[int, list[int]] = {}
        for row, adapter in enumerate(adapters):
            members.setdefault(adapter, []).append(row)
        self._groups = [
            (self._loras[adapter - 1], None if len(rows) == len(adapters) else torch.tensor(rows, device=self._device))
            for adapter, rows in members.items()
            if adapter
        ]

    def _add(self, name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Add an adapter's part. inputs: (rows, count, inputs). output: (rows, count, outputs)."""
        (x,) = inputs
        for loras, rows in self._groups:
            if name in loras:
                a, b = loras[name].a.T, loras[name].b.T
                if rows is None:
                    output = output + x @ a @ b
                else:
                    output[rows] += x[rows] @ a @ b
        return output
