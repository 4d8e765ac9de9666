"""How long a job waits for a device that falls silent while it is connected."""

from __future__ import annotations

from isthmus.split.training.patience import Patience


def steps_until_whole(patience: Patience, device: str) -> int:
    steps = 0
    while patience.of(device) < patience.seconds:
        patience.kept_pace(device)
        steps += 1
    return steps


def test_patience_is_halved_with_every_silence_down_to_a_sixteenth() -> None:
    patience = Patience(160.0)
    seen = []
    for _ in range(6):
        patience.was_silent("b")
        seen.append(patience.of("b"))
    assert seen == [80.0, 40.0, 20.0, 10.0, 10.0, 10.0]
    assert patience.is_least("b")
    assert patience.of("a") == 160.0


def test_patience_is_whole_again_after_steps_in_a_row_and_after_more_each_time() -> None:
    patience = Patience(160.0)
    needed = []
    for _ in range(3):
        patience.was_silent("b")
        needed.append(steps_until_whole(patience, "b"))
    assert needed == [20, 40, 80]


def test_a_silence_in_between_begins_the_count_anew() -> None:
    patience = Patience(160.0)
    patience.was_silent("b")
    for _ in range(19):
        patience.kept_pace("b")
    patience.was_silent("b")
    assert steps_until_whole(patience, "b") == 40


def test_devices_together_cannot_cost_more_than_the_logarithm_of_the_steps() -> None:
    """A device that falls silent as soon as it is waited for in full again."""
    patience, stalled, steps = Patience(300.0), 0.0, 0
    while steps < 10_000:
        stalled += patience.of("b")
        patience.was_silent("b")
        steps += steps_until_whole(patience, "b")
    assert stalled <= 300.0 * 10
