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
from isthmus.split.dlora.module_costs import ModuleCost, marginal_values
from isthmus.split.errors import BadRequest

_LEAST_WORTH = 0.1  # of the mean score: what a module without any is taken for when trials are chosen


@dataclass(frozen=True)
class Decision:
    """What trains at a step, what changed against the step before, and why (empty: nothing changed)."""

    active: frozenset[str]
    killed: tuple[str, ...] = ()
    revived: tuple[str, ...] = ()
    reason: str = ""


class Controller:
    """`decide(step)` before a step, `observe(step, ...)` after it, for every step from 0 on, in order.

    The budget holds over the run: what is active at the steps so far never costs more than their budgets together
    (what is set aside for trials may be saved up for them), and a step outside a trial never more than its own. A
    budget above zero always leaves something active: where no module fits in it, the cheapest ones take turns.
    """

    def __init__(self, costs: Mapping[str, ModuleCost], policy: KillPolicy, total_steps: int) -> None:
        self.costs = dict(costs)
        self.policy = policy
        self.total_steps = total_steps
        self._active = set(self.costs)
        self._probing: dict[str, int] = {}  # module -> first step at which its trial is over
        self._score: dict[str, float] = {}
        self._seen = dict.fromkeys(self.costs, -1)  # the last step at which a module was observed
        self._changed = dict.fromkeys(self.costs, -(10**9))  # the step of a module's last change of state
        self._credit = 0.0  # saved for trials, in units of cost
        self._last_trial = policy.warmup_steps
        self._fraction = 1.0
        self._loss: float | None = None  # smoothed
        self._slow: float | None = None  # smoothed over a longer time
        self._steepest = 0.0
        self._best = math.inf
        self._best_step = 0
        self._full = self.cost(self.costs)

    def cost(self, modules: Iterable[str]) -> float:
        """Of a step with these modules active, in units of the budget: modules, or values a token."""
        if self.policy.budget == "modules":
            return float(len(set(modules)))
        chosen: list[str] = []
        total = 0
        for name in modules:
            total += marginal_values(self.costs, name, chosen)
            chosen.append(name)
        return float(total)

    def budget(self, step: int) -> float:
        """Of a step, in the units of cost."""
        return self._fraction_at(step) * self._full

    def scores(self) -> dict[str, float]:
        """Smoothed responsiveness by module, as far as it is known; a killed module's follows that of the others."""
        return dict(self._score)

    def decide(self, step: int) -> Decision:
        """What is to train at this step."""
        policy = self.policy
        if policy.active_fraction >= 1 or step < policy.warmup_steps:
            return Decision(frozenset(self._active))
        before = frozenset(self._active)
        due = (step - policy.warmup_steps) % policy.interval == 0
        if policy.schedule == "gain" and due:
            self._fraction = self._gain_fraction()
        budget = self.budget(step)
        room = budget * (1 - policy.probe_share)
        tried = [name for name, end in self._probing.items() if end <= step]
        for name in tried:
            del self._probing[name]
            self._active.discard(name)
        reasons = []
        if due or tried or self.cost(self._settled()) > room:
            self._active = self._choose(step, room, tried) | set(self._probing)
            reasons.append("trial over" if tried else "budget")
        self._credit = min(self._credit + budget - self.cost(self._settled()), self._full * policy.probe_steps)
        if self._start_trials(step):
            reasons.append("loss stalled" if self._stalled(step) else "trial")
            self._best_step = step  # a stall is counted anew from here
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
        """What a step gave: its loss, and the responsiveness of the modules that were active in it.

        It may be below 0 for a module that does harm. Values that are not finite, and modules that are not known, are
        left out.
        """
        keep = self.policy.smoothing
        fresh = {
            name: float(value) for name, value in responsiveness.items() if name in self.costs and math.isfinite(value)
        }
        old = {name: self._score[name] for name in fresh if name in self._score and self._seen[name] == step - 1}
        for name, value in fresh.items():
            if name in old:
                self._score[name] = keep * old[name] + (1 - keep) * value
            else:  # first seen, or back from the dead: what it was says little
                self._score[name] = value
            self._seen[name] = step
        before, after = sum(old.values()), sum(self._score[name] for name in old)
        if before > 0 and after > 0:
            for name in self._score:
                if name not in fresh:
                    self._score[name] *= after / before
        self._follow(step, loss)

    def state(self) -> dict[str, Any]:
        """JSON-able; `load_state` of it into a controller of the same modules and policy goes on as this one would."""
        return {
            "policy": dataclasses.asdict(self.policy),
            "active": self._in_order(self._active),
            "probing": dict(self._probing),
            "score": dict(self._score),
            "seen": dict(self._seen),
            "changed": dict(self._changed),
            "credit": self._credit,
            "last_trial": self._last_trial,
            "fraction": self._fraction,
            "loss": self._loss,
            "slow": self._slow,
            "steepest": self._steepest,
            "best": None if math.isinf(self._best) else self._best,
            "best_step": self._best_step,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises BadRequest for the state of other modules or of another policy."""
        if set(state["seen"]) != set(self.costs):
            raise BadRequest("the state of Kill and Revive is of other modules: start the job again")
        if dict(state["policy"]) != dataclasses.asdict(self.policy):
            raise BadRequest("the state of Kill and Revive is of another policy: go on with that one")
        self._active = set(state["active"])
        self._probing = {name: int(end) for name, end in state["probing"].items()}
        self._score = {name: float(value) for name, value in state["score"].items()}
        self._seen = {name: int(step) for name, step in state["seen"].items()}
        self._changed = {name: int(step) for name, step in state["changed"].items()}
        self._credit = float(state["credit"])
        self._last_trial = int(state["last_trial"])
        self._fraction = float(state["fraction"])
        self._loss, self._slow = state["loss"], state["slow"]
        self._steepest = float(state["steepest"])
        self._best = math.inf if state["best"] is None else float(state["best"])
        self._best_step = int(state["best_step"])

    # The budget

    def _fraction_at(self, step: int) -> float:
        policy = self.policy
        since = step - policy.warmup_steps
        if since < 0 or policy.active_fraction >= 1:
            return 1.0
        if policy.schedule == "gain":
            return self._fraction
        if policy.schedule == "step" or since >= policy.anneal_steps:
            return policy.active_fraction
        left = 0.5 * (1 + math.cos(math.pi * (since + 1) / (policy.anneal_steps + 1)))
        return policy.active_fraction + (1 - policy.active_fraction) * left

    def _gain_fraction(self) -> float:
        """As much of the whole as the loss still falls, against the steepest that it fell; never rises again."""
        if self._loss is None or self._slow is None or self._steepest <= 0:
            return self._fraction
        share = max(0.0, self._slow - self._loss) / self._steepest
        return max(self.policy.active_fraction, min(self._fraction, share))

    def _follow(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        if self._loss is None or self._slow is None:
            self._loss = self._slow = loss
        self._loss += 0.1 * (loss - self._loss)
        self._slow += 0.03 * (loss - self._slow)
        if step < self.policy.warmup_steps or self._steepest == 0:
            self._steepest = max(self._steepest, self._slow - self._loss)
        if self._loss < self._best * (1 - self.policy.stall_tolerance) or math.isinf(self._best):
            self._best, self._best_step = self._loss, step

    # The choice

    def _choose(self, step: int, room: float, tried: Iterable[str]) -> set[str]:
        """The modules with the most score for what they add to the cost, as many as there is room for.

        tried: those whose trial is over; they compete as killed ones, but may come in at once.
        """
        open_to = self._settled() | set(tried) | {name for name in self._killed() if self._may_revive(name, step)}
        candidates = [name for name in self._in_order(open_to) if self._expected(name) > 0]
        chosen: list[str] = []
        left = room
        while candidates:
            adds = {name: self._adds(name, chosen) for name in candidates}
            best = max(candidates, key=lambda name: self._rank(name, adds[name], step))
            candidates.remove(best)
            if adds[best] <= left + 1e-9:
                chosen.append(best)
                left -= adds[best]
        return set(chosen)

    def _rank(self, name: str, adds: float, step: int) -> tuple[bool, float]:
        """Those that came in lately are first, as long as they fit."""
        score = self._expected(name)
        held = False
        if name in self._active:
            score *= 1 + self.policy.margin
            held = step - self._changed[name] < self.policy.hold_steps
        return held, score / adds if adds else math.inf

    def _expected(self, name: str) -> float:
        """Its score; of one that was never seen, the mean of the others."""
        if name in self._score or not self._score:
            return self._score.get(name, 1.0)
        return sum(self._score.values()) / len(self._score)

    def _adds(self, name: str, chosen: list[str]) -> float:
        return 1.0 if self.policy.budget == "modules" else float(marginal_values(self.costs, name, chosen))

    def _may_revive(self, name: str, step: int) -> bool:
        return step - self._changed[name] >= self.policy.hold_steps

    def _settled(self) -> set[str]:
        """Active, and not for a trial."""
        return self._active - set(self._probing)

    def _killed(self) -> set[str]:
        return set(self.costs) - self._active

    def _stalled(self, step: int) -> bool:
        return step - self._best_step >= self.policy.stall_steps

    def _start_trials(self, step: int) -> bool:
        """Revives killed modules, the most urgent first, as many as what was saved pays for."""
        policy = self.policy
        since = step - self._last_trial
        due = since >= policy.probe_interval or (self._stalled(step) and since >= policy.probe_steps)
        if not due or not policy.probe_share or step + 2 * policy.probe_steps > self.total_steps:
            return False
        dead = [name for name in self._in_order(self._killed()) if self._may_revive(name, step)]
        started = False
        for name in sorted(dead, key=lambda name: -self._urgency(name, step)):
            if self._price(name) > self._credit + 1e-9:
                break  # it is saved up for: or cheap modules would always come before dear ones
            self._try(name, step)
            started = True
        if started:
            self._last_trial = step
        return started

    def _advance_a_trial(self, step: int, budget: float, before: Collection[str]) -> None:
        """Of the most urgent module that a step's budget pays for, or of the cheapest; what it costs is owed."""
        open_to = [name for name in self.costs if name in before or self._may_revive(name, step)]
        most = max(budget, min(self._adds(name, []) for name in open_to))
        fitting = [name for name in open_to if self._adds(name, []) <= most + 1e-9]
        self._try(max(fitting, key=lambda name: self._urgency(name, step)), step)

    def _try(self, name: str, step: int) -> None:
        self._credit -= self._price(name)
        self._active.add(name)
        self._probing[name] = step + self.policy.probe_steps

    def _price(self, name: str) -> float:
        """Of a trial, as if nothing shared its input."""
        return self._adds(name, []) * self.policy.probe_steps

    def _urgency(self, name: str, step: int) -> float:
        """The longer unseen, and the more responsive for its cost, the more; one that did not respond has its turns."""
        mean = sum(map(abs, self._score.values())) / max(1, len(self._score)) or 1.0
        worth = max(0.0, self._expected(name)) + _LEAST_WORTH * mean
        price = self._adds(name, [])
        return (step - self._seen[name]) * worth / price if price else math.inf

    def _in_order(self, modules: Iterable[str]) -> list[str]:
        wanted = set(modules)
        return [name for name in self.costs if name in wanted]
