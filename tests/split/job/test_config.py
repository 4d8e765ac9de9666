"""A job's options: checked once, the same on both sides, and a schedule that both can compute."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.split.errors import BadRequest
from isthmus.split.job.config import TrainingConfig

KILLING = {"method": "dlora", "active_fraction": 0.5}


def test_a_configuration_survives_the_way_to_the_other_side() -> None:
    config = TrainingConfig.of(
        target_modules=("q_proj",),
        learning_rate=3e-4,
        prompt_column="a",
        completion_column="b",
        codec="hidden=klt,uniform,range;down=hadamard,int8",
        error_budget=0.01,
        micro_batches=4,
        overlap="stale",
    )
    assert TrainingConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"labels": "cloud"}, "labels is 'cloud'; choose one of device, server"),
        ({"steps": 0}, "steps is 0; choose 1 or more"),
        ({"rank": 0}, "rank is 0"),
        ({"cut_layer": -1}, "cut_layer is -1; choose 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"optimizer": "adagrad"}, "choose one of adamw, sgd"),
        ({"sequence_length": 1}, "sequence_length 1 leaves nothing to predict"),
        ({"max_gradient_norm": float("nan")}, "max_gradient_norm"),
        ({"overlap": "none"}, "overlap is 'none'; choose one of exact, stale"),
        ({"micro_batches": -1}, "micro_batches is -1; choose 0 or more"),
        ({"micro_batches": 9}, "micro_batches is 9; a batch has 8 sequences"),
        ({"error_budget": 0.0}, "error_budget is 0.0; choose from 0.0005 to 0.1"),
        ({"error_budget": float("nan")}, "error_budget is nan"),
        ({"codec": "zip"}, "no part of a codec is called 'zip'"),
        ({"codec": "up=int8;int4"}, "'int4' has no KEY="),
        ({"method": "dlora", "bytes_per_step": 9}, "cannot be held with killed keep.*choose merge .* or drop"),
        ({"kill_warmup": 5}, "are for method dlora with active_fraction or bytes_per_step"),
        ({"method": "dlora", "kill_interval": 10}, "are for method dlora with active_fraction or bytes_per_step"),
        (KILLING | {"kill_warmup": 0}, "kill_warmup is 0; choose 1 or more"),
        (KILLING | {"kill_warmup": 30, "kill_anneal": 70}, "kill_warmup 30 and kill_anneal 70 leave none of 100 steps"),
        (KILLING | {"kill_anneal": 90}, "kill_warmup 15 and kill_anneal 90 leave none of 100 steps"),
        ({"method": "dlora", "aggregation": "average"}, "method dlora averages only where aggregate asks for it"),
        ({"method": "dlora", "aggregate_every": 5}, "method dlora averages only where aggregate asks for it"),
        ({"method": "dlora", "aggregate": True, "aggregation": "svd"}, "aggregation svd is not for method dlora"),
    ],
)
def test_what_cannot_be_is_refused_with_a_line_that_says_so(change: dict, line: str) -> None:
    with pytest.raises(BadRequest, match=line):
        TrainingConfig.of(**change)


@pytest.mark.parametrize(
    ("steps", "times"), [(2, (1, 0, 10)), (20, (3, 7, 10)), (100, (15, 35, 10)), (300, (30, 100, 10))]
)
def test_kill_and_revive_reaches_its_share_however_short_a_job_is(steps: int, times: tuple[int, int, int]) -> None:
    config = TrainingConfig.of(steps=steps, method="dlora", active_fraction=0.5)
    assert config.kill_times == times
    assert TrainingConfig.from_json(config.to_json()) == config
    assert config.but(steps=300, kill_warmup=40, kill_interval=3).kill_times == (40, 100, 3)


FLAT = {  # as version 0.1 stored a job
    "cut_layer": 2,
    "cuts": "phone=1,2",
    "labels": "device",
    "rank": 16,
    "ranks": "auto",
    "aggregation": "",
    "alpha": 32.0,
    "target_modules": ["q_proj", "v_proj"],
    "steps": 300,
    "batch_size": 4,
    "sequence_length": 64,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "schedule": "linear",
    "warmup_steps": 3,
    "max_gradient_norm": 0.5,
    "seed": 7,
    "precision": "float32",
    "codec": "hadamard,int8",
    "error_budget": 0.01,
    "micro_batches": 2,
    "overlap": "exact",
    "aggregate_every": 10,
    "checkpoint_every": 20,
    "evaluate_every": 5,
    "packing": "padded",
    "text_column": None,
    "prompt_column": "a",
    "completion_column": "b",
    "validation_fraction": 0.2,
    "dlora": False,
    "active_fraction": 1.0,
    "bytes_per_step": 0,
    "kill_warmup": 30,
    "kill_anneal": 100,
    "kill_interval": 10,
    "killed": "keep",
    "aggregate": False,
}


def flat(config: TrainingConfig) -> dict[str, object]:
    """The configuration as version 0.1 would have stored it."""
    values = config.values()
    return {**values, "target_modules": list(values["target_modules"]), "dlora": values.pop("method") == "dlora"}


def test_what_version_0_1_stored_is_the_same_job_now() -> None:
    read = TrainingConfig.from_json(json.dumps(FLAT))
    assert (read.method, read.dlora.kill_warmup, read.lora.target_modules) == ("splitlora", None, ("q_proj", "v_proj"))
    told_of_every_job = {"kill_warmup", "kill_anneal", "kill_interval"}
    stored = {name: value for name, value in FLAT.items() if name not in told_of_every_job}
    assert {name: value for name, value in flat(read).items() if name in stored and name != "method"} == stored
    assert TrainingConfig.from_json(read.to_json()) == read


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dlora"},
        {"method": "dlora", "aggregate": True, "aggregate_every": 5},
        KILLING | {"killed": "merge", "kill_warmup": 12, "kill_anneal": 0, "kill_interval": 4},
        {"method": "dlora", "bytes_per_step": 1000, "killed": "drop"},
    ],
)
def test_what_version_0_1_stored_of_dlora_is_the_same_job_now(changes: dict[str, object]) -> None:
    config = TrainingConfig.of(**changes)
    stored = flat(config)
    assert stored["dlora"] is True
    assert TrainingConfig.from_json(json.dumps(stored)) == config


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"steps": 2, "lora": {"steps": 3}}', "the training configuration has no setting lora.steps"),
        ('{"rank": 2, "lora": {"rank": 3}}', "the training configuration has a setting twice"),
        ('{"lora": {"rank": "8"}}', "rank of the training configuration has the value '8'; it must be int"),
        ('{"learning_rate": 1%s}' % ("0" * 400), "learning_rate of the training configuration"),
        ("[" * 100_000, "nested too deeply"),
        ('{"optimizer": {"optimizer": "sgd"}}', "has no setting optimizer.optimizer"),
    ],
    ids=lambda value: value[:20],
)
def test_json_that_is_no_job_is_one_line(text: str, line: str) -> None:
    with pytest.raises(BadRequest, match=line):
        TrainingConfig.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"steps": "10"}', '{"steps": true}', '{"nonsense": 1}', "null"])
def test_a_configuration_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        TrainingConfig.from_json(text)


@given(
    steps=st.integers(1, 60),
    aggregate=st.integers(1, 20),
    checkpoint=st.integers(1, 30),
    evaluate=st.integers(0, 30),
)
def test_checkpoints_and_evaluations_fall_on_aggregations_and_none_is_left_out(
    steps: int, aggregate: int, checkpoint: int, evaluate: int
) -> None:
    config = TrainingConfig().but(
        steps=steps, aggregate_every=aggregate, checkpoint_every=checkpoint, evaluate_every=evaluate
    )
    done = range(1, steps + 1)
    aggregations = [step for step in done if config.aggregates_after(step)]
    checkpoints = [step for step in done if config.checkpoints_after(step)]
    assert aggregations[-1] == checkpoints[-1] == steps
    assert set(checkpoints) <= set(aggregations)
    assert config.evaluates_after(0)
    assert config.evaluates_after(steps)
    assert all(step in aggregations for step in done if config.evaluates_after(step))
    for passed in range(checkpoint, steps + 1, checkpoint):  # each is at most one aggregation late
        assert any(passed <= step < passed + aggregate or step == steps for step in checkpoints)


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    config = TrainingConfig.of(steps=100, warmup_steps=10, learning_rate=1.0, schedule="cosine")
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.01
    linear = config.but(schedule="linear", warmup_steps=0)
    assert linear.learning_rate_at(50) == pytest.approx(0.5)
    assert config.but(schedule="constant").learning_rate_at(99) == 1.0
