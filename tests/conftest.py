"""What all tests share: one thread of computing, how many examples Hypothesis tries, and what runs side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.examples import EVERYTHING

# Before torch is imported. Models are tiny: a second thread would mostly be waited for. Child processes inherit it.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

settings.register_profile(EVERYTHING, max_examples=100, deadline=None)
settings.register_profile("every-change", max_examples=25, deadline=None)
settings.load_profile("every-change")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Whatever a test sets, the next one computes with one thread."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that no process has it left at the end; real clusters in one process, one by one."""
    for item in items:
        if item.get_closest_marker("processes") is not None:
            item.add_marker(pytest.mark.xdist_group("processes"))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    if item.get_closest_marker("processes") is not None:
        return 0
    return 1 if item.get_closest_marker("long") is not None else 2
