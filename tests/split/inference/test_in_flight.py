"""How many batches go round: what is measured decides, on a clock that the tests turn themselves."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from isthmus.split.inference.in_flight import InFlight

WEIGHTS, TOKEN = 0.010, 0.002  # seconds of a span: to read its weights, and for each token


def one_machine(spans: int, flying: int, answers: int) -> float:
    """Seconds for a token of each answer, where all spans share the cores."""
    return flying * spans * WEIGHTS + spans * answers * TOKEN


def machines_of_their_own(spans: int, flying: int, answers: int) -> float:
    return spans * (WEIGHTS + answers / flying * TOKEN)


class Chain:
    def __init__(self, spans: int, seconds: Callable[[int, int, int], float], noise: float = 0.0) -> None:
        self.it, self._spans, self._seconds = InFlight(spans), spans, seconds
        self._random, self._noise = random.Random(0), noise
        self.now, self.rounds = 100.0, 0.0
        self.values: list[int] = []

    def work(self, seconds: float, answers: int) -> float:
        """Rounds a second."""
        end, rounds, start = self.now + seconds, 0.0, self.now
        while self.now < end:
            flying = min(self.it.value, answers)
            self.now += self._seconds(self._spans, flying, answers) / flying * self._random.uniform(1, 1 + self._noise)
            rounds += 1 / flying
            self.it.took(answers, round(answers / flying), self.now)
            self.values.append(self.it.value)
        return rounds / (self.now - start)


@pytest.mark.parametrize("spans", [2, 3, 5])
def test_spans_of_one_machine_get_one_batch(spans: int) -> None:
    chain = Chain(spans, one_machine, noise=0.3)
    assert chain.it.value == spans
    chain.work(30, answers=4)
    assert chain.work(60, answers=4) > 0.95 / one_machine(spans, 1, 4) / 1.15  # the noise is 1.15 in the mean


@pytest.mark.parametrize("spans", [2, 3, 5])
def test_spans_on_machines_of_their_own_stay_busy_with_a_batch_each(spans: int) -> None:
    chain = Chain(spans, machines_of_their_own, noise=0.3)
    chain.work(30, answers=30)
    assert chain.it.value == spans
    assert chain.work(60, answers=30) > 0.95 / machines_of_their_own(spans, spans, 30) / 1.15


def test_what_is_no_better_is_hardly_ever_tried() -> None:
    chain = Chain(2, machines_of_their_own)
    chain.work(600, answers=30)
    assert chain.values.count(1) < 0.01 * len(chain.values)


def test_it_follows_when_the_chain_changes() -> None:
    chain = Chain(2, machines_of_their_own)
    chain.work(600, answers=30)
    assert chain.it.value == 2
    chain._seconds = one_machine
    chain.work(300, answers=30)
    assert chain.it.value == 1


@pytest.mark.parametrize("seconds", [one_machine, machines_of_their_own])
def test_times_without_work_and_other_numbers_of_answers_tell_nothing(
    seconds: Callable[[int, int, int], float],
) -> None:
    chain = Chain(2, seconds)
    for _ in range(50):
        chain.work(0.7, answers=30)
        chain.it.broke_off()
        chain.now += 1000
        chain.work(0.3, answers=2)
        chain.work(0.3, answers=1)
    chain.work(10, answers=30)
    assert chain.it.value == (1 if seconds is one_machine else 2)


def test_a_load_that_changes_in_the_middle_of_a_trial_makes_no_number_look_slow() -> None:
    chain = Chain(2, one_machine)
    while not chain.it._best:
        chain.work(0.01, answers=2)
    chain.work(2, answers=16)
    assert chain.it.value == 1


def test_a_chain_of_one_span_has_one_batch() -> None:
    chain = Chain(1, one_machine)
    chain.work(10, answers=4)
    assert set(chain.values) == {1}
