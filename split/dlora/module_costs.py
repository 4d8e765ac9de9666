"""Costs of LoRA modules at a device, with the backbone in the cloud: values on the link, and the device's FLOPs.

Gao and Zhang 2024 (arXiv 2404.05182): for each module that takes part the cloud sends its input and the device answers
its output, and the gradients go the other way. Modules that read the same input (a site) share what is of the input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from isthmus.split.errors import BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import KEEP, MERGE
from isthmus.split.lora.sites import Layout, layout_of


@dataclass(frozen=True)
class ModuleCost:
    """What one LoRA module costs.

    site: modules of one site read the same input. order: of sites, as the forward pass meets them. d_in, d_out: widths.
    remote: whether its block is in the cloud; the device's own blocks exchange nothing.
    """

    site: str
    order: int
    d_in: int
    d_out: int
    rank: int
    remote: bool = True

    @property
    def parameters(self) -> int:
        """Number of values of A and B together."""
        return self.rank * (self.d_in + self.d_out)

    @property
    def values(self) -> int:
        """Values that a token exchanges, forward and backward, while the module is alone at its site."""
        return 2 * (self.d_in + self.d_out) if self.remote else 0

    @property
    def flops(self) -> int:
        """FLOPs of a token at the device: the branch, its gradient to the input and its gradients to A and B."""
        return 6 * self.parameters


@dataclass(frozen=True)
class ExchangeCost:
    """Values a token exchanges, by direction (down: to the device) and pass."""

    down_forward: int
    up_forward: int
    down_backward: int
    up_backward: int

    @property
    def total(self) -> int:
        return self.down_forward + self.up_forward + self.down_backward + self.up_backward


def module_costs(config: PreTrainedConfig, training: TrainingConfig) -> dict[str, ModuleCost]:
    """Costs by the modules' names in the whole model, in the order of the forward pass.

    Raises BadRequest for target modules or a cut that the model does not have.
    """
    layers = config.num_hidden_layers
    if not 0 <= training.devices.cut_layer < layers:
        raise BadRequest(f"cut_layer {training.devices.cut_layer} leaves the cloud no blocks: choose 0 to {layers - 1}")
    return costs_of(layout_of(config, training))


def costs_of(layout: Layout) -> dict[str, ModuleCost]:
    """Costs of the modules of a device's layout, by name, in the order of the forward pass."""
    return {
        module.name: ModuleCost(
            site=site.name,
            order=site.number - 1,
            d_in=module.inputs,
            d_out=module.outputs,
            rank=layout.rank,
            remote=module.number in layout.remote,
        )
        for site in layout.sites
        for module in site.modules
    }


def marginal_values(costs: Mapping[str, ModuleCost], name: str, chosen: Iterable[str]) -> int:
    """Values a token that a module adds to those chosen: fewer where one of them reads the same input."""
    cost = costs[name]
    if not cost.remote:
        return 0
    shared = any(costs[other].site == cost.site for other in chosen)
    return 2 * cost.d_out + (0 if shared else 2 * cost.d_in)


def exchange(costs: Mapping[str, ModuleCost], active: Collection[str], mode: str = MERGE) -> ExchangeCost:
    """Values that a token exchanges for the modules of remote blocks, without the four tensors of the U-shape.

    The gradient to a site's input is not sent where nothing below trains. A killed module that is kept (KEEP) is part
    of the forward pass, and of the backward pass where something below it trains.
    """
    in_forward = set(costs) if mode == KEEP else set(active)
    lowest = min((costs[name].order for name in active), default=None)
    down_forward = up_forward = down_backward = up_backward = 0
    sites: dict[str, list[str]] = {}
    for name in costs:
        if name in in_forward and costs[name].remote:
            sites.setdefault(costs[name].site, []).append(name)
    for names in sites.values():
        d_in, order = costs[names[0]].d_in, costs[names[0]].order
        down_forward += d_in
        up_forward += sum(costs[name].d_out for name in names)
        if lowest is not None and order > lowest:
            down_backward += sum(costs[name].d_out for name in names)
            up_backward += d_in
        elif order == lowest:
            down_backward += sum(costs[name].d_out for name in names if name in active)
    return ExchangeCost(down_forward, up_forward, down_backward, up_backward)


def module_flops(costs: Mapping[str, ModuleCost], active: Collection[str], mode: str = MERGE) -> int:
    """FLOPs of a token at the device for its LoRA branches. A kept module has no gradients to A and B."""
    total = sum(costs[name].flops for name in active)
    if mode == KEEP:
        lowest = min((costs[name].order for name in active), default=None)
        for name, cost in costs.items():
            if name not in active:
                passes = 2 if lowest is not None and cost.order > lowest else 1
                total += passes * 2 * cost.parameters
    return total
