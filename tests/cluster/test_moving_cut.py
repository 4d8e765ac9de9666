"""A device that comes back slower in the middle of a job gives blocks up: over real sockets."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import pairwise

import pytest

from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER
from tests.cluster.house import TINY, House, events_of, events_until, step_reached, succeeded, write_text
from tests.cluster.in_process import InProcessCluster

pytestmark = pytest.mark.cluster

CONFIG = TINY.but(cuts="auto", steps=40, sequence_length=64, aggregate_every=2, learning_rate=1e-3)


@pytest.fixture
def house_of_a_slow_coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """For which it is best that a device has most of the blocks."""
    folder = tmp_path_factory.mktemp("moving")
    texts = {"device": write_text(folder / "device.txt", 0, 60)}
    with InProcessCluster(folder, coordinator_threads=1) as cluster:
        cluster.start_coordinator(arguments=["--slow-down", "4"])
        house = House(cluster, DEFAULT_MODEL_FOLDER, texts)
        house.start("device")
        yield house


def test_a_device_that_comes_back_slower_gives_blocks_up_and_the_loss_does_not_jump(
    house_of_a_slow_coordinator: House,
) -> None:
    house = house_of_a_slow_coordinator
    with house.connect() as connection:
        job = house.submit(connection, CONFIG, ["device"])
        first = events_until(connection, job, lambda event: event.HasField("shape"))
        had = first.shape.cut
        assert had > 1
        reached = step_reached(connection, job, 4)
        house.cluster.kill("device", signal.SIGTERM)
        house.start("device", arguments=["--threads", "1", "--slow-down", "16"])
        second = events_until(connection, job, lambda event: event.HasField("shape"), after=reached.number)
        moved = second.shape
        report = succeeded(connection, job)
        cuts = [event.shape.cut for event in events_of(connection, job, "shape")]
    assert moved.cut < had
    assert moved.message.startswith("after step ")
    assert cuts == sorted(cuts, reverse=True)  # it goes down, and stays there
    assert report["devices"][0]["cut"] == cuts[-1]
    losses = report["losses"]
    assert len(losses) == CONFIG.steps
    step = int(moved.message.split()[2].rstrip(":"))
    usual = max(abs(after - before) for before, after in pairwise(losses[:step]))
    assert abs(losses[step] - losses[step - 1]) < 2 * usual
    assert report["perplexity_after"] < report["perplexity_before"]
