"""A model that generates in this process: all spans are here, or it is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from split.adapters.served import LoraAdapter
from split.errors import BadRequest
from split.generation.chain import LocalHolder, Span
from split.generation.ends import Ends
from split.generation.engine import Engine
from split.models.source import TensorSource
from split.runtime.choose import TORCH, RuntimeChoice, make_runtime, pick_runtime


async def local_engine(
    source: TensorSource,
    *,
    cuts: Sequence[int] = (),
    context: int | None = None,
    sequences: int = 8,
    queue: int = 64,
    chunk: int = 256,
    choice: RuntimeChoice = RuntimeChoice(TORCH),
    adapters: Sequence[LoraAdapter] = (),
) -> Engine:
    """Not yet started. cuts: rising numbers of blocks at which the model is cut into spans.

    context: most tokens of a sequence; None: what the model was made for, at most 4096.
    """
    layers = source.config.num_hidden_layers
    bounds = [0, *cuts, layers]
    if any(low >= high for low, high in pairwise(bounds)):
        raise BadRequest(f"cuts {', '.join(map(str, cuts))} are not rising places inside {layers} blocks")
    tokens = context_of(source, context)
    choice = replace(choice, runtime=pick_runtime(source, 0, choice))  # measured once, for all spans and the head
    spans = []
    for first, last in pairwise(bounds):
        runtime = make_runtime(source, first, last, choice, sequences=sequences, tokens=tokens, adapters=adapters)
        span = Span(first, last, source.config.hidden_size, chunk=chunk)
        await span.add(LocalHolder("here", runtime))
        spans.append(span)
    ends = Ends(source, choice)
    return Engine(ends, spans, context=tokens, sequences=sequences, queue=queue, chunk=chunk)


def context_of(source: TensorSource, asked: int | None) -> int:
    """Raises BadRequest for more than the model was made for."""
    most = int(getattr(source.config, "max_position_embeddings", 0) or 4096)
    if asked is None:
        return min(most, 4096)
    if not 1 < asked <= most:
        raise BadRequest(f"a context of {asked} tokens: this model takes 2 to {most}")
    return asked
