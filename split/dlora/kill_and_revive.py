"""Kill and Revive: which LoRA modules train at a step, so that few of them do and those that matter.

Gao and Zhang 2024 (arXiv 2404.05182). All modules train through a warm-up, in which each shows its responsiveness (a
number that the caller measures, such as the norm of its gradient). Then a budget, of modules or of values on the link,
shrinks to its target, and the modules with the most responsiveness for their cost stay. A killed module is tried again
now and then, and when the loss stalls. No tensor and no clock is looked at here: the same observations give the same
decisions, on every machine, and after a restart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.split.dlora.kill_policy import KillPolicy
from isthmus.split.dlora.loss_trend import LossTrend
from isthmus.split.dlora.module_budget import ModuleBudget
from isthmus.split.dlora.module_costs import ModuleCost
from isthmus.split.dlora.module_scores import ModuleScores
from isthmus.split.errors import BadRequest

_ROUNDING = 1e-9  # by which a cost may be over what there is room for


@dataclass(frozen=True)
class Decision:
    """Which modules train at a step, what changed since the step before, and why (empty: nothing changed)."""

    active: frozenset[str]
    killed: tuple[str, ...] = ()
    revived: tuple[str, ...] = ()
    reason: str = ""


class KillAndRevive:
    """Call `decide(step)` before a step and `observe(step, ...)` after it, for every step from 0 on, in order.

    The budget holds over the run: the modules active at the steps so far never cost more than the budgets of these
    steps together (what is set aside for trials may be saved up), and a step outside a trial never costs more than its
    own budget. A budget above zero always leaves a module active: where none fits, the cheapest ones take turns.
    """

    def __init__(self, costs: Mapping[str, ModuleCost], policy: KillPolicy, total_steps: int) -> None:
        self.costs = dict(costs)
        self.policy = policy
        self.total_steps = total_steps
        self._budget = ModuleBudget(self.costs, policy)
        self._scores = ModuleScores(self.costs)
        self._trend = LossTrend(policy)
        self._active = set(self.costs)
        self._probing: dict[str, int] = {}  # module -> first step at which its trial is over
        self._changed = dict.fromkeys(self.costs, -(10**9))  # the step of a module's last change of state
        self._credit = 0.0  # saved for trials, in units of cost
        self._last_trial = policy.warmup_steps

    def cost(self, modules: Iterable[str]) -> float:
        """The cost of a step with these modules active, in units of the budget: modules, or values a token."""
        return self._budget.cost(modules)

    def budget(self, step: int) -> float:
        """The budget of a step, in the units of cost."""
        return self._budget.at(step)

    def scores(self) -> dict[str, float]:
        """Smoothed responsiveness by module, as far as it is known; a killed module's follows that of the others."""
        return self._scores.known()

    def decide(self, step: int) -> Decision:
        """Choose what trains at this step."""
        policy = self.policy
        if policy.active_fraction >= 1 or step < policy.warmup_steps:
            return Decision(frozenset(self._active))
        before = frozenset(self._active)
        due = (step - policy.warmup_steps) % policy.interval == 0
        if policy.schedule == "gain" and due:
            self._budget.follow(self._trend.slope())
        budget = self.budget(step)
        room = budget * (1 - policy.probe_share)
        tried = self._end_trials(step)
        reasons = []
        if due or tried or self.cost(self._settled()) > room:
            self._active = self._choose(step, room, tried) | set(self._probing)
            reasons.append("trial over" if tried else "budget")
        saved = self._credit + budget - self.cost(self._settled())
        self._credit = min(saved, self._budget.full * policy.probe_steps)
        if self._start_trials(step):
            reasons.append("loss stalled" if self._trend.stalled(step) else "trial")
            self._trend.restart(step)
        if not self._active and budget > 0:
            self._advance_a_trial(step, budget, before)
            reasons.append("none was left")
        killed, revived = before - self._active, self._active - before
        for name in (*killed, *revived):
            self._changed[name] = step
        return Decision(
            frozenset(self._active),
            tuple(self._in_order(killed)),
            tuple(self._in_order(revived)),
            ", ".join(reasons) if killed or revived else "",
        )

    def observe(self, step: int, loss: float, responsiveness: Mapping[str, float]) -> None:
        """Take in what a step gave: its loss, and the responsiveness of the modules that were active in it.

        A module's responsiveness is below 0 if it does harm. Values that are not finite, and modules that are not
        known, are left out.
        """
        self._scores.observe(step, responsiveness, self.policy.smoothing)
        self._trend.follow(step, loss)

    def state(self) -> dict[str, Any]:
        """The state as JSON-able values; one with the same modules and policy goes on from it after `load_state`."""
        return {
            "policy": dataclasses.asdict(self.policy),
            "active": self._in_order(self._active),
            "probing": dict(self._probing),
            "changed": dict(self._changed),
            "credit": self._credit,
            "last_trial": self._last_trial,
            "fraction": self._budget.fraction,
            **self._scores.state(),
            **self._trend.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises BadRequest for the state of other modules or of another policy."""
        if set(state["seen"]) != set(self.costs):
            raise BadRequest("the state of Kill and Revive is of other modules: start the job again")
        if dict(state["policy"]) != dataclasses.asdict(self.policy):
            raise BadRequest("the state of Kill and Revive is of another policy: go on with that one")
        self._active = set(state["active"])
        self._probing = {name: int(end) for name, end in state["probing"].items()}
        self._changed = {name: int(step) for name, step in state["changed"].items()}
        self._credit = float(state["credit"])
        self._last_trial = int(state["last_trial"])
        self._budget.fraction = float(state["fraction"])
        self._scores.load_state(state)
        self._trend.load_state(state)

    # ---- the choice ----

    def _choose(self, step: int, room: float, tried: Iterable[str]) -> set[str]:
        """The modules with the most score for what they add to the cost, as many as there is room for.

        tried: modules whose trial is over; they compete as killed ones do, but may come in at once.
        """
        open_to = self._settled() | set(tried) | {name for name in self._killed() if self._may_revive(name, step)}
        candidates = [name for name in self._in_order(open_to) if self._scores.expected(name) > 0]
        chosen: list[str] = []
        left = room
        while candidates:
            adds = {name: self._budget.adds(name, chosen) for name in candidates}
            best = max(candidates, key=lambda name: self._rank(name, adds[name], step))
            candidates.remove(best)
            if adds[best] <= left + _ROUNDING:
                chosen.append(best)
                left -= adds[best]
        return set(chosen)

    def _rank(self, name: str, adds: float, step: int) -> tuple[bool, float]:
        """The order of a choice: modules that came in lately are first, as long as they fit; then score for cost."""
        score = self._scores.expected(name)
        held = False
        if name in self._active:
            score *= 1 + self.policy.margin
            held = step - self._changed[name] < self.policy.hold_steps
        return held, score / adds if adds else math.inf

    def _may_revive(self, name: str, step: int) -> bool:
        return step - self._changed[name] >= self.policy.hold_steps

    def _settled(self) -> set[str]:
        """Modules that are active, and not for a trial."""
        return self._active - set(self._probing)

    def _killed(self) -> set[str]:
        return set(self.costs) - self._active

    # ---- trials ----

    def _end_trials(self, step: int) -> list[str]:
        """Take the modules out whose trial is over by this step."""
        over = [name for name, end in self._probing.items() if end <= step]
        for name in over:
            del self._probing[name]
            self._active.discard(name)
        return over

    def _start_trials(self, step: int) -> bool:
        """Revive killed modules, the most urgent first, as many as what was saved pays for."""
        policy = self.policy
        since = step - self._last_trial
        due = since >= policy.probe_interval or (self._trend.stalled(step) and since >= policy.probe_steps)
        if not due or not policy.probe_share or step + 2 * policy.probe_steps > self.total_steps:
            return False
        dead = [name for name in self._in_order(self._killed()) if self._may_revive(name, step)]
        started = False
        for name in sorted(dead, key=lambda name: -self._urgency(name, step)):
            if self._budget.trial(name) > self._credit + _ROUNDING:
                break  # it is saved up for: or cheap modules would always come before dear ones
            self._try(name, step)
            started = True
        if started:
            self._last_trial = step
        return started

    def _advance_a_trial(self, step: int, budget: float, before: Collection[str]) -> None:
        """Try the most urgent module that a step's budget pays for, or the cheapest; what it costs is owed."""
        open_to = [name for name in self.costs if name in before or self._may_revive(name, step)]
        most = max(budget, min(self._budget.alone(name) for name in open_to))
        fitting = [name for name in open_to if self._budget.alone(name) <= most + _ROUNDING]
        self._try(max(fitting, key=lambda name: self._urgency(name, step)), step)

    def _try(self, name: str, step: int) -> None:
        self._credit -= self._budget.trial(name)
        self._active.add(name)
        self._probing[name] = step + self.policy.probe_steps

    def _urgency(self, name: str, step: int) -> float:
        price = self._budget.alone(name)
        return self._scores.urgency(name, step) / price if price else math.inf

    def _in_order(self, modules: Iterable[str]) -> list[str]:
        wanted = set(modules)
        return [name for name in self.costs if name in wanted]
