"""A model that has seen other text first, so that fine-tuning starts from something: all its parameters are trained."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.harness import console
from benchmarks.random_llama import write_random_llama
from isthmus.split.data.documents import Document, read_documents
from isthmus.split.data.sequences import batch_indices, build_sequences
from isthmus.split.data.stdlib_text import training_documents
from isthmus.split.job.groups import TextSettings
from isthmus.split.models.source import open_model
from isthmus.split.training.evaluate import load_model
from isthmus.split.training.loss import nll

_BATCH, _LENGTH, _PEAK, _WARMUP, _SEED = 4, 128, 6e-4, 20, 0


def random_llama(folder: Path) -> Path:
    """97.5 million random parameters, with the default model's tokenizer (its own would cut a row of E2E at its
    prompt: a token a byte)."""
    write_random_llama(folder)
    open_model("default").tokenizer().save_pretrained(folder)
    return folder


def pretrain(model: str, text: Path | None, steps: int, folder: Path) -> Path:
    """The model, in `folder`, after so many steps of 4 x 128 tokens of the text (None: what the default model was
    trained on, Python's documentation). AdamW, cosine down to 0."""
    source = open_model(model)
    tokenizer, data = source.tokenizer(), TextSettings(sequence_length=_LENGTH)
    documents = (
        [Document(each.text, record=True) for each in training_documents()]
        if text is None
        else read_documents(text, data)
    )
    rows = build_sequences(documents, tokenizer, data, keep_last=False)
    whole = load_model(str(source.path), model).train()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=_PEAK)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / _WARMUP, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    for step in track(range(steps), "pretraining", console=console, disable=not console.is_terminal):
        chosen = batch_indices(len(rows), _BATCH, step, _SEED)
        total, tokens = nll(whole(input_ids=rows.input_ids[chosen], use_cache=False).logits, rows.labels[chosen])
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
