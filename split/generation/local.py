"""A model that generates in this process: all spans are here, or it is one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from split.errors import BadRequest
from split.generation.chain import LocalHolder, Span
from split.generation.ends import Ends
from split.generation.engine import Engine
from split.models.source import TensorSource
from split.models.stage import StageSpec, build_stages
from split.runtime.torch_runtime import TorchRuntime


async def local_engine(
    source: TensorSource,
    *,
    cuts: Sequence[int] = (),
    context: int | None = None,
    sequences: int = 8,
    queue: int = 64,
    device: torch.device | str = "cpu",
    chunk: int = 256,
) -> Engine:
    """Not yet started. cuts: rising numbers of blocks at which the model is cut into spans.

    context: most tokens of a sequence; None: what the model was made for, at most 4096.
    """
    layers = source.config.num_hidden_layers
    bounds = [0, *cuts, layers]
    if any(low >= high for low, high in pairwise(bounds)):
        raise BadRequest(f"cuts {', '.join(map(str, cuts))} are not rising places inside {layers} blocks")
    tokens = context_of(source, context)
    spans = []
    for first, last in pairwise(bounds):
        stage = build_stages(source, [StageSpec(first, last, embeds=False, head=False)], device=device)[0]
        span = Span(first, last, source.config.hidden_size, chunk=chunk)
        await span.add(LocalHolder("here", TorchRuntime(stage, sequences=sequences, tokens=tokens)))
        spans.append(span)
    ends = Ends(source, device=device)
    return Engine(ends, spans, context=tokens, sequences=sequences, queue=queue, chunk=chunk)


def context_of(source: TensorSource, asked: int | None) -> int:
    """Raises BadRequest for more than the model was made for."""
    most = int(getattr(source.config, "max_position_embeddings", 0) or 4096)
    if asked is None:
        return min(most, 4096)
    if not 1 < asked <= most:
        raise BadRequest(f"a context of {asked} tokens: this model takes 2 to {most}")
    return asked
