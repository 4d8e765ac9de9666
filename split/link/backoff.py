"""How long to wait before the next attempt: waits that grow, differ between callers, and have a bound."""

from __future__ import annotations

import random


class Backoff:
    """Exponential back-off with full jitter: each wait is drawn from 0 to a ceiling, which doubles up to `most`.

    Callers that lost the same peer at the same time come back spread over the whole interval (Brooker 2015,
    Exponential Backoff And Jitter). first, most: seconds.
    """

    def __init__(self, first: float, most: float) -> None:
        self._first, self._most = first, most
        self._ceiling = first

    def reset(self) -> None:
        """After an attempt that was of use: the next wait is short again."""
        self._ceiling = self._first

    def wait(self) -> float:
        """Seconds to wait now."""
        seconds = random.uniform(0.0, self._ceiling)
        self._ceiling = min(2 * self._ceiling, self._most)
        return seconds
