"""One coordinator on Ray and three devices for all cluster tests: a start takes many seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from isthmus.coordinator.emulation.local_cluster import LocalCluster
from tests.cluster.house import House, write_text
from tests.split.tiny_models import make_model


@pytest.fixture(scope="session")
def shared_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("cluster")
    model = make_model(folder / "model", "llama", layers=4)
    names = ["d0", "d1", "d2"]
    texts = {name: write_text(folder / f"{name}.txt", i, 30 + 10 * i) for i, name in enumerate(names)}
    with LocalCluster(folder, coordinator_threads=1) as cluster:
        house = House(cluster, model, texts)
        house.start(*names)
        yield house


@pytest.fixture
def house(shared_house: House) -> Iterator[House]:
    """The shared house with all three devices connected and free, whatever the test before did."""
    shared_house.start("d0", "d1", "d2")
    yield shared_house
    shared_house.cancel_all()
