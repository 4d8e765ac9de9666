"""Generators to serve in tests: one that computes with a whole model, one that says what it is told to."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import torch
from openai import AsyncOpenAI
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from isthmus.coordinator.gateway import ServedModel, make_app, serve
from isthmus.split.inference.request import Logprob, Request, Timing, Token
from isthmus.split.models.source import open_model

END = 0  # of the default model


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return open_model("default").tokenizer()


def ids_of(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return ids


def sha256_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass
class RecordedAnswer:
    """tokens: what it gives. ended: it has given all. given_up: `cancel` was called."""

    request: Request
    tokens: Callable[[], AsyncIterator[Token]]
    prompt: Callable[[], list[Logprob | None]]
    timing: Timing = field(default_factory=Timing)
    ended: bool = False
    given_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aiter__(self) -> AsyncIterator[Token]:
        async for token in self.tokens():
            yield token
        self.ended = True

    async def prompt_logprobs(self) -> list[Logprob | None]:
        return self.prompt()

    def cancel(self) -> None:
        self.given_up.set()


class WholeModel:
    """Plain transformers, the whole sequence at every token. Greedy, or drawn with a seed."""

    def __init__(self, folder: Path | str, context: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.context, self.capacity = context, 1000
        self.answers: list[RecordedAnswer] = []

    def submit(self, request: Request) -> RecordedAnswer:
        answer = RecordedAnswer(request, lambda: self._generate(request), lambda: self._prompt(request))
        self.answers.append(answer)
        return answer

    async def _generate(self, request: Request) -> AsyncIterator[Token]:
        ids = list(request.prompt)
        draws = torch.Generator().manual_seed(request.sampling.seed or 0)
        for count in range(1, request.max_tokens + 1):
            scores = self._scores(ids)[-1]
            if request.sampling.temperature == 0:
                id = int(scores.argmax())
            else:
                id = int(torch.multinomial((scores / request.sampling.temperature).softmax(-1), 1, generator=draws))
            ids.append(id)
            last = "stop" if id in request.stop_tokens else "length" if count == request.max_tokens else ""
            yield Token(id, self._logprob(scores, id, request.logprobs), last)
            if last:
                return
            await asyncio.sleep(0)

    def _prompt(self, request: Request) -> list[Logprob | None]:
        scores = self._scores(list(request.prompt))
        told = [self._logprob(row, id, request.logprobs) for row, id in zip(scores, request.prompt[1:], strict=False)]
        return [None, *told]

    @torch.no_grad()
    def _scores(self, ids: list[int]) -> torch.Tensor:
        scores: torch.Tensor = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return scores

    def _logprob(self, scores: torch.Tensor, id: int, count: int | None) -> Logprob | None:
        if count is None:
            return None
        top = scores.topk(count)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Logprob(float(scores[id]), tuple(pairs))


class Script:
    """Says the same to every request. after: what happens when all is said; errors are raised at that place."""

    def __init__(
        self,
        ids: Sequence[int],
        *,
        context: int = 64,
        capacity: int = 1000,
        refuse: Exception | None = None,
        after: Callable[[], Any] | None = None,
    ) -> None:
        self.ids = ids
        self.context, self.capacity = context, capacity
        self.refuse = refuse
        self.after = after
        self.answers: list[RecordedAnswer] = []

    def submit(self, request: Request) -> RecordedAnswer:
        if self.refuse is not None:
            raise self.refuse
        answer = RecordedAnswer(request, lambda: self._say(request), lambda: self._prompt(request))
        self.answers.append(answer)
        return answer

    async def _say(self, request: Request) -> AsyncIterator[Token]:
        said = self.ids[: request.max_tokens]
        for count, id in enumerate(said, 1):
            await asyncio.sleep(0)
            ends = not self.after and (count == len(self.ids) or id in request.stop_tokens)
            last = "stop" if ends else "length" if count == request.max_tokens else ""
            logprob = None if request.logprobs is None else Logprob(-float(count), ((id, -float(count)),))
            yield Token(id, logprob, last)
            if last:
                return
        if self.after:
            await self.after()

    def _prompt(self, request: Request) -> list[Logprob | None]:
        return [None, *(Logprob(-1.0, ((id, -1.0),)) for id in request.prompt[1:])]


async def forever() -> None:
    await asyncio.Event().wait()


def saying(text: str, **options: Any) -> Script:
    """A script of a text and the end token."""
    return Script([*ids_of(text), END], **options)


def served_model(generator: Any, **options: Any) -> ServedModel:
    return ServedModel(generator, tokenizer(), created=1700000000, **options)


@asynccontextmanager
async def serving(models: Mapping[str, ServedModel], **options: Any) -> AsyncIterator[str]:
    """The base URL of a real server."""
    server = await serve(make_app(models, **({"key_sha256": None} | options)), "127.0.0.1", 0, grace=1)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        await server.close()


@asynccontextmanager
async def openai_client(generator: Any, key: str = "") -> AsyncIterator[AsyncOpenAI]:
    """The unmodified client, to a server of one model that is called `m`."""
    async with (
        serving({"m": served_model(generator)}, key_sha256=sha256_of(key) if key else None) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key=key or "any", max_retries=0) as client,
    ):
        yield client


async def post(generator: Any, path: str, body: Any, **options: Any) -> httpx2.Response:
    """One request without a socket; a body that is no bytes is sent as JSON, with the model's name."""
    app = make_app({"m": served_model(generator)}, **({"key_sha256": None} | options))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway") as client:
        if isinstance(body, bytes):
            return await client.post(path, content=body)
        return await client.post(path, json={"model": "m"} | body)


def ask(generator: Any, path: str, body: Any, **options: Any) -> httpx2.Response:
    return asyncio.run(post(generator, path, body, **options))
