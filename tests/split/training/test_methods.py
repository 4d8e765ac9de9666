"""The registry of methods knows each that a configuration can name, and a device's daemon allows each by name."""

from __future__ import annotations

from isthmus.client.runner import ALLOWED
from isthmus.split.job.config import METHODS as NAMES
from isthmus.split.job.config import TrainingConfig
from isthmus.split.methods import METHODS, method_of


def test_every_method_that_can_be_named_is_in_the_registry() -> None:
    assert tuple(METHODS) == NAMES
    for name in NAMES:
        assert method_of(TrainingConfig.of(method=name)) is METHODS[name]


def test_a_device_runs_every_method_unless_its_owner_says_something_else() -> None:
    assert set(METHODS) < set(ALLOWED)


def test_a_method_says_which_options_let_out_more_than_it_does_by_itself() -> None:
    dlora = METHODS["dlora"]
    assert dlora.lets_out(TrainingConfig.of(method="dlora")) == ""
    assert "--aggregate" in dlora.lets_out(TrainingConfig.of(method="dlora", aggregate=True))
    assert METHODS["splitlora"].lets_out(TrainingConfig.of()) == ""
