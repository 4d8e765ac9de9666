"""Split training is unsplit training: the same losses and the same adapter as plain peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.split.job.config import TrainingConfig
from tests.split.jobs import random_text, split_run, unsplit_run
from tests.split.tiny_models import ARCHITECTURES, VOCABULARY, make_model

CONFIG = TrainingConfig.of(
    cut_layer=1, steps=20, batch_size=4, sequence_length=16, learning_rate=5e-3, precision="float32", rank=4,
    warmup_steps=3, max_gradient_norm=0.5, weight_decay=0.01, aggregate_every=5, validation_fraction=0, codec="none",
    micro_batches=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=4)


def _texts(count: int) -> list:
    return [random_text(seed, 40, 16, VOCABULARY) for seed in range(count)]


def _trained(adapter: dict) -> bool:
    """B starts at zero."""
    return all(float(value.abs().max()) > 1e-3 for name, value in adapter.items() if "lora_B" in name)


def _assert_same(left: dict, right: dict, tolerance: float) -> None:
    assert list(left) == list(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("labels", ["device", "server"])
def test_one_device_reproduces_unsplit_peft(tmp_path: Path, architecture: str, labels: str) -> None:
    folder = make_model(tmp_path, architecture, layers=3, tied=architecture == "gpt2")
    config = CONFIG.but(labels=labels)
    losses, adapter = unsplit_run(folder, config, _texts(1))
    run = split_run(folder, config, _texts(1))
    assert _trained(adapter)
    assert run.outcome.losses == pytest.approx(losses, rel=1e-5)
    _assert_same(run.adapter, adapter, 1e-5)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_every_cut_trains_alike(llama: Path, cut: int) -> None:
    config = CONFIG.but(cut_layer=cut)
    losses, adapter = unsplit_run(llama, config, _texts(1))
    run = split_run(llama, config, _texts(1))
    assert run.outcome.losses == pytest.approx(losses, rel=1e-5)
    _assert_same(run.adapter, adapter, 1e-5)


@pytest.mark.parametrize("labels", ["device", "server"])
def test_three_devices_with_sgd_and_aggregation_every_step_equal_training_on_the_joined_batch(
    llama: Path, labels: str
) -> None:
    config = CONFIG.but(
        labels=labels,
        optimizer="sgd",
        learning_rate=0.5,
        weight_decay=0.0,
        max_gradient_norm=0.0,
        aggregate_every=1,
    )
    losses, adapter = unsplit_run(llama, config, _texts(3))
    run = split_run(llama, config, _texts(3))
    assert _trained(adapter)
    assert run.outcome.losses == pytest.approx(losses, rel=1e-5)
    _assert_same(run.adapter, adapter, 1e-5)


def test_labels_at_the_server_train_the_same_adapter_as_labels_on_the_devices(llama: Path) -> None:
    on_device = split_run(llama, CONFIG, _texts(3))
    at_server = split_run(llama, CONFIG.but(labels="server"), _texts(3))
    assert at_server.outcome.losses == pytest.approx(on_device.outcome.losses, rel=1e-5)
    _assert_same(at_server.adapter, on_device.adapter, 1e-5)


@pytest.mark.parametrize("labels", ["device", "server"])
def test_a_resumed_job_ends_where_an_uninterrupted_one_does(llama: Path, tmp_path: Path, labels: str) -> None:
    config = CONFIG.but(steps=20, checkpoint_every=10, labels=labels)
    whole = split_run(llama, config, _texts(2), checkpoints=tmp_path / "whole")
    # A run whose coordinator and devices die after the checkpoint of step 10: only what is on disk goes on.
    kept = tmp_path / "whole"
    for folder in kept.glob("*/step-00000020"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = split_run(llama, config, _texts(2), checkpoints=kept, resume=True)
    assert [event.step.step for event in resumed.events if event.HasField("step")] == list(range(11, 21))
    assert resumed.outcome.losses == whole.outcome.losses
    _assert_same(resumed.adapter, whole.adapter, 0.0)


def test_evaluation_over_the_split_is_of_the_averaged_adapter(llama: Path, tmp_path: Path) -> None:
    held_out = [random_text(50 + i, 6, 16, VOCABULARY) for i in range(2)]
    config = CONFIG.but(validation_fraction=0.1, evaluate_every=10)
    for labels in ("device", "server"):
        run = split_run(llama, config.but(labels=labels), _texts(2), held_out)
        assert list(run.outcome.perplexities) == [0, 10, 20]
        assert _unsplit_perplexity(llama, config, run.adapter, held_out, tmp_path / labels) == pytest.approx(
            run.outcome.perplexities[20], rel=1e-5
        )


def _unsplit_perplexity(folder: Path, config: TrainingConfig, adapter: dict, texts: list, out: Path) -> float:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from isthmus.split.lora.lora import lora_config, save_adapter
    from isthmus.split.training.loss import nll

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_adapter(out, adapter, lora_config(config, base.config), str(folder))
    model = PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        sums = [nll(model(input_ids=text.input_ids).logits, text.labels) for text in texts]
    return float(torch.tensor(sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums)).exp())
