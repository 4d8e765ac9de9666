"""The commands and the arithmetic of the benchmarks of decoding and of deaths. Nothing is timed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.failover import Death, summarise
from benchmarks.generate import ratios
from benchmarks.llama_cpp import bench, write_gguf
from benchmarks.plan import chains, errors
from benchmarks.serving import StreamedAnswer
from isthmus.split.errors import BadData, BadRequest
from isthmus.split.inference.serving import check_spans, parse_stages
from tests.benchmark import run_benchmark
from tests.split.tiny_models import make_model


@pytest.mark.parametrize("name", ["generate", "failover", "early_exit", "plan"])
def test_a_benchmark_says_what_it_does(name: str) -> None:
    status, out, _ = run_benchmark(name, "--help")
    assert status == 0
    assert f"python -m benchmarks.{name}" in out
    assert "--json" in out


def test_a_model_that_is_not_there_is_one_line() -> None:
    status, out, _ = run_benchmark("failover", "--model", "/nowhere")
    assert status == 1
    assert "no model folder at /nowhere" in out


def test_ratios_are_of_the_same_round_and_only_of_what_was_measured() -> None:
    measured = {
        "transformers": [{"decode": 10.0}, {"decode": 20.0}, {"decode": 10.0}],
        "one process": [
            {"decode": 30.0, "requests_16": 90.0},
            {"decode": 80.0, "requests_16": 400.0},
            {"decode": 20.0, "requests_16": 80.0},
        ],
        "two, loopback": [{"decode": 18.0, "hop_overhead_ms": 2.0, "requests_4": 40.0}],
        "one process beside two, loopback": [{"decode": 20.0, "requests_4": 50.0}],
        "drafts, slow, temperature 0, none": [{"decode": 10.0, "tokens_per_round_trip": 1.0}],
        "drafts, slow, temperature 0, early": [{"decode": 25.0, "tokens_per_round_trip": 3.0}],
        "drafts, slow, temperature 0.8, early": [{"decode": 15.0, "tokens_per_round_trip": 2.0}],
    }
    assert ratios(measured) == {
        "one_process_over_transformers": 3.0,
        "two_processes_over_one": 0.9,
        "two_processes_over_one_4_requests": 0.8,
        "hop_overhead_ms": 2.0,
        "sixteen_requests_over_one": 4.0,
        "tokens_per_round_trip": 3.0,
        "drafts_over_none": 2.5,
    }


def test_early_exits_are_held_against_the_full_model(tmp_path: Path) -> None:
    path = tmp_path / "early.json"
    options = ["--cuts", "2", "--thresholds", "1,0", "--prompts", "2", "--json", str(path)]
    status, out, err = run_benchmark("early_exit", *options)
    assert status == 0, out + err
    never, always = json.loads(path.read_text())["points"]
    assert (never["share"], never["agreement"]) == (0.0, 1.0)
    assert always["share"] == 1.0
    assert 0.2 < always["agreement"] == always["of_early"] < 1.0


def test_deaths_are_summed_and_pauses_are_medians() -> None:
    deaths = [
        Death("device", "standby", 5, 0.1, 0.05, 30, 0),
        Death("actor", "standby", 9, 0.3, 0.05, 20, 1),
        Death("device", "cold", 5, 4.0, 3.0, 10, 0),
    ]
    told = summarise(deaths, [0.02])
    assert told["mismatched_answers"] == 1
    assert told["tokens_replayed"] == 60
    assert told["pause_ms_standby"] == pytest.approx(200)
    assert told["pause_ms_cold"] == 4000
    assert told["pause_ms_undisturbed"] == 20


def test_a_predictions_error_is_that_of_its_own_start() -> None:
    runs = {
        "one": [{"predicted": 110.0, "measured": 100.0}, {"predicted": 100.0, "measured": 200.0}, {"measured": 1.0}],
        "two": [{"predicted": 80.0, "measured": 100.0}],
        "three": [{"measured": 5.0}],
    }
    told = errors(runs)
    assert told["prediction_errors"] == {"one": pytest.approx(0.3), "two": pytest.approx(0.2)}
    assert told["prediction_error"] == pytest.approx(0.2)


def test_chains_are_whole_models() -> None:
    named = chains(["1gbit,1ms"], 6)
    assert named["two, 1gbit,1ms"] == "far-0:0-3,cloud:3-6"
    for stages in named.values():
        check_spans(parse_stages(stages), 6)


def test_a_gap_counts_from_the_question_on() -> None:
    assert StreamedAnswer(times=[3.0, 3.5, 4.0]).longest_gap == 3.0
    assert StreamedAnswer(times=[0.5, 3.5]).longest_gap == 3.0
    assert StreamedAnswer().longest_gap == 0.0


def test_what_llama_cpp_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadData, match=r"no llama-bench in .*: scripts/build_llama_cpp.sh builds it"):
        bench(tmp_path, tmp_path / "model.gguf", 1)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadRequest, match="pip install gguf"):
        write_gguf(make_model(tmp_path / "llama", "llama"), tmp_path / "model.gguf")
