"""What a job's method checks before devices are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.coordinator.jobs.serving import ServingMethod
from isthmus.coordinator.jobs.training import TrainingMethod
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest, NotAllowed
from isthmus.split.inference.serving import ServingConfig, memory_of, parse_stages
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape
from isthmus.split.training.checkpoint import Checkpoint, CheckpointFolder
from tests.split.tiny_models import make_model


def test_a_device_without_the_memory_for_its_blocks_is_refused_with_the_figures(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", layers=4)
    config = ServingConfig.of(
        spans=parse_stages("laptop:0-3,cloud:3-4"), name="m", context=100, sequences=1024
    )  # and 4 guests
    spec = pb.JobSpec(method="serve", model=str(model), devices=["laptop"], serving=config.to_json())
    serving = ServingMethod(spec, tmp_path / "digests.json")
    needed = memory_of(serving.folder.config, serving.config).held_bytes(0, serving.config.spans[0].last)
    assert needed > 3 * 8 * 1024 * 100 * 16  # keys and values alone
    for enough in (needed, 0):  # 0: the device has not said
        serving.check_device("laptop", pb.Profile(memory_bytes=enough))
    with pytest.raises(BadRequest) as refused:
        serving.check_device("laptop", pb.Profile(memory_bytes=needed - 1))
    with pytest.raises(BadRequest):  # blocks lie in the accelerator's memory
        serving.check_device("laptop", pb.Profile(memory_bytes=needed, accelerator_bytes=needed - 1))
    line = str(refused.value)
    gib = f"{needed / 2**30:.1f} GiB"
    assert line.startswith(f"device laptop has {gib} of memory; blocks 0-3 take {gib} with room for 1028 sequences")
    assert "give it fewer blocks" in line
    assert "\n" not in line


PROFILE = pb.Profile(memory_bytes=2**34, training_flops=1e10)


def _training(tmp_path: Path, config: TrainingConfig, *devices: str) -> TrainingMethod:
    model = make_model(tmp_path / "model", "llama", layers=4)
    spec = pb.JobSpec(method="splitlora", model=str(model), devices=devices, training=config.to_json())
    return TrainingMethod(spec, tmp_path / "digests.json")


def test_devices_that_are_alike_are_told_nothing_and_those_that_differ_what_they_have(tmp_path: Path) -> None:
    profiles = {"a": PROFILE, "b": PROFILE}
    alike = _training(tmp_path / "alike", TrainingConfig.of(cut_layer=2), "a", "b")
    assert alike.choose(profiles, 0.0, {}) == {}
    assert alike.shapes == {"a": Shape(2, 8), "b": Shape(2, 8)}
    differ = _training(tmp_path / "differ", TrainingConfig.of(cuts="a=3,1", ranks="b=2,8"), "a", "b")
    told = differ.choose(profiles, 0.0, {})
    assert told["a"] == pb.ShapeChosen(cut=3, rank=8, message="a: cut 3, rank 8")
    task = pb.Task()
    differ.device_task(task, "b")
    assert (task.shape.cut, task.shape.rank) == (1, 2)
    assert differ.weights("a").digest != differ.weights("b").digest
    with pytest.raises(NotAllowed, match="no part with 3 blocks"):
        differ.weights("b", 3)  # its cut does not move


def test_a_resumed_job_keeps_the_cuts_that_it_had(tmp_path: Path) -> None:
    job = _training(tmp_path, TrainingConfig.of(cuts="auto"), "a", "b")
    kept = {"a": Shape(3, 8), "b": Shape(1, 8)}
    job.choose({"a": PROFILE, "b": PROFILE}, 1e10, kept)
    assert job.shapes == kept
    job.moved("b", Shape(2, 8))
    assert job.weights("b").digest == job.weights("a", 2).digest


def _shape_event(device: str, cut: int, rank: int) -> pb.Event:
    return pb.Event(device=device, shape=pb.ShapeChosen(cut=cut, rank=rank, message="why"))


def test_what_was_chosen_is_known_from_a_jobs_events_and_where_cuts_have_moved_since_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    job = _training(tmp_path, TrainingConfig.of(cuts="auto"), "a", "b")
    events = [_shape_event("a", 1, 8), _shape_event("b", 2, 8), pb.Event(log=pb.LogLine()), _shape_event("a", 3, 8)]
    told = {"a": Shape(3, 8), "b": Shape(2, 8)}
    assert job.kept_shapes(tmp_path, events) == told
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save(Checkpoint(10, {}, {}, None, []))  # of devices that are alike
    assert job.kept_shapes(tmp_path, events) == told
    folder.save(Checkpoint(20, {}, {}, None, [], shapes={"a": [1, 8], "b": [2, 8]}))
    assert job.kept_shapes(tmp_path, events) == {"a": Shape(1, 8), "b": Shape(2, 8)}


def test_only_a_device_that_a_resumed_job_had_not_gets_a_new_choice(tmp_path: Path) -> None:
    job = _training(tmp_path, TrainingConfig.of(cuts="auto", ranks="auto"), "a", "b")
    told = job.choose({"a": PROFILE, "b": PROFILE}, 1e10, {"a": Shape(3, 5), "gone": Shape(2, 2)})
    assert job.shapes["a"] == Shape(3, 5)
    assert told["b"].step_seconds > 0


def test_a_training_device_without_the_memory_for_its_share_is_refused_with_the_figures(tmp_path: Path) -> None:
    small = pb.Profile(memory_bytes=2**28, training_flops=1e10)
    for number, config in enumerate(
        [TrainingConfig(), TrainingConfig.of(cuts="auto"), TrainingConfig.of(cuts="watch=2,1")]
    ):
        job = _training(tmp_path / str(number), config, "watch", "laptop")
        with pytest.raises(BadRequest) as refused:
            job.choose({"watch": small, "laptop": PROFILE}, 1e10, {})
        assert str(refused.value).startswith("device watch has 0.2")
        assert "\n" not in str(refused.value)


def test_average_is_not_for_adapters_of_different_ranks(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="choose padding, stacking or svd"):
        _training(tmp_path, TrainingConfig.of(ranks="a=2,8", aggregation="average"), "a", "b")
