"""The arithmetic of the benchmark of devices that differ. Nothing is timed here."""

from __future__ import annotations

import math

import pytest

from benchmarks.heterogeneous import Measured, seconds_to


def test_the_time_to_a_perplexity_is_interpolated_between_evaluations() -> None:
    points = {0: (0.0, math.e**4), 10: (10.0, math.e**3), 20: (30.0, math.e**2)}
    measured = Measured("job", {}, 1.0, 0.0, points, 0.0)
    assert seconds_to(math.e**3.5, measured) == pytest.approx(5)
    assert seconds_to(math.e**3, measured) == pytest.approx(10)
    assert seconds_to(math.e**2.25, measured) == pytest.approx(25)
    assert seconds_to(math.e**2, measured) == pytest.approx(30)
    assert seconds_to(math.e**5, measured) == 0
    assert seconds_to(math.e**1.9, measured) == math.inf
