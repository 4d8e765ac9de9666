"""Kill and Revive in whole trainings: how long they go on, and what the device's log says of a budget."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from isthmus.split.resources.traffic import Traffic
from tests.split.dlora.jobs import CONFIG, dlora_run, text
from tests.split.tiny_models import make_model

SHORT = CONFIG.but(
    steps=40, batch_size=2, rank=2, cut_layer=0, target_modules=("q_proj", "v_proj", "down_proj"), killed="drop"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=3, hidden=16)


def _module_bytes(traffic: Traffic) -> int:
    return sum(size for (_, kind, _), size in traffic.payload_bytes.items() if kind.endswith("ward modules"))


@pytest.mark.parametrize("fraction", [0.2, 0.01])
def test_with_a_small_share_and_no_block_on_the_device_training_reaches_its_last_step(
    llama: Path, fraction: float
) -> None:
    run, told = dlora_run(llama, SHORT.but(active_fraction=fraction), [text(0)])
    every, _ = dlora_run(llama, SHORT, [text(0)])
    assert len(told["d0"]) == SHORT.steps
    assert _module_bytes(run.ledgers["d0"].traffic) < 0.6 * _module_bytes(every.ledgers["d0"].traffic)


def test_bytes_that_all_else_takes_alone_are_told_of(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = SHORT.but(cut_layer=1, steps=8, bytes_per_step=100, kill_warmup=2, kill_anneal=0)
    _, told = dlora_run(llama, config, [text(0)])
    assert len(told["d0"]) == 8  # the device's own block goes on
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("bytes_per_step 100 cannot be held: ")


def test_modules_that_are_kept_save_no_messages_and_the_log_says_so(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = SHORT.but(cut_layer=1, steps=20, active_fraction=0.1)
    kept, _ = dlora_run(llama, config.but(killed="keep"), [text(0)])
    assert "still exchanged" in caplog.text
    caplog.clear()
    dropped, _ = dlora_run(llama, config, [text(0)])
    assert "still exchanged" not in caplog.text
    every, _ = dlora_run(llama, config.but(active_fraction=1.0), [text(0)])
    sizes = [_module_bytes(run.ledgers["d0"].traffic) for run in (kept, dropped, every)]
    assert sizes[0] == sizes[2]
    assert sizes[1] < 0.8 * sizes[2]
