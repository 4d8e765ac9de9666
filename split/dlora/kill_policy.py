"""The choices in Kill and Revive: how few LoRA modules may train, how soon, and how quickly that changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isthmus.split.errors import BadRequest
from isthmus.split.job.groups import KILLED, MERGE

BUDGETS = ("values", "modules")
SCHEDULES = ("step", "cosine", "gain")


@dataclass(frozen=True)
class KillPolicy:
    """How much of a job may train, and how quickly that changes. Steps are the job's."""

    budget: str = "values"  # what is rationed: values on the link, or the number of modules
    active_fraction: float = 0.125  # of the budget with all active, that is left in the end; 1: nothing is ever killed
    warmup_steps: int = 30  # all modules train, and are scored
    schedule: str = "cosine"  # of the budget after the warm-up: at once (step), over anneal_steps, or as the gain falls
    anneal_steps: int = 100
    interval: int = 10  # steps between decisions
    smoothing: float = 0.9  # of the scores: share of the old value a step
    margin: float = 0.25  # by how much a killed module's score has to be above an active one's to take its place
    hold_steps: int = 40  # a module that changed state keeps it that long, unless the budget shrinks
    probe_share: float = 0.1  # of the budget that is set aside to try killed modules again
    probe_steps: int = 5
    probe_interval: int = 40  # steps between the starts of trials
    stall_steps: int = 50  # without a better loss, after which trials come at once
    stall_tolerance: float = 0.002  # share by which a loss has to be better to count
    killed: str = MERGE  # what becomes of a killed module: see module_costs

    def __post_init__(self) -> None:
        _one_of("budget", self.budget, BUDGETS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("killed", self.killed, KILLED)
        for name in ("active_fraction", "probe_share", "stall_tolerance"):
            _between(name, getattr(self, name), 0.0, 1.0)
        _between("smoothing", self.smoothing, 0.0, 0.999)
        _between("margin", self.margin, 0.0, math.inf)
        for name in ("interval", "probe_steps", "probe_interval", "stall_steps"):
            _between(name, getattr(self, name), 1, math.inf)
        for name in ("warmup_steps", "anneal_steps", "hold_steps"):
            _between(name, getattr(self, name), 0, math.inf)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BadRequest(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def _between(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        choice = f"{least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
        raise BadRequest(f"{name} is {value}; choose {choice}")
