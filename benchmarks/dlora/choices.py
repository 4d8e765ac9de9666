"""Ways to choose the modules that train: Kill and Revive, and what it is held against at the same budget."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from isthmus.split.dlora.kill_and_revive import Decision, KillAndRevive
from isthmus.split.dlora.kill_policy import KillPolicy
from isthmus.split.dlora.module_costs import ModuleCost

CHOICES = ("all", "controller", "fixed", "random", "named")


class Choice(Protocol):
    def decide(self, step: int) -> Decision: ...

    def observe(self, step: int, loss: float, responsiveness: Mapping[str, float]) -> None: ...

    def scores(self) -> dict[str, float]: ...


class Random(KillAndRevive):
    """The same budgets and times, and scores that are drawn anew for every decision."""

    def __init__(self, costs: Mapping[str, ModuleCost], policy: KillPolicy, total_steps: int, seed: int) -> None:
        super().__init__(costs, replace(policy, probe_share=0.0, margin=0.0, smoothing=0.0), total_steps)
        self._seed = seed

    def observe(self, step: int, loss: float, responsiveness: Mapping[str, float]) -> None:
        draw = random.Random(f"{self._seed}/{step // max(1, self.policy.hold_steps)}")
        super().observe(step, loss, {name: draw.random() for name in self.costs})


class Named:
    """These modules from the first step on, and no others."""

    def __init__(self, costs: Mapping[str, ModuleCost], named: tuple[str, ...]) -> None:
        self._active = frozenset(name for name in costs if any(part in name for part in named))
        self._others = tuple(name for name in costs if name not in self._active)

    def decide(self, step: int) -> Decision:
        return Decision(self._active, self._others if step == 0 else ())

    def observe(self, step: int, loss: float, responsiveness: Mapping[str, float]) -> None:
        pass

    def scores(self) -> dict[str, float]:
        return {}


def chooser(
    choice: str,
    costs: Mapping[str, ModuleCost],
    policy: KillPolicy,
    steps: int,
    seed: int,
    named: tuple[str, ...] = (),
) -> Choice:
    """fixed: what responded most in the warm-up; as the budget shrinks some go, and none comes back."""
    if choice == "named":
        return Named(costs, named)
    if choice == "random":
        return Random(costs, policy, steps, seed)
    if choice == "all":
        policy = replace(policy, active_fraction=1.0)
    elif choice == "fixed":
        policy = replace(policy, probe_share=0.0, margin=1e9, hold_steps=0)
    return KillAndRevive(costs, policy, steps)
