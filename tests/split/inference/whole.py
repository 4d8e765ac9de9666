"""What the whole model answers, by plain transformers, and what the engine answers: for tests to compare."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM

from isthmus.split.inference.engine import Answer, Engine
from isthmus.split.inference.request import Request, Token
from tests.split.tiny_models import VOCABULARY, make_model

T = TypeVar("T")


def whole_model(folder: Path) -> Any:
    """Loaded once, as long as its files are the same: nobody changes it."""
    return _loaded(folder, tuple((path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())))


@functools.lru_cache(16)
def _loaded(folder: Path, files: tuple[tuple[str, int], ...]) -> Any:
    return loaded_model(folder)


def loaded_model(folder: Path) -> Any:
    """The caller's own: peft changes the model that it is given."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """What `transformers.generate` adds, EOS or not; computed once."""
    known = _known.setdefault(model, {})
    key = (tuple(prompt), count)
    if key not in known:
        known[key] = _generated(model, *key)
    return list(known[key])


_known: WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], int], list[int]]] = WeakKeyDictionary()


def _generated(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(map(int, output[0, len(prompt) :]))


def prompts(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.randrange(VOCABULARY) for _ in range(length)) for length in lengths]


async def tokens_of(answer: Answer) -> list[Token]:
    return [token async for token in answer]


async def ids_of(answer: Answer) -> list[int]:
    return [token.id async for token in answer]


async def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """All at the same time."""
    return await asyncio.gather(*(ids_of(engine.submit(request)) for request in requests))


def run(make: Callable[[], Awaitable[Engine]], work: Callable[[Engine], Awaitable[T]]) -> T:
    """`work` with an engine that is started for it."""

    async def inside() -> T:
        async with asyncio.timeout(120), await make() as engine:
            return await work(engine)

    return asyncio.run(inside())


def longrope_model(folder: Path, **changes: Any) -> Path:
    """A Phi-3 of which texts beyond 32 tokens have other rotary frequencies."""
    head_size = changes.get("hidden", 32) // 4
    return make_model(
        folder,
        "phi3",
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * (head_size // 2),
            "long_factor": [3.0] * (head_size // 2),
            "original_max_position_embeddings": 32,
        },
        **changes,
    )
