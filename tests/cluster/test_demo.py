"""`isthmus demo` does the whole job with real processes, reports what is true, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.cluster, pytest.mark.processes]


def run_demo(folder: Path, *arguments: str) -> dict[str, Any]:
    """The report of `isthmus demo`; with what it printed, and what its processes have in their environment."""
    marker = f"ISTHMUS_DEMO_TEST={os.getpid()} {folder}"
    name, _, value = marker.partition("=")
    command = [sys.executable, "-m", "isthmus.coordinator.cli.main", "demo", "--out", str(folder / "out")]
    command += ["--json", str(folder / "report.json"), *arguments]
    environment = {**os.environ, name: value, "COLUMNS": "200"}  # no line is broken
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    written: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return {**written, "_marker": marker, "_printed": done.stdout}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_demo(tmp_path_factory.mktemp("demo"), "--steps", "12")


def test_the_held_out_perplexity_falls_clearly(report: dict[str, Any]) -> None:
    assert report["perplexity_after"] < 0.9 * report["perplexity_before"]


def test_plain_peft_and_transformers_find_the_reported_perplexity(report: dict[str, Any]) -> None:
    base = AutoModelForCausalLM.from_pretrained(report["base_model"])
    tokenizer = AutoTokenizer.from_pretrained(report["base_model"])
    before = _perplexity(base, tokenizer, report)
    after = _perplexity(PeftModel.from_pretrained(base, report["adapter"]), tokenizer, report)
    assert before == pytest.approx(report["perplexity_before"], rel=1e-3)
    assert after == pytest.approx(report["perplexity_after"], rel=1e-3)


def test_each_device_is_accounted_for(report: dict[str, Any]) -> None:
    assert len(report["devices"]) == 3
    assert len(report["validation_files"]) == 3
    for device in report["devices"]:
        assert device["name"] in report["_printed"]
        assert device["bytes_sent"] > 2**20
        assert device["bytes_received"] > 2**20
        assert report["libraries_bytes"] < device["peak_bytes"] < report["whole_model_bytes"]
        assert device["flops"] > 0


def processes_left(report: dict[str, Any]) -> list[list[str]]:
    name, _, value = report["_marker"].partition("=")
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(name) == value:
                left.append(process.cmdline())
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return left


def test_no_process_is_left_behind(report: dict[str, Any]) -> None:
    assert not processes_left(report)


@pytest.mark.exhaustive  # on every change, test_narrow_link has a device on one
def test_each_device_may_have_a_narrow_link_of_its_own(tmp_path: Path) -> None:
    narrow = run_demo(tmp_path, "--link", "50mbit,10ms", "--steps", "10")
    assert narrow["perplexity_after"] < 0.95 * narrow["perplexity_before"]
    assert narrow["link"] == "50 Mbit/s each way, 10 ms there and back"
    assert narrow["training"]["link"]["codec"] == "auto"
    for text in (narrow["link"], "times fewer", "waited"):
        assert text in narrow["_printed"]
    for device in narrow["devices"]:
        codecs = {row["codec"] for row in device["traffic"] if row["kind"] in ("forward", "backward")}
        assert any("uniform" in codec for codec in codecs), codecs
        said = [message for message in narrow["log"] if message.startswith(f"{device['name']}: hidden states by ")]
        assert any(" Mbit/s up and " in message and "micro-batches a step" in message for message in said)
        assert device["reduction"] > 4
        assert 0 < device["link_seconds"] < device["wait_seconds"]
        assert f"{device['reduction']:.1f} times" in narrow["_printed"]
    assert not processes_left(narrow)


@torch.no_grad()
def _perplexity(model: torch.nn.Module, tokenizer: Any, report: dict[str, Any]) -> float:
    """A plain loop, written from the definition and not from the project's code."""
    model.eval()
    length, total, count = report["sequence_length"], 0.0, 0
    for path in report["validation_files"]:
        ids = tokenizer(Path(path).read_text())["input_ids"]
        for start in range(0, len(ids), length):
            window = torch.tensor([ids[start : start + length]])
            if window.shape[1] > 1:
                loss = model(input_ids=window, labels=window).loss
                total, count = total + float(loss) * (window.shape[1] - 1), count + window.shape[1] - 1
    return math.exp(total / count)
