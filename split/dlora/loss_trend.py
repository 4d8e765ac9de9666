"""How a job's loss falls, smoothed: what Kill and Revive reads from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from isthmus.split.dlora.kill_policy import KillPolicy

_QUICK, _SLOW = 0.1, 0.03  # weights of a new loss in the two smoothed ones


class LossTrend:
    """Follows the loss by two moving averages; their difference says how fast it falls."""

    def __init__(self, policy: KillPolicy) -> None:
        self._policy = policy
        self._loss: float | None = None  # smoothed
        self._slow: float | None = None  # smoothed over a longer time
        self._steepest = 0.0  # the largest difference of the two, in the warm-up
        self._best = math.inf
        self._best_step = 0

    def follow(self, step: int, loss: float) -> None:
        """Take in the loss of a step. A loss that is not finite is left out."""
        if not math.isfinite(loss):
            return
        if self._loss is None or self._slow is None:
            self._loss = self._slow = loss
        self._loss += _QUICK * (loss - self._loss)
        self._slow += _SLOW * (loss - self._slow)
        if step < self._policy.warmup_steps or self._steepest == 0:
            self._steepest = max(self._steepest, self._slow - self._loss)
        if self._loss < self._best * (1 - self._policy.stall_tolerance) or math.isinf(self._best):
            self._best, self._best_step = self._loss, step

    def slope(self) -> float | None:
        """How fast the loss falls, as a share of the steepest that it fell; None while that is not known."""
        if self._loss is None or self._slow is None or self._steepest <= 0:
            return None
        return max(0.0, self._slow - self._loss) / self._steepest

    def stalled(self, step: int) -> bool:
        """Whether the loss has not become better for `stall_steps`."""
        return step - self._best_step >= self._policy.stall_steps

    def restart(self, step: int) -> None:
        """Count the steps to a stall anew from this one."""
        self._best_step = step

    def state(self) -> dict[str, Any]:
        """The state for `load_state`, as JSON-able values."""
        return {
            "loss": self._loss,
            "slow": self._slow,
            "steepest": self._steepest,
            "best": None if math.isinf(self._best) else self._best,
            "best_step": self._best_step,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._loss, self._slow = state["loss"], state["slow"]
        self._steepest = float(state["steepest"])
        self._best = math.inf if state["best"] is None else float(state["best"])
        self._best_step = int(state["best_step"])
