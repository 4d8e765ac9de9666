"""Waits between attempts: growing, drawn anew each time, bounded, and short again after an attempt that was of use."""

from __future__ import annotations

import random

from isthmus.split.link.backoff import Backoff


def test_waits_are_drawn_below_a_ceiling_that_doubles_up_to_a_bound() -> None:
    random.seed(0)
    waits = [[backoff.wait() for _ in range(8)] for backoff in (Backoff(0.5, 4.0) for _ in range(500))]
    ceilings = [0.5, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    for drawn, ceiling in zip(zip(*waits, strict=True), ceilings, strict=True):
        assert min(drawn) < 0.05 * ceiling
        assert 0.95 * ceiling < max(drawn) <= ceiling
        assert abs(sum(drawn) / len(drawn) - ceiling / 2) < 0.05 * ceiling


def test_after_an_attempt_that_was_of_use_the_wait_is_short_again() -> None:
    backoff = Backoff(0.1, 60.0)
    for _ in range(12):
        backoff.wait()
    backoff.reset()
    assert backoff.wait() <= 0.1
