"""The budget of Kill and Revive: what active modules cost at a step, and how much they may cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from isthmus.split.dlora.kill_policy import KillPolicy
from isthmus.split.dlora.module_costs import ModuleCost, marginal_values


class ModuleBudget:
    """Costs and budgets are in the policy's unit: modules, or values on the link for each token."""

    def __init__(self, costs: Mapping[str, ModuleCost], policy: KillPolicy) -> None:
        self._costs, self._policy = costs, policy
        self.fraction = 1.0  # of the whole, under the schedule `gain`
        self.full = self.cost(costs)

    def cost(self, modules: Iterable[str]) -> float:
        """The cost of a step in which these modules are active."""
        chosen: list[str] = []
        total = 0.0
        for name in modules if self._policy.budget != "modules" else set(modules):
            total += self.adds(name, chosen)
            chosen.append(name)
        return total

    def adds(self, name: str, chosen: Iterable[str]) -> float:
        """What a module adds to the cost of those chosen already."""
        return 1.0 if self._policy.budget == "modules" else float(marginal_values(self._costs, name, chosen))

    def alone(self, name: str) -> float:
        """The cost of a step in which this module is the only one."""
        return self.adds(name, ())

    def trial(self, name: str) -> float:
        """The cost of a module's trial, as if nothing shared its input."""
        return self.alone(name) * self._policy.probe_steps

    def at(self, step: int) -> float:
        """The budget of a step."""
        return self._fraction_at(step) * self.full

    def follow(self, slope: float | None) -> None:
        """Shrink to as much of the whole as the loss still falls; it never grows again. slope: see `LossTrend`."""
        if slope is not None:
            self.fraction = max(self._policy.active_fraction, min(self.fraction, slope))

    def _fraction_at(self, step: int) -> float:
        policy = self._policy
        since = step - policy.warmup_steps
        if since < 0 or policy.active_fraction >= 1:
            return 1.0
        if policy.schedule == "gain":
            return self.fraction
        if policy.schedule == "step" or since >= policy.anneal_steps:
            return policy.active_fraction
        left = 0.5 * (1 + math.cos(math.pi * (since + 1) / (policy.anneal_steps + 1)))
        return policy.active_fraction + (1 - policy.active_fraction) * left
