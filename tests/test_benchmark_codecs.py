"""The codecs' benchmark: its command, its arithmetic, and the other libraries' ways. Nothing is timed here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.codec_baselines import Buckets, DynamicBlocks, Method, Ours, dynamic_map, others
from benchmarks.codec_bounds import decibels, gaussian_bits, spectrum, water_filling
from benchmarks.codec_streams import Passed, capture
from benchmarks.codecs import codec_names, faster_everywhere, measure
from isthmus.split.codecs import parse
from isthmus.split.data.sequences import batch_indices
from isthmus.split.errors import CodecError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import TRAINING
from isthmus.split.link.ladder import ladder
from tests.benchmark import run_benchmark


def gaussian(rows: int = 1000, width: int = 100, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def error(method: Method, x: Tensor) -> float:
    decoded = method.decode(method.encode(x, range(len(x))), x.shape, range(len(x)))
    assert decoded.shape == x.shape
    assert decoded.dtype == torch.float32
    return float((decoded - x).double().square().mean() / x.double().square().mean())


def test_it_says_what_it_does() -> None:
    """As a user starts it; the other benchmarks' tests start it in this process."""
    command = [sys.executable, "-m", "benchmarks.codecs", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "python -m benchmarks.codecs" in done.stdout
    assert "--json" in done.stdout


def test_a_codec_that_there_is_not_is_one_line(tmp_path: Path) -> None:
    status, out, _ = run_benchmark("codecs", "--codecs", "int8;int5")
    assert status == 1
    assert "no part of a codec is called 'int5'" in out


def test_a_quick_run_writes_figures_of_every_stream_and_a_picture(tmp_path: Path) -> None:
    text, result, picture = tmp_path / "rows.csv", tmp_path / "result.json", tmp_path / "picture.png"
    rows = [f'"bridge {i}, {i * 7919 % 997} boats","It is bridge {i}, with carts and boats a day."' for i in range(60)]
    text.write_text("\n".join(["mr,ref", *rows]) + "\n")
    options = ["--quick", "--codecs", "int8;uniform:step=0.5,klt,zstd", "--data", str(text), "--threads", "1"]
    options += ["--prompt-column", "mr", "--completion-column", "ref", "--json", str(result), "--plot", str(picture)]
    status, out, err = run_benchmark("codecs", *options)
    assert status == 0, out + err
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(result.read_text())
    assert {"machine", "model", "data", "streams", "encode_decode_faster_than_gigabit"} <= written.keys()
    assert (written["model"], written["data"]) == ("default", "rows.csv")
    assert list(written["streams"]) == list(TRAINING)
    for stream, figures in written["streams"].items():
        assert list(figures) == ["int8", "klt,uniform:step=0.5,zstd", *(method.name for method in others())]
        assert figures["int8"]["bits_a_value"] == 8.25
        assert figures["int8"]["reduction"] == pytest.approx(32 / 8.25)
        assert 0 < figures["int8"]["nmse"] < 1e-3
        assert isinstance(figures["int8"]["faster_than_gigabit"], bool)
        assert set(written["sweep"][stream]) >= {"fp8", "hadamard, int2 to int8"}
        assert len(written["bounds"][stream]["gaussian_bits"]) == len(written["bounds"][stream]["nmse_db"])
    assert set(written["encode_decode_faster_than_gigabit"]) <= set(written["streams"]["hidden_up"])


def test_what_passes_is_taken_with_the_keys_of_its_samples() -> None:
    config = TrainingConfig.of(
        steps=3, batch_size=2, sequence_length=16, codec="none", micro_batches=1, validation_fraction=0
    )
    passed = capture("default", None, config, sequences=4)
    assert list(passed) == list(TRAINING)
    for tensors in passed.values():
        assert [each.tensor.shape for each in tensors] == [(2, 16, 256)] * 3
        assert [each.keys for each in tensors] == [batch_indices(4, 2, step, 0) for step in range(3)]
    assert passed["gradients_up"][0].tensor.abs().max() < passed["hidden_up"][0].tensor.abs().max()


def test_by_default_all_that_auto_chooses_from_is_measured() -> None:
    names = codec_names("", quick=False)
    assert set(names) >= {name for stream in TRAINING for name in ladder(stream, 0.005)}
    assert codec_names("int8; hadamard,int4;int8:64", quick=False) == ["int8", "hadamard,int4"]
    with pytest.raises(CodecError):
        codec_names("int8;int5", quick=True)


def test_figures_are_of_the_last_tensors_with_the_state_of_the_first() -> None:
    passed = [Passed(gaussian(8, 16, seed=7).view(1, 8, 16), [0])] * 3
    figures = measure(Ours(parse("delta,int4")), passed, 1, spectrum([passed[0].tensor]))
    assert figures["nmse"] < 1e-4  # the third time, the sample is known
    assert figures["bits_a_value"] == figures["bits_a_value_from_the_first_tensor"]
    assert figures["bytes_a_value"] == figures["bits_a_value"] / 8
    assert figures["gaussian_bits"] == pytest.approx(0.5 * math.log2(1 / figures["nmse"]))
    assert figures["gigabit_seconds"] == pytest.approx(128 * 32 / 1e9)
    exact = measure(Ours(parse("none")), passed, 2, spectrum([passed[0].tensor]))
    assert (exact["nmse"], exact["nmse_db"], exact["water_filling_bits"]) == (0, None, None)


def test_a_codec_is_faster_only_if_it_is_on_every_stream() -> None:
    one, other = {"faster_than_gigabit": True}, {"faster_than_gigabit": False}
    assert faster_everywhere({"a": {"x": one, "y": one}, "b": {"x": one, "y": other}}) == ["x"]


def test_evenly_spaced_buckets_lose_what_is_beyond_three_deviations() -> None:
    """A step of 6/256 deviations has an error of -42 dB; what is clipped of a Gaussian, to the mean of it, adds little.
    Outliers cost far more: they all come back as their mean."""
    x = gaussian()
    assert 1e-5 < error(Buckets("uniform8"), x) < 1e-3
    x[0, :10] = torch.linspace(50, 500, 10)
    assert error(Buckets("uniform8"), x) > 0.05
    assert len(Buckets("uniform8").encode(x, [])) == 8 + 4 * 256 + x.numel()


def test_buckets_at_quantiles_hold_about_equally_many_values() -> None:
    x = gaussian(3000, 100)
    codes = torch.frombuffer(bytearray(Buckets("quantile8").encode(x, [])), dtype=torch.uint8)[8 + 4 * 256 :]
    counts = torch.bincount(codes, minlength=256)
    assert counts.min() > 0.8 * x.numel() / 256
    assert counts.max() < 1.2 * x.numel() / 256
    assert error(Buckets("quantile8"), x) < 2e-3


def test_the_dynamic_map_has_256_values_with_most_places_near_one() -> None:
    levels = dynamic_map()
    assert len(levels.unique()) == 256
    assert (levels[1:] > levels[:-1]).all()
    assert (float(levels[-1]), 0.0 in levels) == (1.0, True)
    assert float(levels[0]) == pytest.approx(-(1 + (0.1 + 0.9 * 63 / 64)) / 2)
    assert int((levels.abs() > 0.1).sum()) == 2 * 64 + 1
    assert float(levels[levels > 0].min()) == pytest.approx(0.55e-6)


def test_dynamic_blocks_are_within_half_a_gap_of_the_map() -> None:
    x = gaussian(50, 100)
    x[0, 0] = 1e4
    method = DynamicBlocks()
    assert len(method.encode(x, [])) == x.numel() + 4 * 2
    decoded = method.decode(method.encode(x, []), x.shape, [])
    largest = torch.cat([x.view(-1)[:4096].abs().max().expand(4096), x.view(-1)[4096:].abs().max().expand(904)])
    widest = (dynamic_map()[1:] - dynamic_map()[:-1]).max() / 2
    assert ((decoded - x).view(-1).abs() <= largest * widest * 1.0001).all()
    assert error(method, gaussian()) < 1e-3
    assert not method.decode(method.encode(torch.zeros(3, 5), []), (3, 5), []).any()


def test_bounds_of_white_and_of_coloured_gaussian_values() -> None:
    assert gaussian_bits(0.25) == 1
    assert decibels(0.01) == pytest.approx(-20)
    white = torch.ones(8, dtype=torch.float64)
    assert water_filling(white, 0.25) == pytest.approx(1)
    half = torch.tensor([2.0, 0.0], dtype=torch.float64)
    assert water_filling(half, 0.25) == pytest.approx(0.5 * gaussian_bits(0.25))
    uneven = torch.tensor([1.9, 0.1], dtype=torch.float64)  # a level of 0.4: the second takes no bits
    assert water_filling(uneven, 0.25) == pytest.approx(0.25 * math.log2(1.9 / 0.4), rel=1e-6)


def test_a_spectrum_is_that_of_the_second_moments() -> None:
    x = gaussian(4000, 4) * torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert spectrum([x[:2000], x[2000:]]).tolist() == pytest.approx([0, 4 / 14, 16 / 14, 36 / 14], rel=0.1, abs=1e-6)
