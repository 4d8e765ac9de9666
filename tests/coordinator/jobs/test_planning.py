"""What `serve` says of its plan, from what nodes have told: which blocks lie where, and both predictions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from isthmus.coordinator.jobs.planning import StagesPlan, plan_serving
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadRequest
from isthmus.split.inference.serving import CLOUD, ServingConfig, memory_of, parse_stages
from isthmus.split.models.source import ModelFolder, open_model
from tests.split.tiny_models import make_model

LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return open_model(str(make_model(tmp_path_factory.mktemp("m"), "llama", layers=LAYERS)))


def profile(rate: float, memory: int = 2**40, trip: float = 0.001, **changes: Any) -> pb.Profile:
    speeds = [pb.Speed(runtime="torch", weights="float32", bytes_per_second=rate)] if rate else []
    link = stage_pb2.Measured(round_trip_seconds=trip)
    return pb.Profile(**({"memory_bytes": memory, "speeds": speeds, "link": link} | changes))


def plan(model: ModelFolder, stages: str, profiles: dict[str, pb.Profile], **settings: Any) -> StagesPlan:
    serving = ServingConfig.of(spans=parse_stages(stages), name="m", **({"context": 64, "sequences": 2} | settings))
    return plan_serving(model, serving, profiles)


def blocks(model: ModelFolder, count: int) -> int:
    """The memory that so many blocks take."""
    return memory_of(model.config, ServingConfig.of(spans=(), name="m", context=64, sequences=2)).held_bytes(0, count)


def ends(model: ModelFolder) -> int:
    return 8 * model.config.vocab_size * model.config.hidden_size


def test_a_slower_split_is_told_with_both_predictions(model: ModelFolder) -> None:
    told = plan(model, "laptop:0-2,cloud:2-6", {CLOUD: profile(1e9), "laptop": profile(1e7, trip=0.1)}).told
    assert told is not None
    assert told.slower
    assert told.single == CLOUD
    assert told.tokens_per_second < 10 < told.single_tokens_per_second
    wanted = f"{told.tokens_per_second:.3g} tokens/s (one answer at a time); cloud alone has the memory and would"
    assert told.message.startswith(f"laptop:0-2,cloud:2-6 is predicted at {wanted}")
    assert told.message.endswith(f"give {told.single_tokens_per_second:.3g}: use --stages cloud:0-6")


def test_a_split_that_is_needed_is_not_called_slow(model: ModelFolder) -> None:
    here = profile(1e9, memory=ends(model) + blocks(model, 4))
    told = plan(model, "laptop:0-2,cloud:2-6", {CLOUD: here, "laptop": profile(1e7, blocks(model, 2))}).told
    assert told is not None
    assert not told.slower
    assert told.message.endswith("; no single node has the memory")


def test_a_split_that_is_faster_than_the_slow_node_with_the_memory_is_not_called_slow(model: ModelFolder) -> None:
    here = profile(1e9, memory=ends(model) + blocks(model, 5))
    told = plan(model, "laptop:0-1,cloud:1-6", {CLOUD: here, "laptop": profile(1e5)}).told
    assert told is not None
    assert not told.slower
    assert "laptop alone has the memory and would give" in told.message
    assert "use --stages" not in told.message


def test_a_device_without_speed_is_no_guess(model: ModelFolder) -> None:
    told = plan(model, "laptop:0-2,cloud:2-6", {CLOUD: profile(1e9), "laptop": profile(0)}).told
    assert told is not None
    assert not told.HasField("tokens_per_second")
    assert not told.slower
    assert told.message.startswith(
        "no prediction for laptop:0-2,cloud:2-6: speed and link of laptop are not known yet; cloud"
    )
    away = plan(model, "gone:0-2,cloud:2-6", {CLOUD: profile(1e9)}).told
    assert away is not None
    assert "speed and link of gone are not known yet" in away.message


def test_a_device_without_a_measured_link_is_no_guess(model: ModelFolder) -> None:
    told = plan(model, "laptop:0-2,cloud:2-6", {CLOUD: profile(1e9), "laptop": profile(1e9, link=None)}).told
    assert told is not None
    assert not told.HasField("tokens_per_second")


def test_a_single_node_of_which_nothing_is_known_is_named(model: ModelFolder) -> None:
    here = profile(1e9, memory=ends(model) + blocks(model, 4))
    nodes = {CLOUD: here, "laptop": profile(1e8), "new": profile(0)}
    nodes["laptop"].memory_bytes = blocks(model, 2)
    told = plan(model, "laptop+new:0-2,cloud:2-6", nodes).told
    assert told is not None
    assert told.message.endswith("; of new alone nothing is known yet")


def test_a_speed_of_other_weights_or_of_a_runtime_that_is_not_used_is_none(model: ModelFolder) -> None:
    quantised = plan(model, "cloud:0-2,cloud:2-6", {CLOUD: profile(1e9)}, weights="int4").told
    assert quantised is not None
    assert not quantised.HasField("tokens_per_second")
    onnx = [pb.Speed(runtime="onnxruntime", weights="float32", bytes_per_second=1e12)]
    both = {CLOUD: profile(1e9, speeds=[*profile(1e9).speeds, *onnx])}
    rates = []
    for runtime in ("auto", "torch"):
        told = plan(model, "cloud:0-2,cloud:2-6", both, runtime=runtime).told
        assert told is not None
        rates.append(told.tokens_per_second)
    assert rates[0] > rates[1]


def test_a_codec_makes_a_slow_link_faster(model: ModelFolder) -> None:
    slow = stage_pb2.Measured(round_trip_seconds=0.001, up_bytes_per_second=1e3, down_bytes_per_second=1e3)
    nodes = {CLOUD: profile(1e9), "laptop": profile(1e9, link=slow)}
    rates = []
    for codec in ("none", "float16"):
        told = plan(model, "laptop:0-2,cloud:2-6", nodes, codec=codec).told
        assert told is not None
        rates.append(told.tokens_per_second)
    assert 1.8 < rates[1] / rates[0] < 2.1


def test_auto_takes_the_coordinator_where_it_has_the_memory(model: ModelFolder) -> None:
    made = plan(model, "auto", {CLOUD: profile(1e9), "laptop": profile(1e9)})
    assert made.spans == parse_stages("cloud:0-6")
    assert made.told is not None
    assert not made.told.slower


def test_auto_keeps_blocks_at_the_coordinator_whatever_a_device_says_of_itself(model: ModelFolder) -> None:
    boaster = profile(1e13, 2**62, trip=0.0)
    found = plan(model, "auto", {CLOUD: profile(1e9), "boaster": boaster})
    assert found.spans == parse_stages("cloud:0-6")
    assert found.told is not None
    assert "boaster alone has the memory and would give" in found.told.message
    beyond = plan(model, "cloud:0-3,boaster:3-6", {CLOUD: profile(1e9), "boaster": profile(1e300)}).told
    assert beyond is not None
    assert "speed and link of boaster are not known yet" in beyond.message


def test_what_auto_chooses_has_room_for_guests_and_adapters(model: ModelFolder) -> None:
    serving = ServingConfig.of(spans=(), name="m", context=64, sequences=2)
    adapter = 10_000
    enough = blocks(model, 6) + 6 * adapter
    nodes = {CLOUD: profile(1e9, ends(model)), "laptop": profile(1e9, enough)}
    planned = plan_serving(model, serving, nodes, adapter).spans
    assert planned == parse_stages("laptop:0-6")
    config = dataclasses.replace(serving, spans=planned)
    assert memory_of(model.config, config).held_bytes(planned[0].first, planned[0].last) + 6 * adapter <= enough
    nodes["laptop"] = profile(1e9, enough - 1)
    with pytest.raises(BadRequest, match="nobody has the memory"):
        plan_serving(model, serving, nodes, adapter)


def test_auto_splits_where_nobody_has_the_memory_alone(model: ModelFolder) -> None:
    nodes = {
        CLOUD: profile(1e9, ends(model) + blocks(model, 3)),
        "slow": profile(1e6, blocks(model, 4)),
        "quick": profile(1e8, blocks(model, 2)),
    }
    made = plan(model, "auto", nodes)
    assert made.spans == parse_stages("cloud:0-3,quick:3-5,slow:5-6")


def test_auto_without_devices_needs_no_measurement(model: ModelFolder) -> None:
    made = plan(model, "auto", {CLOUD: profile(0)})
    assert made == StagesPlan(parse_stages("cloud:0-6"))


def test_one_span_at_the_coordinator_is_not_talked_about(model: ModelFolder) -> None:
    assert plan(model, "cloud:0-6", {CLOUD: profile(1e9)}).told is None
    assert plan(model, "laptop:0-6", {CLOUD: profile(1e9), "laptop": profile(1e9)}).told is not None


def test_memory_that_nobody_has_is_one_line_with_the_figures(model: ModelFolder) -> None:
    nodes = {CLOUD: profile(1e9, ends(model)), "laptop": profile(1e9, 2**10), "new": profile(0)}
    with pytest.raises(BadRequest) as refused:
        plan(model, "auto", nodes)
    line = str(refused.value)
    assert "6 blocks take 0.0 GiB with room for 6 sequences of 64 tokens" in line
    assert "cloud 0.0 GiB, laptop 0.0 GiB, new 1024.0 GiB (not measured yet)" in line
    assert "\n" not in line


def test_an_accelerators_memory_counts_where_blocks_lie_there(model: ModelFolder) -> None:
    nodes = {CLOUD: profile(1e9, ends(model)), "gpu": profile(1e9, accelerator_bytes=blocks(model, 5))}
    with pytest.raises(BadRequest, match="nobody has the memory"):
        plan(model, "auto", nodes)
