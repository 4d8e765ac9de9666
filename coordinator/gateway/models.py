"""A model that is served, and the prompts that it is given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from isthmus.coordinator.gateway.errors import ApiError
from isthmus.coordinator.gateway.schemas import Message
from isthmus.split.inference.engine import Generator


@dataclass(frozen=True)
class ServedModel:
    """A model that is served.

    stop_tokens: ids that end an answer; None: the tokenizer's end token. vocabulary: ids from this on are refused in
    prompts; None: as many as the tokenizer has. adapter: as in `Request`.
    """

    generator: Generator
    tokenizer: PreTrainedTokenizerBase
    created: int = field(default_factory=lambda: int(time.time()))
    owned_by: str = "isthmus"
    stop_tokens: frozenset[int] | None = None
    vocabulary: int | None = None
    adapter: int = 0

    def ends(self) -> frozenset[int]:
        """The ids that end an answer."""
        if self.stop_tokens is not None:
            return self.stop_tokens
        end = self.tokenizer.eos_token_id
        return frozenset([end]) if isinstance(end, int) else frozenset()


async def encode(model: ServedModel, text: str, *, special: bool = True) -> tuple[int, ...]:
    """Encode a text beside the event loop, which generates for others. special: with the tokens that begin a text."""
    ids = await asyncio.to_thread(model.tokenizer.encode, text, add_special_tokens=special, verbose=False)
    return tuple(ids)


async def encode_chat(model: ServedModel, messages: Sequence[Message], fallback: str | None) -> tuple[int, ...]:
    """Encode messages in the model's own template, or in the fallback, with the beginning of the next answer."""
    template = None if model.tokenizer.chat_template else fallback
    if template is None and not model.tokenizer.chat_template:
        raise ApiError(
            400, "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
        )
    try:
        text = await asyncio.to_thread(
            model.tokenizer.apply_chat_template,
            [message.for_template() for message in messages],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = f"the model's chat template refuses these messages: {error}"
        raise ApiError(400, reason, param="messages", code="invalid_value") from None
    return await encode(model, str(text), special=False)  # a template writes special tokens itself


def check_ids(model: ServedModel, ids: Sequence[int]) -> None:
    known = len(model.tokenizer) if model.vocabulary is None else model.vocabulary
    if ids and max(ids) >= known:
        raise ApiError(400, f"prompt: token {max(ids)} is none of the model's {known}", param="prompt")


def answer_length(model: ServedModel, prompt: Sequence[int], asked: int | None, default: int | None, param: str) -> int:
    """Number of tokens that the answer may have.

    asked: by the client; None: not asked. default: where nobody asked, if there is room for it; None: all there is.
    """
    if not prompt:
        raise ApiError(400, f"{param}: is empty; it needs one token at least", param=param)
    context = model.generator.context
    room = context - len(prompt)
    if asked is None:
        asked = max(1, room if default is None else min(default, room))
    if asked > room:
        raise ApiError(
            400,
            f"this model's maximum context length is {context} tokens; you asked for {len(prompt) + asked}: "
            f"{len(prompt)} of the prompt and {asked} of the answer",
            param=param,
            code="context_length_exceeded",
        )
    return asked
