"""Codecs on what a DLoRA job sends, put into unsplit training: each tensor that would cross is coded and decoded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from isthmus.split.codecs import CodecState, parse
from isthmus.split.dlora.module_costs import ModuleCost


class Wire:
    """One tensor of the forward pass, and its gradient coming back, each with its codec and state at both ends."""

    def __init__(self, hidden: str, gradients: str, seed: int) -> None:
        self.codecs = parse(hidden), parse(gradients)
        self.ends = [(CodecState(seed), CodecState(seed)) for _ in self.codecs]
        self.bytes = [0, 0]
        self.counts = True

    def cross(self, x: Tensor, way: int) -> Tensor:
        """way: 0 for what goes forward, 1 for a gradient."""
        codec, (sender, receiver) = self.codecs[way], self.ends[way]
        payload = codec.encode(x, sender)
        self.bytes[way] += len(payload) if self.counts else 0
        return codec.decode(payload, x.shape, receiver).to(x)


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return wire.cross(x, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.wire.cross(gradients[0], 1), None


def crossing(x: Tensor, wire: Wire) -> Tensor:
    """What the other side has of x; gradients through it are what this side has of them."""
    result: Tensor = _Cross.apply(x, wire)
    return result


class Wires:
    """All that crosses: at the two cuts of the U-shape, and before and after the LoRA branch of each remote module.

    Modules that read the same input share its message: only the first active one of a site is counted.
    """

    def __init__(
        self,
        layers: Mapping[str, LoraLayer],
        blocks: nn.ModuleList,
        costs: Mapping[str, ModuleCost],
        cut_layer: int,
        codecs: tuple[str, str],
        seed: int,
    ) -> None:
        self.costs = costs
        self.u_shape = [Wire(*codecs, seed) for _ in range(2)]
        self.inputs: dict[str, Wire] = {}
        self.outputs: dict[str, Wire] = {}
        for block, wire in zip((cut_layer - 1, len(blocks) - 1), self.u_shape, strict=True):
            if block >= 0:
                blocks[block].register_forward_hook(_after(wire))
        for name, layer in layers.items():
            if costs[name].remote:
                self.inputs[name], self.outputs[name] = Wire(*codecs, seed), Wire(*codecs, seed)
                branch: Any = layer
                branch.lora_A["default"].register_forward_pre_hook(_before(self.inputs[name]))
                branch.lora_B["default"].register_forward_hook(_after(self.outputs[name]))

    def set_active(self, active: Collection[str]) -> None:
        seen: set[str] = set()
        for name, wire in self.inputs.items():
            if name in active:
                wire.counts = self.costs[name].site not in seen
                seen.add(self.costs[name].site)

    @property
    def bytes(self) -> int:
        """So far, both ways. The codecs' payloads, without the messages around them."""
        wires = [*self.u_shape, *self.inputs.values(), *self.outputs.values()]
        return sum(sum(wire.bytes) for wire in wires)


def _before(wire: Wire) -> Any:
    return lambda module, given: (crossing(given[0], wire), *given[1:]) if torch.is_grad_enabled() else None


def _after(wire: Wire) -> Any:
    """Evaluation is of the exported adapter, with nothing coded."""

    def hook(module: nn.Module, given: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        if isinstance(output, tuple):
            return (crossing(output[0], wire), *output[1:])
        return crossing(output, wire)

    return hook
