"""The benchmarks' commands and arithmetic. Nothing is timed here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.harness import describe, machine, table, write_json
from benchmarks.methods import (
    CENTRALISED,
    Result,
    last_tenths,
    over_centralised,
    read_e2e,
    split_by_food,
    worst_ratio,
    write_rows,
)
from benchmarks.random_llama import write_random_llama
from benchmarks.split_training import LOCAL, ONE, THREE, UNSPLIT, Workload, summarise
from benchmarks.turns import child
from isthmus.split.data.documents import read_documents
from isthmus.split.errors import BadData, IsthmusError
from isthmus.split.job.groups import TextSettings
from isthmus.split.models.source import ModelFolder
from tests.benchmark import run_benchmark


@pytest.mark.parametrize("name", ["split_training", "methods", "heterogeneous"])
def test_a_benchmark_says_what_it_does(name: str) -> None:
    status, out, _ = run_benchmark(name, "--help")
    assert status == 0
    assert f"python -m benchmarks.{name}" in out
    assert "--json" in out


def test_a_missing_e2e_file_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    status, out, _ = run_benchmark("methods", "--data", str(tmp_path / "none.csv"))
    assert status == 1
    assert " ".join(out.split()).startswith("error: no E2E data at")
    assert "--data" in out


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("text,label\nhello,1\n")
    with pytest.raises(BadData, match="no column mr, ref"):
        read_e2e(path)


def _row(food: str | None, number: int) -> dict[str, str]:
    slots = f"name[Place {number}]" + (f", food[{food}]" if food else "")
    return {"mr": slots, "ref": f"sentence {number}"}


def test_devices_differ_by_food_and_share_no_row() -> None:
    foods = ["French", "Fast food", None, "Fast food", "Indian", "Fast food", "French", None]
    rows = [_row(food, number) for number, food in enumerate(foods)]
    parts = split_by_food(rows)
    assert list(parts) == ["fast-food", "french", "others"]
    assert [row["ref"] for row in parts["fast-food"]] == ["sentence 1", "sentence 3", "sentence 5"]
    assert [row["ref"] for row in parts["french"]] == ["sentence 0", "sentence 6"]
    assert [row["ref"] for row in parts["others"]] == ["sentence 2", "sentence 4", "sentence 7"]
    assert split_by_food(rows) == parts


def test_written_rows_are_read_by_a_device_as_prompt_and_completion(tmp_path: Path) -> None:
    rows = [{"mr": 'name["A", B]', "ref": "One,\ntwo."}, {"mr": "name[C]", "ref": "Three."}]
    path = write_rows(tmp_path / "part.csv", rows)
    documents = read_documents(path, TextSettings(prompt_column="mr", completion_column="ref"))
    assert [(document.prompt, document.text) for document in documents] == [(r["mr"], r["ref"]) for r in rows]
    assert read_e2e(path) == rows


def _result(method: str, labels: str, rank: int, perplexity: float, seed: int = 0) -> Result:
    return Result(method, labels, rank, seed, perplexity, 1.0, 10, 1e9, 100, 1.0, 1.0, 2.0, 1.0)


def test_ratios_are_taken_at_the_same_rank_and_seed_and_the_worse_mode_at_rank_8_counts() -> None:
    results = [
        _result(CENTRALISED, "", 1, 20.0),
        _result(CENTRALISED, "", 8, 10.0),
        _result(CENTRALISED, "", 8, 20.0, seed=1),
        _result("splitlora", "device", 1, 30.0),
        _result("splitlora", "device", 8, 10.0),
        _result("splitlora", "device", 8, 22.0, seed=1),
        _result("splitlora", "server", 1, 20.0),
        _result("splitlora", "server", 8, 9.0),
        _result("splitlora", "server", 8, 20.0, seed=1),
    ]
    ratios = over_centralised(results)
    assert ratios["device"] == pytest.approx({1: 1.5, 8: 1.05})
    assert ratios["server"] == pytest.approx({1: 1.0, 8: 0.95})
    assert worst_ratio(ratios) == (pytest.approx(1.05), 8)
    assert worst_ratio({"device": {1: 1.5, 2: 1.2}, "server": {1: 1.0, 2: 1.3}}) == (1.3, 2)


def test_the_last_two_tenths_of_the_losses_are_averaged() -> None:
    assert last_tenths([9.0] * 16 + [3.0, 1.0, 2.0, 0.0]) == (2.0, 1.0)
    assert last_tenths([5.0]) == (5.0, 5.0)


def test_ratios_are_of_turns_beside_each_other() -> None:
    workload = Workload("tiny", "tiny", batch_size=2, sequence_length=10)
    turns = {
        LOCAL: [([1.0, 1.0], [1.0, 1.5]), ([2.0, 2.0], [2.0, 2.0]), ([4.0, 4.0], [4.0, 5.0])],
        ONE: [([1.0], [1.25]), ([2.0], [2.0]), ([4.0], [4.0])],
        THREE: [([1.0], [3.0]), ([2.0], [12.0]), ([4.0], [6.0])],
    }
    result = summarise(workload, turns)
    assert result["tokens_a_device_and_step"] == 20
    assert result["tokens_per_second"] == {UNSPLIT: 10.0, LOCAL: 10.0, ONE: 10.0, THREE: 10.0}
    assert result["split_local_over_unsplit_turns"] == pytest.approx([0.8, 1.0, 8 / 9])
    assert result["split_local_over_unsplit"] == pytest.approx(8 / 9)
    assert result["grpc_one_device_over_unsplit"] == 1.0
    assert result["grpc_three_devices_over_unsplit_turns"] == [1.0, 0.5, 2.0]


def test_a_run_takes_steps_in_its_turns_only_and_its_process_ends_with_it() -> None:
    with child(_count, 10_000) as run:
        first = run.turn(3)
        pid = run.pids[0]
        assert len(first) == 3
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        assert len(run.turn(2)) == 2
    assert not psutil.pid_exists(pid)


def test_a_run_that_ends_before_its_turn_is_over_is_an_error() -> None:
    with child(_count, 3) as run, pytest.raises(IsthmusError, match="ended before its last turn"):
        run.turn(5)


def _count(steps: int, step_done: Callable[[], None]) -> None:
    for _ in range(steps):
        sum(range(100_000))  # long enough for the process to be stopped before its last step
        step_done()


def test_the_large_model_has_the_parameters_and_the_tokenizer_that_are_said(tmp_path: Path) -> None:
    source = ModelFolder(write_random_llama(tmp_path / "llama"))
    assert sum(source.read(name).numel() for name in source.tensor_names()) == pytest.approx(97.5e6, rel=0.01)
    tokenizer = source.tokenizer()
    assert tokenizer.decode(tokenizer("isthmus é")["input_ids"]) == "isthmus é"


def test_a_result_says_on_which_machine(tmp_path: Path) -> None:
    here = machine()
    assert {"processor", "cores", "torch", "load_at_start"} <= here.keys()
    assert here["torch"] in describe(here)
    write_json(tmp_path / "result.json", {"machine": here})
    assert json.loads((tmp_path / "result.json").read_text()) == {"machine": here}


def test_a_table_has_a_row_for_each_result() -> None:
    made = table("title", ("name", "figure"), [("a", 1), ("b", 2.5)])
    assert made.row_count == 2
    assert [column.justify for column in made.columns] == ["left", "right"]
