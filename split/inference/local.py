"""A model that generates in this process: all spans are here, or it is one. And who drafts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from isthmus.split.errors import BadRequest
from isthmus.split.inference.chain import LocalHolder, Span
from isthmus.split.inference.drafters import Drafter, Lookup, ModelDrafter
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.exits import ExitRule
from isthmus.split.lora.served import LoraAdapter
from isthmus.split.models.source import ModelFolder, TensorSource, open_model
from isthmus.split.runtime.choose import TORCH, RuntimeChoice, make_runtime, pick_runtime

NONE, LOOKUP, EARLY = "none", "lookup", "early"  # what drafts can come from, beside a model


async def local_engine(
    source: TensorSource,
    *,
    cuts: Sequence[int] = (),
    context: int | None = None,
    sequences: int = 8,
    queue: int = 64,
    chunk: int = 256,
    choice: RuntimeChoice = RuntimeChoice(TORCH),
    draft: str = NONE,
    exits: ExitRule | None = None,
    adapters: Sequence[LoraAdapter] = (),
) -> Engine:
    """Make an engine in this process, which is not started yet.

    cuts: rising numbers of blocks at which the model is cut into spans. context: the most tokens of a sequence; None:
    what the model was made for, at most 4096. draft: as for `make_drafter`.
    """
    layers = source.config.num_hidden_layers
    bounds = [0, *cuts, layers]
    if any(low >= high for low, high in pairwise(bounds)):
        raise BadRequest(f"cuts {', '.join(map(str, cuts))} are not rising places inside {layers} blocks")
    tokens = context_of(source, context)
    choice = replace(choice, runtime=pick_runtime(source, 0, choice))  # measured once, for all spans and the head
    if draft == EARLY and not cuts:
        raise BadRequest(f"draft {EARLY}: say after how many blocks")
    holders = []
    for first, last in pairwise(bounds):
        room = 2 * sequences if draft == EARLY and not first else sequences
        runtime = make_runtime(source, first, last, choice, sequences=room, tokens=tokens, adapters=adapters)
        holders.append(LocalHolder("here", runtime))
    spans = [Span(first, last, source.config.hidden_size, chunk=chunk) for first, last in pairwise(bounds)]
    for span, holder in zip(spans, holders, strict=True):
        await span.add(holder)
    ends = Ends(source, choice)
    drafter = make_drafter(draft, source, ends, choice, holders[0], context=tokens, sequences=sequences)
    return Engine(
        ends, spans, context=tokens, sequences=sequences, queue=queue, chunk=chunk, drafter=drafter, exits=exits
    )


def make_drafter(
    draft: str,
    source: TensorSource,
    ends: Ends,
    choice: RuntimeChoice,
    first: LocalHolder | None,
    *,
    context: int,
    sequences: int,
) -> Drafter | None:
    """Make the drafter that a user names; None for NONE.

    draft: NONE; LOOKUP; EARLY, the first blocks with the model's own head; or the name of a model. first: the holder of
    the first blocks, if they are in this process, with room for twice as many sequences. choice: how a draft model is
    computed. context: the most tokens of a sequence.

    Raises BadRequest for a model with another tokenizer and for EARLY without `first`; BadModelFolder.
    """
    if draft == NONE:
        return None
    if draft == LOOKUP:
        return Lookup()
    if draft == EARLY:
        if first is None:
            raise BadRequest(f"draft {EARLY}: the first blocks have to be where the text is")
        return ModelDrafter(ends, first, context=context, first_sequence=sequences, adapters=True)
    model = open_draft_model(draft, source)
    tokens = min(context, context_of(model, None))
    runtime = make_runtime(model, 0, model.config.num_hidden_layers, choice, sequences=sequences, tokens=tokens)
    return ModelDrafter(Ends(model, choice), LocalHolder("drafts", runtime), context=tokens)


def open_draft_model(name: str, like: TensorSource) -> ModelFolder:
    """Open a draft model. Raises BadRequest if its tokenizer is not that of the model `like`, BadModelFolder."""
    model = open_model(name)
    if model.tokenizer().get_vocab() != like.tokenizer().get_vocab():
        raise BadRequest(f"draft {name}: its tokenizer is not the model's, so it cannot draft for it")
    return model


def context_of(source: TensorSource, asked: int | None) -> int:
    """The tokens of a sequence: as asked, or up to 4096. Raises BadRequest for more than the model was made for."""
    most = int(getattr(source.config, "max_position_embeddings", 0) or 4096)
    if asked is None:
        return min(most, 4096)
    if not 1 < asked <= most:
        raise BadRequest(f"a context of {asked} tokens: this model takes 2 to {most}")
    return asked
