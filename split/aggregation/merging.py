"""The adapters of devices that differ, in ranks and cuts, at an aggregation: what is merged, and what each one gets.

A block is held by the devices whose cut is above it, and by the server for those whose cut is not: the server's copy
counts with the summed weight of those. What comes out, the block's global adapter, is everybody's from there on, as far
as a device's rank takes it: its leading part. A device of rank 0 trains nothing and has no say.

A device's product is completed by what its rank had left out of the last global adapter (where the method says so):
else devices of a low rank would wear away what they never had. The error that is reported is that of the result
against the average of those products, over all modules: ||result - average|| / ||average||, Frobenius norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.aggregation import REGISTRY
from isthmus.split.aggregation.averaging import Merged, Share
from isthmus.split.aggregation.refactor import refactored, turned_to
from isthmus.split.aggregation.stacking import grown
from isthmus.split.codecs import CodecState, for_matrices, parse
from isthmus.split.finite import can_be_used
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, aggregation_of
from isthmus.split.job.streams import choices
from isthmus.split.link.coding import stream_seed
from isthmus.split.lora.factors import Factors, Part, difference_squared, norm_squared, stacked
from isthmus.split.lora.frozen import Frozen
from isthmus.split.lora.lora import A, B, flatten, initial_adapter, unflatten

_GLOBAL, _HELD, _FROZEN, _ROUND = "global/", "held/", "frozen/", "round"


@dataclass
class Merging:
    """blocks: module (its name in the whole model) -> block, of all blocks that a device may hold. like: the adapter of
    those blocks with the job's rank, as empty tensors. shapes: of the devices, now."""

    config: TrainingConfig
    blocks: Mapping[str, int]
    like: Mapping[str, Tensor]
    shapes: dict[str, Shape]
    _global: dict[str, Factors] = field(default_factory=dict)  # after the last aggregation, for blocks that are shared
    _held: dict[str, Tensor] = field(default_factory=dict)  # flat: what each device has had since then
    _frozen: dict[str, Factors] = field(default_factory=dict)
    _rounds: int = 0

    def __post_init__(self) -> None:
        self._method = REGISTRY[aggregation_of(self.config, self.shapes)]
        codecs = choices(self.config.link.codec)
        self._up, self._down = parse(codecs["adapters_up"]), parse(codecs["adapters_down"])
        self._states: dict[str, tuple[CodecState, CodecState]] = {}
        self._initial = {
            module: self._factors(values, module)
            for values in [initial_adapter(self.like, self.config.seed)]
            for module in self.blocks
        }
        for module in self._shared():
            self._global.setdefault(module, self._initial[module])

    @property
    def name(self) -> str:
        return self._method.name

    def modules_of(self, shape: Shape) -> list[str]:
        """Those that a device of this shape has an adapter or a frozen part of, in the order of their names."""
        return [module for module in sorted(self.blocks) if self.blocks[module] < shape.cut]

    def like_of(self, shape: Shape) -> dict[str, Tensor]:
        """A device's adapter, as empty tensors by name, in its order."""
        modules = self.modules_of(shape) if shape.rank else []
        like: dict[str, Tensor] = {}
        for module in modules:
            a, b = self.like[module + A], self.like[module + B]
            like[module + A], like[module + B] = a[: shape.rank], b[:, : shape.rank]
        return dict(sorted(like.items()))

    def values_of(self, device: str) -> int:
        return sum(value.numel() for value in self.like_of(self.shapes[device]).values())

    def start(self, device: str) -> tuple[Tensor | None, Frozen | None]:
        """The adapter, and the frozen part, that a device begins with; None: as it was drawn, none."""
        if not self._rounds:
            self._held[device] = self._flat(device, self._initial)
            return None, None
        if device not in self._held:
            self._held[device] = self._flat(device, self._global)
        frozen = self._frozen_for(device, self._frozen, replaces=True) if self._method.starts_anew else None
        return self._held[device], frozen

    def unfit(self, shares: Mapping[str, Share]) -> set[str]:
        """The devices whose adapters cannot be used."""
        return {device for device, share in shares.items() if not can_be_used(self._own(device, share.values).values())}

    def merge(self, shares: Mapping[str, Share], server: Mapping[str, Tensor]) -> Merged:
        """shares: what each device sent, and its training sequences. server: its adapter, by name."""
        total = sum(share.samples for share in shares.values())
        weights = {device: share.samples / total for device, share in shares.items()}
        own = {device: self._own(device, share.values) for device, share in shares.items()}
        self._rounds += 1
        results: dict[str, Factors] = {}
        stacks: dict[str, Factors] = {}
        lost = norm = 0.0
        fresh = self._drawn_anew() if self._method.starts_anew else {}
        for module in self._shared():
            parts, complete = self._parts(module, own, weights, server)
            if not parts:  # only devices of rank 0 hold it
                results[module] = self._global[module]
                continue
            merged = self._method.merge(complete if self._method.completes else parts, self.config.lora.rank)
            average = stacked(complete)
            lost += difference_squared(merged, average)
            norm += norm_squared(average)
            if self._method.starts_anew:
                stacks[module], results[module] = merged, fresh[module]
            else:
                results[module] = merged
        self._global = results
        remade = self._grow(stacks)
        answers: dict[str, stage_pb2.Tensor] = {}
        held = {}
        for device in shares:
            held[device], answers[device] = self._answer(device, own[device])
        self._held = held
        return Merged(
            answers,
            frozen={
                device: self._frozen_for(device, self._frozen if remade else stacks, replaces=remade)
                for device in shares
                if self._method.starts_anew
            },
            server=self._for_server(server),
            server_frozen=dict(self._frozen),
            error=math.sqrt(lost / norm) if norm else 0.0,
        )

    def state(self) -> dict[str, Tensor]:
        """After the last aggregation, for a checkpoint."""
        tensors = {_ROUND: torch.tensor(self._rounds)}
        for prefix, kept in ((_GLOBAL, self._global), (_FROZEN, self._frozen)):
            for module, factors in kept.items():
                tensors |= {prefix + module + A: factors.a, prefix + module + B: factors.b}
        return tensors | {_HELD + device: values for device, values in self._held.items() if values.numel()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `state` gave, in a job whose shapes may have changed meanwhile."""
        if not tensors:
            return
        self._rounds = int(tensors[_ROUND])

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        def factors(prefix: str) -> dict[str, Factors]:
            values = part(prefix)
            return {name.removesuffix(A): self._factors(values, name.removesuffix(A)) for name in values if A in name}

        self._global = {module: self._initial[module] for module in self._shared()} | factors(_GLOBAL)
        self._frozen = factors(_FROZEN)
        self._held = {
            device: values
            for device, values in part(_HELD).items()
            if device in self.shapes and values.numel() == self.values_of(device)
        }

    def result(self, server: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter of the whole model, by name: the blocks that devices hold, and the server's others. Ranks differ
        by module where a part of it is frozen."""
        tensors = {name: value for name, value in server.items() if not self._is_shared(name)}
        for module in set(self._frozen) - set(self._global):  # shared once, before cuts moved
            both = stacked([(self._frozen[module], 1.0), (self._factors(server, module), 1.0)])
            tensors |= {module + A: both.a, module + B: both.b}
        for module in self._shared():
            factors = self._global[module]
            if self._method.starts_anew:  # what was drawn anew has B = 0
                factors = self._frozen.get(module, factors)
            tensors |= {module + A: factors.a, module + B: factors.b}
        return tensors

    @property
    def starts_anew(self) -> bool:
        return self._method.starts_anew

    def frozen_of_server(self, names: Mapping[str, Tensor]) -> dict[str, Factors]:
        """Of the modules whose adapters the server has."""
        return {module: factors for module, factors in self._frozen.items() if module + A in names}

    def server_values(self) -> dict[str, Tensor]:
        """What a server's copy begins with where it has no other: the global adapters."""
        return {name: value for m, f in self._global.items() for name, value in ((m + A, f.a), (m + B, f.b))}

    def move(self, device: str, shape: Shape, server: Mapping[str, Tensor]) -> None:
        """Gives a device another cut, right after a merge. What its `start` says from then on is of that.

        server: its adapter, by name, from which comes what no device held before.
        """
        before = self.like_of(self.shapes[device])
        kept = unflatten(before, self._held[device])
        self.shapes[device] = shape
        shared = self._shared()
        fresh = self._drawn_anew() if self._method.starts_anew else {}
        for module in shared:
            if module in self._global:
                continue
            own = self._factors(server, module)
            if self._method.starts_anew:
                self._frozen[module], _ = grown(self._frozen.get(module), own)
            self._global[module] = fresh.get(module) or (
                refactored(own, self.config.lora.rank) if self._method.turns else own
            )
        for module in set(self._global) - set(shared):  # the server's alone again
            del self._global[module]
        values = unflatten(self.like_of(shape), self._flat(device, self._global))
        self._held[device] = flatten(values | {name: value for name, value in kept.items() if name in values})
        self._states.pop(device, None)  # the codecs begin anew on both ends

    # ---- parts of it ----

    def _shared(self) -> list[str]:
        deepest = max((shape.cut for shape in self.shapes.values()), default=0)
        return [module for module in sorted(self.blocks) if self.blocks[module] < deepest]

    def _is_shared(self, name: str) -> bool:
        return name.removesuffix(A).removesuffix(B) in self._global

    def _parts(
        self,
        module: str,
        own: Mapping[str, Mapping[str, Tensor]],
        weights: Mapping[str, float],
        server: Mapping[str, Tensor],
    ) -> tuple[list[Part], list[Part]]:
        """What its holders have of a module, with weights that add up to 1; and the same, completed."""
        block, last = self.blocks[module], self._global[module]
        parts: list[tuple[Factors, float, Factors]] = []
        for device, weight in weights.items():
            shape = self.shapes[device]
            if shape.cut > block and shape.rank:
                parts.append((self._factors(own[device], module), weight, last.after(shape.rank)))
        below = sum(weight for device, weight in weights.items() if self.shapes[device].cut <= block)
        if below and module + A in server:
            factors = self._factors(server, module)
            parts.append((factors, below, last.after(factors.rank)))
        total = sum(weight for _, weight, _ in parts)
        plain = [(factors, weight / total) for factors, weight, _ in parts]
        tails = [(tail, weight / total) for _, weight, tail in parts if tail.rank]
        return plain, plain + tails

    def _own(self, device: str, sent: Tensor) -> dict[str, Tensor]:
        values = sent if self._up.exact else self._held[device] + sent
        return unflatten(self.like_of(self.shapes[device]), values)

    def _answer(self, device: str, own: Mapping[str, Tensor]) -> tuple[Tensor, stage_pb2.Tensor]:
        """A device's new adapter as it will have it, flat, and the message that brings it."""
        target = self._flat(device, self._global, own)
        like = self.like_of(self.shapes[device])
        codec = for_matrices(self._down, tuple(tuple(value.shape) for value in like.values()))
        if device not in self._states:
            seed = stream_seed(self.config.seed, "adapters_down")
            self._states[device] = CodecState(seed), CodecState(seed)
        encoder, decoder = self._states[device]
        before = self._held[device]
        payload = codec.encode(target if codec.exact else target - before, encoder)
        message = stage_pb2.Tensor(codec=self._down.name, dtype="float32", shape=list(target.shape), payload=payload)
        if not codec.exact:
            target = before + codec.decode(payload, target.shape, decoder)
        return target, message

    def _flat(self, device: str, of: Mapping[str, Factors], own: Mapping[str, Tensor] | None = None) -> Tensor:
        """A device's adapter: the leading part of these factors; turned to its own, if it has one and they need it."""
        shape = self.shapes[device]
        values: dict[str, Tensor] = {}
        for module in self.modules_of(shape) if shape.rank else []:
            factors = of[module].first(shape.rank)
            if own is not None and self._method.turns:
                factors = turned_to(factors, own[module + A])
            values |= {module + A: factors.a, module + B: factors.b}
        return flatten(dict(sorted(values.items())))

    def _for_server(self, server: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values that its copies of shared blocks get."""
        values: dict[str, Tensor] = {}
        for module in self._shared():
            if module + A in server:
                factors = self._global[module]
                if self._method.turns:
                    factors = turned_to(factors, server[module + A])
                values |= {module + A: factors.a, module + B: factors.b}
        return values

    def _grow(self, stacks: Mapping[str, Factors]) -> bool:
        """Adds a round's stacks to the frozen part. True where one of them was factorised anew: then all is sent."""
        remade = False
        for module, stack in stacks.items():
            self._frozen[module], anew = grown(self._frozen.get(module), stack)
            remade |= anew
        return remade

    def _frozen_for(self, device: str, of: Mapping[str, Factors], *, replaces: bool) -> Frozen:
        """The part of `of` that lies in a device's blocks."""
        modules = [module for module in self.modules_of(self.shapes[device]) if module in of]
        return Frozen(replaces, {module: of[module] for module in modules})

    def _drawn_anew(self) -> dict[str, Factors]:
        """LoRA's first values, others in every round: a stack of equal A would reach no new directions."""
        config = self.config.but(seed=self.config.seed + self._rounds)
        values = initial_adapter(self.like, config.seed)
        return {module: self._factors(values, module) for module in self.blocks}

    @staticmethod
    def _factors(values: Mapping[str, Tensor], module: str) -> Factors:
        a, b = values[module + A], values[module + B]
        return Factors(a.detach().to("cpu", torch.float32), b.detach().to("cpu", torch.float32))
