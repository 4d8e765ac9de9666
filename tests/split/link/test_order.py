"""The order of a training session: every frame comes once, in its turn, and no device is further ahead than planned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.coding import Plan
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.order import Order

CONFIG = TrainingConfig.of(steps=4, batch_size=4, aggregate_every=2, validation_fraction=0.1)
FORWARD, BACKWARD, STEP, AGGREGATE = Phase.FORWARD, Phase.BACKWARD, Phase.STEP, Phase.AGGREGATE

Place = tuple[stage_pb2.Phase, int, int]


def order(config: TrainingConfig = CONFIG, micro_batches: int = 2, depth: int = 2) -> Order:
    made = Order(config, "a")
    made.answered(Frame(Phase.OPEN, plan=Plan(micro_batches, depth)))
    made.admit(0)
    return made


def whole_job(config: TrainingConfig, micro_batches: int) -> Iterator[Place]:
    """In the order of a device that has one micro-batch under way."""
    for step in range(config.steps):
        for number in range(micro_batches):
            yield FORWARD, step, number
            if config.devices.labels == "device":
                yield BACKWARD, step, number
        yield STEP, step, 0
        if config.aggregates_after(step + 1):
            yield AGGREGATE, step, 0


def take(one: Order, place: Place) -> None:
    phase, step, micro_batch = place
    one.take(Frame(phase, step, micro_batch))
    if phase == AGGREGATE:
        one.answered(Frame(AGGREGATE, step))


def refused(one: Order, place: Place) -> str:
    with pytest.raises(BadFrame) as error:
        take(one, place)
    return str(error.value)


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_at_every_place_of_a_job_nothing_else_is_due_to_a_device_that_does_not_go_ahead(
    labels: str, micro_batches: int
) -> None:
    config = CONFIG.but(labels=labels)
    one, places = order(config, micro_batches, depth=1), list(whole_job(config, micro_batches))
    phases = [FORWARD, BACKWARD, STEP, AGGREGATE]
    for due in places:
        for step in range(config.steps + 1):
            for other in [(phase, step, number) for phase in phases for number in range(micro_batches)]:
                if other != due:
                    assert "; due from a is " in refused(one, other), (due, other)
        take(one, due)
    for other in places:
        refused(one, other)


def test_a_device_goes_ahead_as_far_as_its_plan_says_and_no_further() -> None:
    one = order(micro_batches=4, depth=2)
    take(one, (FORWARD, 0, 0))
    take(one, (FORWARD, 0, 1))
    assert refused(one, (FORWARD, 0, 2)).endswith("due from a is BACKWARD of step 0, micro-batch 0")
    take(one, (BACKWARD, 0, 0))
    take(one, (FORWARD, 0, 2))
    refused(one, (FORWARD, 0, 3))


def test_with_overlap_stale_the_next_step_begins_early_but_not_across_an_aggregation() -> None:
    one = order(CONFIG.but(overlap="stale"))
    for place in [(FORWARD, 0, 0), (FORWARD, 0, 1), (BACKWARD, 0, 0)]:
        take(one, place)
    refused(one, (FORWARD, 1, 0))
    for place in [(BACKWARD, 0, 1), (FORWARD, 1, 0), (FORWARD, 1, 1), (STEP, 0, 0), (BACKWARD, 1, 0), (BACKWARD, 1, 1)]:
        take(one, place)
    refused(one, (FORWARD, 2, 0))
    take(one, (STEP, 1, 0))
    one.take(Frame(AGGREGATE, 1))
    assert refused(one, (FORWARD, 2, 0)).endswith("due from a is nothing until AGGREGATE of step 1 is answered")
    one.answered(Frame(AGGREGATE, 1))
    take(one, (FORWARD, 2, 0))


def test_an_evaluation_is_between_steps_where_one_is_due() -> None:
    one = order()
    one.check_evaluation(Frame(Phase.EVALUATE, 0))
    with pytest.raises(BadFrame, match="EVALUATE after step 2, where no evaluation is due"):
        one.check_evaluation(Frame(Phase.EVALUATE, 2))
    take(one, (FORWARD, 0, 0))
    with pytest.raises(BadFrame, match="REPORT after step 0, where no evaluation is due"):
        one.check_evaluation(Frame(Phase.REPORT, 0))


def test_in_dlora_passes_end_by_themselves_and_a_step_that_was_lost_comes_again() -> None:
    one = order(TrainingConfig.of(steps=4, batch_size=4, method="dlora", validation_fraction=0.0))
    take(one, (FORWARD, 0, 0))
    take(one, (FORWARD, 0, 1))
    refused(one, (STEP, 0, 0))
    one.passed()
    refused(one, (STEP, 0, 0))
    one.passed()
    take(one, (STEP, 0, 0))
    assert one.between_steps
    one.repeat_step(0)
    assert not one.between_steps
    refused(one, (FORWARD, 0, 0))
    take(one, (STEP, 0, 0))
    one.end()
    assert one.between_steps
    refused(one, (FORWARD, 1, 0))
