"""Scores of LoRA modules: their responsiveness, smoothed over the steps in which they were active."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

_LEAST_WORTH = 0.1  # of the mean score: what a module without any is taken for when trials are chosen


class ModuleScores:
    """One score for each module that was seen; a killed module's score follows that of the others."""

    def __init__(self, names: Iterable[str]) -> None:
        self._score: dict[str, float] = {}
        self._seen = dict.fromkeys(names, -1)  # the last step at which a module was observed

    def observe(self, step: int, responsiveness: Mapping[str, float], smoothing: float) -> None:
        """Take in the responsiveness of the modules that were active at a step.

        smoothing: the old score's share in the new one. Values that are not finite, and modules that are not known, are
        left out.
        """
        fresh = {
            name: float(value) for name, value in responsiveness.items() if name in self._seen and math.isfinite(value)
        }
        old = {name: self._score[name] for name in fresh if name in self._score and self._seen[name] == step - 1}
        for name, value in fresh.items():
            if name in old:
                self._score[name] = smoothing * old[name] + (1 - smoothing) * value
            else:  # first seen, or back from the dead: what it was says little
                self._score[name] = value
            self._seen[name] = step
        before, after = sum(old.values()), sum(self._score[name] for name in old)
        if before > 0 and after > 0:
            for name in self._score:
                if name not in fresh:
                    self._score[name] *= after / before

    def known(self) -> dict[str, float]:
        """The scores, by module, of those that were seen."""
        return dict(self._score)

    def expected(self, name: str) -> float:
        """A module's score; for one that was never seen, the mean of the others."""
        if name in self._score or not self._score:
            return self._score.get(name, 1.0)
        return sum(self._score.values()) / len(self._score)

    def urgency(self, name: str, step: int) -> float:
        """How much a killed module deserves a trial: the longer unseen and the more responsive, the more.

        A module that did not respond has its turns, too.
        """
        mean = sum(map(abs, self._score.values())) / max(1, len(self._score)) or 1.0
        return (step - self._seen[name]) * (max(0.0, self.expected(name)) + _LEAST_WORTH * mean)

    def state(self) -> dict[str, Any]:
        """The state for `load_state`, as JSON-able values."""
        return {"score": dict(self._score), "seen": dict(self._seen)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._score = {name: float(value) for name, value in state["score"].items()}
        self._seen = {name: int(step) for name, step in state["seen"].items()}
