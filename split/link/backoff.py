"""Waits before the next attempt: they grow, differ between callers, and have a bound."""

from __future__ import annotations

import random


class Backoff:
    """Exponential back-off with full jitter: each wait is drawn from 0 to a ceiling that doubles up to `most`.

    Callers that lost the same peer at the same time come back spread over the whole interval (Brooker 2015, Exponential
    Backoff And Jitter).

    first: ceiling of the first wait, in seconds.
    most: ceiling of all waits, in seconds.
    """

    def __init__(self, first: float, most: float) -> None:
        self._first, self._most = first, most
        self._ceiling = first

    def reset(self) -> None:
        """Makes the next wait short again, after an attempt that succeeded."""
        self._ceiling = self._first

    def wait(self) -> float:
        """Draws the next wait, in seconds."""
        seconds = random.uniform(0.0, self._ceiling)
        self._ceiling = min(2 * self._ceiling, self._most)
        return seconds
