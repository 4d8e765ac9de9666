"""DLoRA in one process, for tests, and the unsplit yardstick in which modules die at the same steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.data.sequences import IGNORE, Sequences, batch_indices
from isthmus.split.dlora.module_selector import ModuleSelector
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.lora import draw_initial_values, lora_config
from isthmus.split.methods.local import LocalRun, train_locally
from isthmus.split.models.source import ModelFolder
from isthmus.split.training.loss import nll
from isthmus.split.training.optim import Stepper
from tests.split.jobs import random_text
from tests.split.tiny_models import VOCABULARY

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = TrainingConfig.of(
    cut_layer=1, steps=8, batch_size=4, sequence_length=16, learning_rate=5e-3, precision="float32", rank=4,
    warmup_steps=3, max_gradient_norm=0.5, weight_decay=0.01, validation_fraction=0, codec="none", micro_batches=1,
    target_modules=ALL, method="dlora",
)  # fmt: skip

Trained = Callable[[int, str], bool]  # step, module -> whether it trains at it


def text(seed: int, count: int = 40) -> Sequences:
    return random_text(seed, count, 16, VOCABULARY)


def padded_text(seed: int, count: int = 40) -> Sequences:
    """Sequences with a prompt, of which nothing is predicted, and padding of different lengths."""
    made = text(seed, count)
    generator = torch.Generator().manual_seed(seed)
    for row in made.labels:
        row[: int(torch.randint(1, 5, (), generator=generator))] = IGNORE
        row[int(torch.randint(7, 15, (), generator=generator)) :] = IGNORE
    return made


def dlora_run(
    folder: Path, config: TrainingConfig, texts: Sequence[Sequences], **settings: Any
) -> tuple[LocalRun, dict[str, list[float]]]:
    """And the losses of each device's steps."""
    if "checkpoints" in settings:
        settings["resume"] = True
    losses: dict[str, list[float]] = {f"d{number}": [] for number in range(len(texts))}

    def tell(event: Event) -> None:
        if event.HasField("step"):
            losses[event.step.devices[0]].append(event.step.loss)

    run = train_locally(ModelFolder(folder), config, [(one, None) for one in texts], tell=tell, **settings)
    return run, losses


def scripted(monkeypatch: pytest.MonkeyPatch, trained: Trained) -> None:
    """What trains when is what the test says, and not what the controller says."""

    def decide(self: ModuleSelector, step: int) -> frozenset[int]:
        return frozenset(module.number for module in self._layout.modules if trained(step, module.name))

    monkeypatch.setattr(ModuleSelector, "decide", decide)


def unsplit_run(
    folder: Path, config: TrainingConfig, sequences: Sequences, trained: Trained = lambda step, name: True
) -> tuple[list[float], dict[str, Tensor]]:
    """Plain peft: modules that do not train at a step are frozen or, with `killed` drop, have no part in it."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, lora_config(config, base.config)).eval()
    named = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    draw_initial_values(named.items(), config.seed)
    layers = {name: layer for name, layer in named.items() if isinstance(layer, LoraLayer)}
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): value
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    stepper, losses = Stepper(parameters, config), []
    for step in range(config.steps):
        for name, layer in layers.items():
            for end in ("lora_A.weight", "lora_B.weight"):
                parameters[f"{name}.{end}"].requires_grad_(trained(step, name))
            dropped = config.dlora.killed == "drop" and not trained(step, name)
            layer.scaling["default"] = 0.0 if dropped else config.lora.alpha / config.lora.rank
        rows = batch_indices(len(sequences), config.batch_size, step, config.seed)
        total, tokens = nll(model(input_ids=sequences.input_ids[rows]).logits, sequences.labels[rows])
        (total / tokens).backward()
        stepper.step(step, stepper.gradient_norm_squared())
        losses.append(float(total.detach()) / tokens)
    adapter = {name: value.detach() for name, value in parameters.items()}
    if config.dlora.killed == "drop":
        for name in layers:
            if not trained(config.steps - 1, name):
                adapter[f"{name}.lora_B.weight"] = torch.zeros_like(adapter[f"{name}.lora_B.weight"])
    return losses, dict(sorted(adapter.items()))


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.allclose(value, right[name], rtol=0, atol=tolerance), name
