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

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("demo")
    marker = f"ISTHMUS_DEMO_TEST={os.getpid()}"
    name, _, value = marker.partition("=")
    command = [sys.executable, "-m", "coordinator.cli.main", "demo", "--out", str(folder / "out")]
    command += ["--json", str(folder / "report.json"), "--steps", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, name: value})
    assert done.returncode == 0, done.stdout + done.stderr
    written: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return {**written, "_marker": marker, "_printed": done.stdout}


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


def test_no_process_is_left_behind(report: dict[str, Any]) -> None:
    name, _, value = report["_marker"].partition("=")
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(name) == value:
                left.append(process.cmdline())
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    assert not left


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
