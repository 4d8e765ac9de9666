"""The yardstick: the same adapter trained unsplit, with plain transformers and peft, on all text in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from isthmus.split.data.sequences import Sequences, batch_indices, sequences_of_file
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.lora import draw_initial_values, lora_config, save_adapter
from isthmus.split.models.precision import autocast, pick_device, pick_precision
from isthmus.split.models.source import open_model
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.evaluate import load_model
from isthmus.split.training.loss import nll
from isthmus.split.training.optim import Stepper
from isthmus.split.training.perplexity import perplexity

_PREFIX = "base_model.model."  # what peft puts before the names of the model that it wraps


@dataclass(frozen=True)
class Centralised:
    """What an unsplit run gave. Perplexities are None where nothing was held out."""

    perplexity_before: float | None
    perplexity_after: float | None
    losses: list[float]
    adapter: str
    trainable_parameters: int
    resources: dict[str, Any]


def train_centralised(
    model: str,
    files: Sequence[Path],
    out: Path,
    config: TrainingConfig,
    *,
    tell: Callable[[int, float], None] = lambda step, loss: None,
    device: str = "auto",
) -> Centralised:
    """Trains unsplit: each file stands for one device's text, and a step's batch is the batches of all of them joined.

    A split job with as many devices, plain SGD and an aggregation at every step has exactly these losses.

    out: the folder to write the PEFT adapter to.
    tell: is called with (steps done, mean loss of the step in nats).

    Raises BadRequest, BadData or BadModelFolder for options, files or models that cannot be used, and WrongState where
    the training diverges.
    """
    where = pick_device(device)
    source = open_model(model)
    parts = [sequences_of_file(path, config.text, source.tokenizer()) for path in files]
    lora = lora_config(config, source.config)
    wrapped = (
        get_peft_model(load_model(str(source.path), model), lora).to(where).eval()
    )  # in eval mode there is no dropout, as in a split
    named = [(name.removeprefix(_PREFIX), module) for name, module in wrapped.named_modules()]
    draw_initial_values(named, config.seed)
    trainable = {
        name.removeprefix(_PREFIX).replace(".default.", "."): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    dtype = pick_precision(config.optimizer.precision, where)
    ledger = Ledger()
    stepper = Stepper(trainable, config)
    held_out = [validation for _, validation in parts if validation is not None]
    before = _evaluate(wrapped, held_out, config.batch_size, ledger)
    losses = []
    for step in range(config.steps):
        input_ids, labels = _joined([train for train, _ in parts], config, step)
        with ledger.computing(("step", input_ids.shape)):
            with autocast(dtype, where):
                logits = wrapped(input_ids=input_ids.to(where), use_cache=False).logits
            total, tokens = nll(logits, labels.to(where))
            (total / max(tokens, 1)).backward()
        stepper.step(step, stepper.gradient_norm_squared())
        losses.append(float(total.detach()) / max(tokens, 1))
        tell(step + 1, losses[-1])
    after = _evaluate(wrapped, held_out, config.batch_size, ledger)
    folder = out.expanduser().resolve()
    save_adapter(folder, dict(sorted(trainable.items())), lora, model)
    count = sum(parameter.numel() for parameter in trainable.values())
    return Centralised(before, after, losses, str(folder), count, ledger.summary())


def _joined(texts: Sequence[Sequences], config: TrainingConfig, step: int) -> tuple[Tensor, Tensor]:
    """The batches of all devices for a step, one after the other: inputs and labels, (devices * batch, sequence)."""
    rows = [batch_indices(len(text), config.batch_size, step, config.seed) for text in texts]
    pairs = list(zip(texts, rows, strict=True))
    return torch.cat([text.input_ids[r] for text, r in pairs]), torch.cat([text.labels[r] for text, r in pairs])


@torch.no_grad()
def _evaluate(model: nn.Module, held_out: Sequence[Sequences], batch_size: int, ledger: Ledger) -> float | None:
    if not held_out:
        return None
    where = next(model.parameters()).device
    total, count = 0.0, 0
    for text in held_out:
        for input_ids, labels in zip(text.input_ids.split(batch_size), text.labels.split(batch_size), strict=True):
            with ledger.computing(("evaluate", input_ids.shape)):
                logits = model(input_ids=input_ids.to(where), use_cache=False).logits
                loss, tokens = nll(logits, labels.to(where))
            total, count = total + float(loss), count + tokens
    return perplexity(total, count)
