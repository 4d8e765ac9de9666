"""The commands and the arithmetic of the benchmarks of compression and of slow links. Nothing is timed here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.compression import LOSSLESS, PAIRS, Case, Result, reduction_within, summarise
from benchmarks.slow_link import Measured, bound, bytes_a_step
from isthmus.coordinator.emulation import LinkSpec
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import TRAINING, choices
from tests.benchmark import RUNS_APART, run_benchmark, run_benchmark_of_runs


@pytest.mark.parametrize("name", ["compression", "slow_link"])
def test_a_benchmark_says_what_it_does(name: str) -> None:
    status, out, _ = run_benchmark(name, "--help")
    assert status == 0
    assert f"python -m benchmarks.{name}" in out
    assert "--json" in out


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("compression", ["--e2e", "none.csv"], "no e2e data at none.csv: name it with --e2e"),
        ("compression", ["--data", "novels"], "choose from e2e, shakespeare"),
        ("slow_link", ["--data", "none.txt"], "no text at none.txt"),
        ("slow_link", ["--links", "fast"], "fast"),
    ],
)
def test_what_cannot_be_measured_is_one_line(name: str, options: list[str], line: str) -> None:
    status, out, _ = run_benchmark(name, *options)
    assert status == 1
    assert line in " ".join(out.split())


@pytest.mark.parametrize("codec", PAIRS.values())
def test_the_pairs_name_a_codec_for_every_training_stream(codec: str) -> None:
    assert "auto" not in {choices(codec)[stream] for stream in TRAINING}


def _result(name: str, seed: int, perplexity: float, size: float, data: str = "a") -> Result:
    return Result(Case(data, name, name, seed), perplexity, size, {"sent forward": 8.0}, 2.0, 1.0)


def test_changes_are_of_runs_with_the_same_seed() -> None:
    results = [
        _result(LOSSLESS, 0, 10.0, 100),
        _result(LOSSLESS, 1, 20.0, 100),
        _result("small", 0, 10.1, 10),
        _result("small", 1, 20.2, 10),
        _result("tiny", 0, 10.3, 5),
        _result("tiny", 1, 20.2, 5),
    ]
    rows = summarise(results)
    assert rows["a: small"]["change"] == pytest.approx(0.01)
    assert rows["a: small"]["change_standard_error"] == pytest.approx(0, abs=1e-12)
    assert rows["a: small"]["reduction"] == 10
    low, high = math.log(1.03), math.log(1.01)
    assert rows["a: tiny"]["change"] == pytest.approx(math.expm1((low + high) / 2))
    assert rows["a: tiny"]["change_standard_error"] == pytest.approx((low - high) / 2)
    assert reduction_within(rows, 0.005) == 1
    assert reduction_within(rows, 0.011) == 10
    assert reduction_within(rows, 0.021) == 20


def test_a_reduction_counts_where_it_holds_on_all_data() -> None:
    results = [
        *(_result(LOSSLESS, 0, 10.0, 100, data) for data in "ab"),
        _result("small", 0, 10.01, 10, "a"),
        _result("small", 0, 10.04, 20, "b"),
        _result("tiny", 0, 10.04, 5, "a"),
        _result("tiny", 0, 12.0, 5, "b"),
    ]
    assert reduction_within(summarise(results), 0.005) == 5


def _measured(variant: str, seconds: float, sent: float, received: float) -> Measured:
    return Measured(variant, "", seconds, seconds, 1.0, {"sent": sent, "received": received}, 0.0, "")


def test_the_bound_is_what_no_overlap_beats() -> None:
    spec = LinkSpec.parse_short("8mbit,100ms")
    unlimited = _measured("unlimited", 0.3, 0, 0)
    assert bound(_measured("ours", 9, 1e6, 2e6), spec, unlimited) == pytest.approx(2.0)  # 2 MB down at 1 MB a second
    assert bound(_measured("ours", 9, 1e3, 1e3), spec, unlimited) == pytest.approx(0.3)  # computing
    assert bound(_measured("ours", 9, 1e3, 1e3), spec, _measured("unlimited", 0.1, 0, 0)) == pytest.approx(0.2)


def test_bytes_are_of_training_frames_and_from_the_devices_side() -> None:
    rows = [
        {"direction": "received", "kind": "forward", "codec": "a", "payload_bytes": 90, "overhead_bytes": 10},
        {"direction": "received", "kind": "forward", "codec": "b", "payload_bytes": 45, "overhead_bytes": 5},
        {"direction": "sent", "kind": "backward", "codec": "b", "payload_bytes": 30, "overhead_bytes": 0},
        {"direction": "received", "kind": "evaluate", "codec": "c", "payload_bytes": 999, "overhead_bytes": 0},
    ]
    assert bytes_a_step(rows, TrainingConfig.of(steps=10)) == {"sent": 15.0, "received": 3.0}


@RUNS_APART
def test_a_short_compression_run_reports_what_is_asked_for(tmp_path: Path, apart: bool) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of a text that is long enough to train on." for i in range(400)))
    options = ["--data", "shakespeare", "--shakespeare", str(text), "--json", str(tmp_path / "out.json")]
    options += ["--steps", "3", "--seeds", "1", "--batch-size", "2", "--sequence-length", "32", "--held-out", "4"]
    options += ["--codecs", "int8", "--codecs", "mine::hidden=int4;gradients=int8", "--codecs", "stale"]
    status, out, err = run_benchmark_of_runs("compression", *options, apart=apart)
    assert status == 0, out + err
    result = json.loads((tmp_path / "out.json").read_text())
    assert {row["name"] for row in result["rows"].values()} == {"none", "int8", "mine", "stale"}
    assert result["rows"]["shakespeare: int8"]["bits_a_value"]["sent forward"] == pytest.approx(8.25, rel=0.01)
    assert result["bytes_reduction_at_half_percent"] >= 1
    assert result["bytes_reduction_at_two_percent"] >= result["bytes_reduction_at_half_percent"]
