"""Split training in one process, for tests: several devices as threads on LocalLinks, and the unsplit yardstick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.data.sequences import Sequences, batch_indices
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape
from isthmus.split.lora.lora import draw_initial_values, lora_config
from isthmus.split.methods import method_of
from isthmus.split.methods.local import local_trainer, train_locally
from isthmus.split.models.source import ModelFolder
from isthmus.split.plan.cut_mover import CutMover
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.device import DeviceTrainer
from isthmus.split.training.host import JobHost
from isthmus.split.training.hosted_job import HostContext, Outcome
from isthmus.split.training.loss import nll
from isthmus.split.training.method import StageResources


def random_text(seed: int, count: int, length: int, vocabulary: int) -> Sequences:
    ids = torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return Sequences(ids, ids.clone())


@dataclass
class Run:
    """What a split run left."""

    outcome: Outcome
    adapter: dict[str, Tensor]  # names as in the whole model
    events: list[Event]


def device_trainer(
    folder: Path,
    config: TrainingConfig,
    train: Sequences,
    validation: Sequences | None = None,
    shape: Shape | None = None,
    **options: Any,
) -> DeviceTrainer:
    """shape: None: the job's."""
    shape = shape or Shape(config.devices.cut_layer, config.lora.rank)
    return local_trainer(ModelFolder(folder), config, (train, validation), shape, **options)


def job_host(
    folder: Path,
    config: TrainingConfig,
    devices: Sequence[str],
    *,
    shapes: Mapping[str, Shape] | None = None,
    digests: Mapping[int, str] = MappingProxyType({}),
    mover: CutMover | None = None,
    **context: Any,
) -> JobHost:
    """shapes: None: all devices have the job's. context: of HostContext."""
    shapes = shapes or dict.fromkeys(devices, Shape(config.devices.cut_layer, config.lora.rank))
    where = torch.device("cpu")
    resources = StageResources(ModelFolder(folder), config, shapes, where, Ledger(), digests=digests, mover=mover)
    return JobHost(method_of(config).host_steps(resources), HostContext(config, set(devices), **context))


def split_run(
    folder: Path,
    config: TrainingConfig,
    texts: Sequence[Sequences],
    validation: Sequence[Sequences] | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Run:
    """Trains the devices d0, d1, ... on their texts."""
    events: list[Event] = []
    pairs = [(text, validation[i] if validation else None) for i, text in enumerate(texts)]
    run = train_locally(
        ModelFolder(folder),
        config,
        pairs,
        checkpoints=checkpoints,
        resume=resume,
        **options,
        tell=events.append,
    )
    return Run(run.outcome, run.adapter, events)


def unsplit_run(
    folder: Path, config: TrainingConfig, texts: Sequence[Sequences]
) -> tuple[list[float], dict[str, Tensor]]:
    """Plain peft and torch on the joined batches of all texts: losses and adapter, by names in the whole model."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = get_peft_model(base, lora_config(config, base.config))
    model.eval()
    draw_initial_values(
        ((name.removeprefix("base_model.model."), module) for name, module in model.named_modules()), config.seed
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=config.optimizer.learning_rate)
    else:
        optimizer = torch.optim.AdamW(
            parameters, lr=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay
        )
    losses = []
    for step in range(config.steps):
        rows = [batch_indices(len(t.input_ids), config.batch_size, step, config.seed) for t in texts]
        ids = torch.cat([t.input_ids[r] for t, r in zip(texts, rows, strict=True)])
        labels = torch.cat([t.labels[r] for t, r in zip(texts, rows, strict=True)])
        total, tokens = nll(model(input_ids=ids).logits, labels)
        loss = total / tokens
        loss.backward()
        if config.optimizer.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_gradient_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    adapter = {
        name.removeprefix("base_model.model.").replace(".default.", "."): value.detach()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    return losses, dict(sorted(adapter.items()))
