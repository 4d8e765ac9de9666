"""How fast a machine decodes: measured by real decoding, kept, and measured again when something has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.runtime import speed
from isthmus.split.runtime.speed import Speed, Stopped, kept_speeds, kinds, measure_speeds, speed_to_proto, speeds_of


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_WIDE", 128)
    monkeypatch.setattr(speed, "_LEAST", 2**20)
    monkeypatch.setattr(speed, "_cache_bytes", lambda: 0)


def test_every_runtime_is_measured_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "state" / "speed.json"
    assert kept_speeds(path, "cpu", 1) == []
    measured = measure_speeds(path, "cpu", 1)
    assert [(one.runtime, one.weights) for one in measured] == kinds("cpu")
    assert all(one.bytes_per_second > 1e6 and one.block_seconds < 0.1 and one.batch_seconds < 0.1 for one in measured)
    assert kept_speeds(path, "cpu", 1) == measured
    assert measure_speeds(path, "cpu", 1) == measured


def test_what_it_depends_on_is_kept_with_it(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    measure_speeds(path, "cpu", 1)
    assert kept_speeds(path, "cpu", 2) == []
    stored = json.loads(path.read_text())
    stored["of"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(stored))
    assert kept_speeds(path, "cpu", 1) == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"of": 1}', '{"of": {}, "speeds": [{"a": 1}]}'])
def test_a_damaged_file_is_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "speed.json"
    path.write_text(text)
    assert kept_speeds(path, "cpu", 1) == []


def test_who_is_stopped_goes_on_later_from_what_was_complete(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    with pytest.raises(Stopped):
        measure_speeds(path, "cpu", 1, stop=lambda: path.exists())
    (first,) = kept_speeds(path, "cpu", 1)
    assert measure_speeds(path, "cpu", 1)[0] == first


def test_what_is_not_to_be_kept_is_not(tmp_path: Path) -> None:
    assert len(measure_speeds(tmp_path / "speed.json", "cpu", 1, keep=False)) == len(kinds("cpu"))
    assert list(tmp_path.iterdir()) == []


def test_speeds_that_cannot_be_count_as_not_measured() -> None:
    good = Speed("torch", "float32", 1e9, 0.001, 0.0)
    bad = [
        Speed("torch", "float32", *rest)
        for rest in ((0.0, 0.0, 0.0), (float("inf"), 0.0, 0.0), (1e9, -1.0, 0.0), (1e9, 0.0, float("nan")))
    ]
    assert speeds_of(pb.Profile(speeds=map(speed_to_proto, [*bad, good]))) == [good]
    assert speeds_of(pb.Profile()) == []


def test_no_two_matrices_are_alike_for_equal_ones_would_be_read_once() -> None:
    blocks = speed.Blocks(128, 2)
    matrices = [tensor for tensor in map(blocks.read, sorted(blocks.tensor_names())) if tensor.ndim == 2]
    assert len({tensor.numpy().tobytes() for tensor in matrices}) == len(matrices) == 2 * 7
    assert all(tensor.unique().numel() > tensor.numel() // 2 for tensor in matrices)  # nor are they in few bits


def test_a_block_takes_its_weights_and_a_fixed_time() -> None:
    assert Speed("torch", "float32", 1000.0, 0.5, 9.0).seconds(250.0) == 0.75
