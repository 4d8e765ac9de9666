"""How the two APIs write an answer: the fields of a choice, whole or as a chunk of a stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from isthmus.coordinator.gateway.choices import ChoiceDelta, Scored
from isthmus.split.inference.text import Vocabulary, vocabulary_of

_LEAST = -9999.0  # JSON has no infinity


class AnswerFormat(Protocol):
    """The form of one API's answers.

    prefix: of the answer's id. object, chunk: what the API calls a whole answer, and a chunk of one.
    """

    prefix: str
    object: str
    chunk: str

    def whole(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Write a choice of which the delta is everything."""

    def opening(self) -> dict[str, Any] | None:
        """Write a choice's first chunk, before there is any text; None where the API has none."""

    def chunks(self, delta: ChoiceDelta) -> Iterable[dict[str, Any]]: ...


class CompletionFormat:
    prefix, object, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, logprobs: bool) -> None:
        self._vocabulary = vocabulary_of(tokenizer)
        self._logprobs = logprobs

    def whole(self, delta: ChoiceDelta) -> dict[str, Any]:
        told = self._told(delta.tokens) if self._logprobs else None
        return {"text": delta.text, "logprobs": told, "finish_reason": delta.finish}

    def opening(self) -> None:
        return None

    def chunks(self, delta: ChoiceDelta) -> Iterable[dict[str, Any]]:
        return [self.whole(delta)]

    def _told(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        """A prompt's first token has no logprob: null, as OpenAI's."""
        return {
            "tokens": [self._vocabulary.piece(token.id).text for token in tokens],
            "token_logprobs": [token.logprob and finite(token.logprob.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Scored) -> dict[str, float] | None:
        """The chosen token is always among them. Of tokens that look the same, the likeliest counts."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for id, logprob in (*token.logprob.top, (token.id, token.logprob.logprob)):
            top.setdefault(self._vocabulary.piece(id).text, finite(logprob))
        return top


class ChatFormat:
    prefix, object, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, logprobs: bool) -> None:
        self._vocabulary = vocabulary_of(tokenizer)
        self._logprobs = logprobs

    def whole(self, delta: ChoiceDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"message": message, "logprobs": self._told(delta.tokens), "finish_reason": delta.finish}

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunks(self, delta: ChoiceDelta) -> Iterable[dict[str, Any]]:
        """The end is a chunk of its own, as OpenAI's."""
        if delta.text or delta.tokens:
            yield {"delta": {"content": delta.text}, "logprobs": self._told(delta.tokens), "finish_reason": None}
        if delta.finish:
            yield {"delta": {}, "logprobs": None, "finish_reason": delta.finish}

    def _told(self, tokens: Sequence[Scored]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        told = []
        for token in tokens:
            if token.logprob is not None:
                top = [token_body(self._vocabulary, *pair) for pair in token.logprob.top]
                told.append(token_body(self._vocabulary, token.id, token.logprob.logprob) | {"top_logprobs": top})
        return {"content": told, "refusal": None}


def token_body(vocabulary: Vocabulary, id: int, logprob: float) -> dict[str, Any]:
    data = vocabulary.piece(id).data
    return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
