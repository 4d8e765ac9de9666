"""The adapters of devices that differ in cut and rank, at an aggregation: what is merged, and what each device gets.

A block is held by the devices whose cut is above it, and by the server for the others: the server's copy counts with
the summed weight of those others. The result, the block's global adapter, is everybody's from then on as far as a
device's rank takes it: a device of lower rank gets its leading part. A device of rank 0 trains nothing and has no say.

Where the method says so (`Aggregation.completes`), a device's product is completed by what its rank had left out of the
last global adapter: else devices of a low rank would wear away what they never had. The error that is reported is that
of the result against the average of those products, over all modules: ||result - average|| / ||average|| in Frobenius
norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.aggregation import REGISTRY
from isthmus.split.aggregation.adapter_coder import AdapterCoder
from isthmus.split.aggregation.adapter_layout import AdapterLayout, flat
from isthmus.split.aggregation.averager import Merged, Share
from isthmus.split.aggregation.refactor import refactored, turned_to
from isthmus.split.aggregation.stacking import grow, grown
from isthmus.split.codecs.finite import can_be_used
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, aggregation_of
from isthmus.split.lora.factors import Factors, WeightedFactors, difference_squared, norm_squared, stacked
from isthmus.split.lora.frozen import Frozen
from isthmus.split.lora.lora import A, factors_of, flatten, named_tensors, shapes_of, unflatten

_GLOBAL, _HELD, _FROZEN, _ROUND = "global/", "held/", "frozen/", "round"


@dataclass
class Merger:
    """Merges the adapters of one job's devices, and keeps the global adapter between aggregations.

    shapes: cut and rank of each device, now.
    """

    config: TrainingConfig
    layout: AdapterLayout
    shapes: dict[str, Shape]
    _global: dict[str, Factors] = field(default_factory=dict)  # after the last aggregation, for blocks that are shared
    _held: dict[str, Tensor] = field(default_factory=dict)  # flat: what each device has had since then
    _frozen: dict[str, Factors] = field(default_factory=dict)
    _rounds: int = 0

    def __post_init__(self) -> None:
        self.method = REGISTRY[aggregation_of(self.config, self.shapes)]
        self._coders: dict[str, AdapterCoder] = {}  # by device
        self._initial = self.layout.drawn(self.config.seed)
        for module in self._shared():
            self._global.setdefault(module, self._initial[module])

    def values_of(self, device: str) -> int:
        """Number of values of a device's adapter."""
        return sum(value.numel() for value in self.layout.like_of(self.shapes[device]).values())

    def start(self, device: str) -> tuple[Tensor | None, Frozen | None]:
        """The adapter, (values,), and the frozen part that a device begins with; None for what it draws itself."""
        if not self._rounds:
            self._held[device] = self._flat(device, self._initial)
            return None, None
        if device not in self._held:
            self._held[device] = self._flat(device, self._global)
        frozen = self._frozen_for(device, self._frozen, replaces=True) if self.method.starts_anew else None
        return self._held[device], frozen

    def unfit(self, shares: Mapping[str, Share]) -> set[str]:
        """The devices whose adapters cannot be used."""
        return {
            device for device, share in shares.items() if not can_be_used(self._received(device, share.values).values())
        }

    def merge(self, shares: Mapping[str, Share], server: Mapping[str, Tensor]) -> Merged:
        """Merge what the devices sent into the global adapter. server: the server's adapter, by name."""
        total = sum(share.samples for share in shares.values())
        weights = {device: share.samples / total for device, share in shares.items()}
        own = {device: self._received(device, share.values) for device, share in shares.items()}
        self._rounds += 1
        stacks, error = self._merge_modules(own, weights, server)
        remade = grow(self._frozen, stacks)
        answers: dict[str, stage_pb2.Tensor] = {}
        held: dict[str, Tensor] = {}
        for device in shares:
            target = self._flat(device, self._global, own[device])
            held[device], answers[device] = self._coder(device).message(target, self._held[device])
        self._held = held
        return Merged(
            answers,
            frozen={
                device: self._frozen_for(device, self._frozen if remade else stacks, replaces=remade)
                for device in shares
                if self.method.starts_anew
            },
            server=self._for_server(server),
            server_frozen=dict(self._frozen),
            error=error,
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, after an aggregation."""
        tensors = {_ROUND: torch.tensor(self._rounds)}
        for prefix, kept in ((_GLOBAL, self._global), (_FROZEN, self._frozen)):
            tensors |= {prefix + name: value for name, value in named_tensors(kept).items()}
        return tensors | {_HELD + device: values for device, values in self._held.items() if values.numel()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave, in a job whose shapes may have changed meanwhile."""
        if not tensors:
            return
        self._rounds = int(tensors[_ROUND])

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        def factors(prefix: str) -> dict[str, Factors]:
            values = part(prefix)
            return {name.removesuffix(A): factors_of(values, name.removesuffix(A)) for name in values if A in name}

        self._global = {module: self._initial[module] for module in self._shared()} | factors(_GLOBAL)
        self._frozen = factors(_FROZEN)
        self._held = {
            device: values
            for device, values in part(_HELD).items()
            if device in self.shapes and values.numel() == self.values_of(device)
        }

    def result(self, server: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter of the whole model, by name: of the blocks that devices hold, and the server's of the others.

        Ranks differ by module where a part of it is frozen.
        """
        shared = set(named_tensors(self._global))
        tensors = {name: value for name, value in server.items() if name not in shared}
        for module in set(self._frozen) - set(self._global):  # shared once, before cuts moved
            both = stacked([(self._frozen[module], 1.0), (factors_of(server, module), 1.0)])
            tensors |= named_tensors({module: both})
        for module in self._shared():
            factors = self._global[module]
            if self.method.starts_anew:  # what was drawn anew has B = 0
                factors = self._frozen.get(module, factors)
            tensors |= named_tensors({module: factors})
        return tensors

    def frozen_of_server(self, names: Mapping[str, Tensor]) -> dict[str, Factors]:
        """The frozen part of the modules whose adapters the server has. names: the server's adapter, by name."""
        return {module: factors for module, factors in self._frozen.items() if module + A in names}

    def server_values(self) -> dict[str, Tensor]:
        """The global adapters by name, with which a server's copy begins where it has no other."""
        return named_tensors(self._global)

    def move(self, device: str, shape: Shape, server: Mapping[str, Tensor]) -> None:
        """Give a device another cut, right after a merge; what `start` gives is of that cut from then on.

        server: its adapter, by name, from which comes what no device held before.
        """
        kept = unflatten(self.layout.like_of(self.shapes[device]), self._held[device])
        self.shapes[device] = shape
        shared = self._shared()
        fresh = self._fresh()
        for module in shared:
            if module in self._global:
                continue
            own = factors_of(server, module)
            if self.method.starts_anew:
                self._frozen[module], _ = grown(self._frozen.get(module), own)
            self._global[module] = fresh.get(module) or (
                refactored(own, self.config.lora.rank) if self.method.turns else own
            )
        for module in set(self._global) - set(shared):  # the server's alone again
            del self._global[module]
        values = unflatten(self.layout.like_of(shape), self._flat(device, self._global))
        self._held[device] = flatten(values | {name: value for name, value in kept.items() if name in values})
        self._coders.pop(device, None)  # the codecs begin anew on both ends

    # ---- parts of it ----

    def _shared(self) -> list[str]:
        """Modules of the blocks that at least one device holds, in the order of their names."""
        return self.layout.modules_below(max((shape.cut for shape in self.shapes.values()), default=0))

    def _merge_modules(
        self, own: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float], server: Mapping[str, Tensor]
    ) -> tuple[dict[str, Factors], float]:
        """Make the new global adapter. Returns what becomes frozen, by module, and the relative error of the result."""
        results: dict[str, Factors] = {}
        stacks: dict[str, Factors] = {}
        lost = norm = 0.0
        fresh = self._fresh()
        for module in self._shared():
            parts, complete = self._parts(module, own, weights, server)
            if not parts:  # only devices of rank 0 hold it
                results[module] = self._global[module]
                continue
            merged = self.method.merge(complete if self.method.completes else parts, self.config.lora.rank)
            average = stacked(complete)
            lost += difference_squared(merged, average)
            norm += norm_squared(average)
            if self.method.starts_anew:
                stacks[module], results[module] = merged, fresh[module]
            else:
                results[module] = merged
        self._global = results
        return stacks, math.sqrt(lost / norm) if norm else 0.0

    def _fresh(self) -> dict[str, Factors]:
        """Factors with which training goes on where the method starts anew; else none.

        They are others in every round: a stack of equal A would reach no new directions.
        """
        return self.layout.drawn(self.config.seed + self._rounds) if self.method.starts_anew else {}

    def _parts(
        self,
        module: str,
        own: Mapping[str, Mapping[str, Tensor]],
        weights: Mapping[str, float],
        server: Mapping[str, Tensor],
    ) -> tuple[list[WeightedFactors], list[WeightedFactors]]:
        """Collect what the holders of a module have of it, with weights that add up to 1. Returns it as it is, and
        completed.
        """
        block, last = self.layout.blocks[module], self._global[module]
        parts: list[tuple[Factors, float, Factors]] = []
        for device, weight in weights.items():
            shape = self.shapes[device]
            if shape.cut > block and shape.rank:
                parts.append((factors_of(own[device], module), weight, last.after(shape.rank)))
        below = sum(weight for device, weight in weights.items() if self.shapes[device].cut <= block)
        if below and module + A in server:
            factors = factors_of(server, module)
            parts.append((factors, below, last.after(factors.rank)))
        total = sum(weight for _, weight, _ in parts)
        plain = [(factors, weight / total) for factors, weight, _ in parts]
        tails = [(tail, weight / total) for _, weight, tail in parts if tail.rank]
        return plain, plain + tails

    def _coder(self, device: str) -> AdapterCoder:
        if device not in self._coders:
            self._coders[device] = AdapterCoder(self.config, shapes_of(self.layout.like_of(self.shapes[device])))
        return self._coders[device]

    def _received(self, device: str, sent: Tensor) -> dict[str, Tensor]:
        values = self._coder(device).received(sent, self._held[device])
        return unflatten(self.layout.like_of(self.shapes[device]), values)

    def _flat(self, device: str, of: Mapping[str, Factors], own: Mapping[str, Tensor] | None = None) -> Tensor:
        """A device's adapter, (values,): the leading part of these factors.

        own: the adapter that the device has, to whose basis the factors are turned where the method needs it.
        """
        parts = self.layout.leading(of, self.shapes[device])
        if own is not None and self.method.turns:
            parts = {module: turned_to(factors, own[module + A]) for module, factors in parts.items()}
        return flat(parts)

    def _for_server(self, server: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values, by name, that the server's copies of shared blocks get."""
        parts = {module: self._global[module] for module in self._shared() if module + A in server}
        if self.method.turns:
            parts = {module: turned_to(factors, server[module + A]) for module, factors in parts.items()}
        return named_tensors(parts)

    def _frozen_for(self, device: str, of: Mapping[str, Factors], *, replaces: bool) -> Frozen:
        """The part of `of` that lies in a device's blocks."""
        modules = [module for module in self.layout.modules_below(self.shapes[device].cut) if module in of]
        return Frozen(replaces, {module: of[module] for module in modules})
