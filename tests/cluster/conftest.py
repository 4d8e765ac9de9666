"""One coordinator and three devices for all cluster tests: in this process, or of processes where a test needs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.coordinator.emulation.local_cluster import LocalCluster
from isthmus.split.runtime.speed import measure_speeds
from tests.cluster.house import House, write_text
from tests.cluster.in_process import InProcessCluster, quick_measurements
from tests.split.tiny_models import make_model

DEVICES = ("d0", "d1", "d2")


def _start(cluster: LocalCluster) -> House:
    folder = cluster.folder
    model = make_model(folder / "model", "llama", layers=4)
    texts = {name: write_text(folder / f"{name}.txt", i, 30 + 10 * i) for i, name in enumerate(DEVICES)}
    house = House(cluster, model, texts)
    house.start(*DEVICES)
    return house


@pytest.fixture(scope="package")
def shared_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """In this process."""
    with InProcessCluster(tmp_path_factory.mktemp("cluster"), coordinator_threads=1) as cluster:
        yield _start(cluster)


@pytest.fixture(scope="package")
def house_of_processes(tmp_path_factory: pytest.TempPathFactory, measured_speeds: Path) -> Iterator[House]:
    """Real processes: Ray with its actors, and a daemon for each device."""
    folder = tmp_path_factory.mktemp("processes")
    for name in ("coordinator", *DEVICES):  # else each takes many seconds of all cores to measure itself
        (folder / name).mkdir(mode=0o700)
        (folder / name / "speed.json").write_bytes(measured_speeds.read_bytes())
    with LocalCluster(folder, coordinator_threads=1) as cluster:
        cluster.start_coordinator(stage_ports=8)  # for a device on a link of its own
        yield _start(cluster)


@pytest.fixture(scope="package")
def measured_speeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a machine with one thread keeps of how fast it decodes."""
    path = tmp_path_factory.mktemp("speeds") / "speed.json"
    with quick_measurements():
        measure_speeds(path, "auto", 1)
    return path


@pytest.fixture
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """A shared house with all three devices connected and free, whatever the test before did."""
    real = request.node.get_closest_marker("processes") is not None
    shared: House = request.getfixturevalue("house_of_processes" if real else "shared_house")
    shared.start(*DEVICES)
    yield shared
    shared.cancel_all()
