"""The picture of Kill and Revive: its matrix, and that it is a picture."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from isthmus.coordinator.jobs.heat_map import activity, heat_map, responsiveness
from isthmus.split.errors import BadRequest

MODULES = ("0.q", "0.v", "1.q")
DECISIONS = [(0, MODULES), (4, ("0.v", "1.q")), (6, ()), (8, ("1.q",))]


def test_a_row_is_a_module_and_a_column_a_step() -> None:
    expected = [
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(activity(MODULES, DECISIONS, 10), expected)


def test_a_column_of_several_steps_has_the_share_of_them() -> None:
    expected = [[1, 1 / 4, 0], [1, 3 / 4, 0], [1, 1, 1]]  # columns of 4, 4 and 2 steps
    decisions = [(0, MODULES), (5, MODULES[1:]), (7, MODULES[2:])]
    np.testing.assert_allclose(activity(MODULES, decisions, 10, 3), expected)


def test_before_the_first_decision_nothing_trains() -> None:
    np.testing.assert_array_equal(activity(MODULES, [(2, ("0.q",))], 4), [[0, 0, 1, 1], [0] * 4, [0] * 4])


def test_scores_are_the_last_known_ones_over_the_largest() -> None:
    scores = {0: {"0.q": 2.0, "0.v": 1.0}, 2: {"0.q": 1.0, "0.v": 4.0, "1.q": -3.0}}
    expected = [[1.0, 1.0, 0.25, 0.25], [0.5, 0.5, 1.0, 1.0], [0.0] * 4]
    np.testing.assert_allclose(responsiveness(MODULES, scores, 4, 4), expected)
    np.testing.assert_array_equal(responsiveness(MODULES, {3: {"0.q": 0.0}}, 4, 4), np.zeros((3, 4)))


def test_without_modules_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no LoRA modules"):
        heat_map(tmp_path / "map.png", [], [], 10)


@pytest.mark.parametrize(("modules", "steps"), [(3, 10), (42, 1000), (1, 1)])
def test_the_picture_is_a_png_that_grows_with_the_modules(tmp_path: Path, modules: int, steps: int) -> None:
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(modules)]
    path = tmp_path / "map.png"
    heat_map(path, names, [(0, names)], steps, {0: dict.fromkeys(names, 1.0)})
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1100
    assert height == pytest.approx(100 * max(2.0, 0.18 * modules + 1.2), abs=1)
