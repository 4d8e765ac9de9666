"""`isthmus generate` and `isthmus chat`: answers in the terminal, of a served model or of one in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.coordinator.cli.typed import nothing_left_to_the_shell, read_line
from isthmus.split.errors import BadRequest, IsthmusError, LinkLost
from isthmus.split.printable import printable
from isthmus.split.terminal import (
    AnswerOptions,
    AnswerStats,
    ExitThreshold,
    Json,
    MaxTokens,
    Seed,
    Stats,
    Stop,
    Temperature,
    TopK,
    TopP,
    hops_between,
    interruptible,
    show_answer,
    show_stat,
    show_text,
)

Model = Annotated[str, typer.Option(help="As it is served; with --local a folder in hub format, a hub id, or default.")]
Local = Annotated[bool, typer.Option("--local", help="Load the model here and answer in this process.")]
Url = Annotated[
    str,
    typer.Option(
        help="Of the API, as `isthmus serve` prints it. A PEM file in ISTHMUS_CA is trusted beside the system's.",
        envvar="ISTHMUS_URL",
    ),
]
Key = Annotated[str, typer.Option(help="Of the API.", envvar="ISTHMUS_API_KEY")]
Runtime = Annotated[str, typer.Option(help="With --local: auto (the faster one here), torch, or onnxruntime.")]
Weights = Annotated[str, typer.Option(help="With --local: float32, or in onnxruntime int8 or int4.")]
Draft = Annotated[
    str,
    typer.Option(
        help="With --local: who guesses at tokens that are then verified together: none, lookup (the text so far), "
        "early (the first --early-blocks), or a small model with the same tokenizer. Answers stay the same."
    ),
]
EarlyBlocks = Annotated[
    int, typer.Option(help="With --local: blocks that draft, or after which tokens may come early.", min=0)
]
Adapter = Annotated[
    str, typer.Option(help="With --local: the folder of a LoRA adapter, which is put beside the model.")
]
_KEPT = 20  # most turns of a conversation that are sent again


class TooLong(BadRequest):
    """Refuses a conversation that, with its next answer, is longer than the model's context."""


@dataclass(frozen=True)
class Loading:
    """How a model in this process is computed."""

    runtime: str = "auto"
    weights: str = "float32"
    draft: str = "none"
    early_blocks: int = 0
    exit_threshold: str = ""
    adapter: str = ""  # a folder; empty for none


class Here:
    """A model in this process.

    context: most tokens of a prompt and its answer.
    """

    context: int

    def __init__(self, model: str, loading: Loading) -> None:
        self._model, self._loading = model, loading
        self._adapters = [Path(loading.adapter).expanduser()] if loading.adapter else []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Here:
        from isthmus.split.inference.exits import parse_exit
        from isthmus.split.inference.local import EARLY, local_engine
        from isthmus.split.inference.text_generator import TextGenerator
        from isthmus.split.lora.folder import AdapterFolder
        from isthmus.split.lora.served import LoraAdapter
        from isthmus.split.models.source import end_tokens, open_model
        from isthmus.split.runtime.choose import RuntimeChoice

        folder = open_model(self._model)
        tokenizer = folder.tokenizer()
        loading = self._loading
        if (loading.draft == EARLY or loading.exit_threshold) and not loading.early_blocks:
            raise BadRequest("--early-blocks is missing: after how many blocks there are drafts or early tokens")
        engine = await local_engine(
            folder,
            cuts=(loading.early_blocks,) if loading.early_blocks else (),
            sequences=1,
            choice=RuntimeChoice(loading.runtime, loading.weights),
            draft=loading.draft,
            exits=parse_exit(loading.exit_threshold),
            adapters=[LoraAdapter(path.name, AdapterFolder(path), folder.config) for path in self._adapters],
        )
        await self._stack.enter_async_context(engine)
        self._engine = TextGenerator(engine, tokenizer, end_tokens(folder, tokenizer), adapter=len(self._adapters))
        self.context = engine.context
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def complete(self, prompt: str, asking: AnswerOptions, stat: AnswerStats) -> AsyncIterator[str]:
        ids = self._engine.tokenizer.encode(prompt)
        async for text in self._engine.answer(ids, asking, stat, continues=True):
            yield text

    async def reply(self, turns: list[dict[str, str]], asking: AnswerOptions, stat: AnswerStats) -> AsyncIterator[str]:
        tokenizer = self._engine.tokenizer
        if not tokenizer.chat_template:
            raise BadRequest("this model has no chat template; use `isthmus generate --prompt`")
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(str(text), add_special_tokens=False)
        answer = asking.max_tokens or 1
        if len(ids) + answer > self.context:
            raise TooLong(f"{len(ids)} tokens and {answer} of an answer are more than the context of {self.context}")
        async for part in self._engine.answer(ids, asking, stat, continues=False):
            yield part


class There:
    """A model that is served.

    context: as in `Here`; None if the server does not tell.
    """

    context: int | None

    def __init__(self, url: str, key: str, model: str) -> None:
        import httpx2

        if not url:
            raise BadRequest("--url is missing: what `isthmus serve` printed; or load the model here with --local")
        self._url, self._model = url.rstrip("/"), model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        trusted = _trusted(os.environ.get("ISTHMUS_CA", ""))
        self._client = httpx2.AsyncClient(headers=headers, verify=trusted, timeout=httpx2.Timeout(600, connect=10))

    async def __aenter__(self) -> There:
        served = (await self._get("/models"))["data"]
        self._model = self._model or served[0]["id"]
        self.context = next((one.get("max_model_len") for one in served if one["id"] == self._model), None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def complete(self, prompt: str, asking: AnswerOptions, stat: AnswerStats) -> AsyncIterator[str]:
        async for choice in self._stream("/completions", {"prompt": prompt}, asking, stat):
            yield choice.get("text") or ""

    async def reply(self, turns: list[dict[str, str]], asking: AnswerOptions, stat: AnswerStats) -> AsyncIterator[str]:
        async for choice in self._stream("/chat/completions", {"messages": turns}, asking, stat):
            yield choice["delta"].get("content") or ""

    async def _stream(
        self, path: str, what: dict[str, Any], asking: AnswerOptions, stat: AnswerStats
    ) -> AsyncIterator[dict[str, Any]]:
        import httpx2

        body = {
            **what,
            "model": self._model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": asking.max_tokens,
            "temperature": asking.temperature,
            "top_p": asking.top_p,
            "top_k": asking.top_k,
            "seed": asking.seed,
            "stop": list(asking.stop) or None,
        }
        before, started = (await self._get("/stats"))["hops"], time.perf_counter()
        try:
            async with self._client.stream("POST", self._url + path, json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise IsthmusError(event["error"]["message"])
                    if event.get("usage"):
                        stat.tokens = event["usage"]["completion_tokens"]
                        stat.prompt_tokens = event["usage"]["prompt_tokens"]
                    for choice in event["choices"]:
                        stat.first_token = stat.first_token or time.perf_counter() - started
                        yield choice
        except httpx2.HTTPError as error:
            raise LinkLost(f"{self._url} broke off: {error or type(error).__name__}") from None
        stat.total = time.perf_counter() - started
        stat.hops = hops_between(before, (await self._get("/stats"))["hops"])

    async def _get(self, path: str) -> dict[str, Any]:
        import httpx2

        try:
            response = await self._client.get(self._url + path)
        except httpx2.HTTPError as error:
            raise LinkLost(f"{self._url} cannot be reached: {error or type(error).__name__}") from None
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        result: dict[str, Any] = response.json()
        return result


def generate(
    prompt: Annotated[str, typer.Option(help="What the answer continues.")],
    model: Model = "",
    local: Local = False,
    url: Url = "",
    api_key: Key = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    runtime: Runtime = "auto",
    weights: Weights = "float32",
    draft: Draft = "none",
    early_blocks: EarlyBlocks = 0,
    exit_threshold: ExitThreshold = "",
    adapter: Adapter = "",
    stop: Stop = None,
    stats: Stats = False,
    json_output: Json = False,
) -> None:
    """Continue a text; tokens appear as they come.

    Example: isthmus generate --local --prompt "Shall I compare thee" --max-tokens 40 --temperature 0 --stats
    """
    loading = Loading(runtime, weights, draft, early_blocks, exit_threshold, adapter)
    asking = AnswerOptions(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))

    async def work() -> None:
        stat = AnswerStats()
        async with _where(model, local, url, api_key, loading) as where:
            await show_answer(where.complete(prompt, asking, stat), stat, stats=stats, as_json=json_output)

    with interruptible():
        asyncio.run(work())


def chat(
    model: Model = "",
    local: Local = False,
    url: Url = "",
    api_key: Key = "",
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Of one answer, at most; a quarter of the context, or up to half of it.", min=1),
    ] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    runtime: Runtime = "auto",
    weights: Weights = "float32",
    draft: Draft = "none",
    early_blocks: EarlyBlocks = 0,
    exit_threshold: ExitThreshold = "",
    adapter: Adapter = "",
    stats: Stats = False,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it. A long conversation loses its oldest turns.

    Each line is a message. At a terminal, lines that were pasted after the
    end are thrown away, and a line of 4095 bytes or more is refused; by a
    pipe a line may have any length.

    Example: isthmus chat --url http://127.0.0.1:8000/v1 --system "Answer in one sentence."
    """
    loading = Loading(runtime, weights, draft, early_blocks, exit_threshold, adapter)
    first = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    stack = AsyncExitStack()

    async def begin() -> Here | There:
        return await stack.enter_async_context(_where(model, local, url, api_key, loading))

    async def answer(where: Here | There, asking: AnswerOptions) -> None:
        stat, whole = AnswerStats(), ""
        async for text in _reply(where, first, turns, asking, stat):
            whole += text
            show_text(text)
        typer.echo()
        turns.append({"role": "assistant", "content": whole})
        if stats:
            show_stat(stat)

    # Lines are read between the runner's runs, so that Ctrl-C ends that too.
    with interruptible(), nothing_left_to_the_shell(), asyncio.Runner() as runner:
        try:
            where = runner.run(begin())
            if where.context:
                max_tokens = min(max_tokens or where.context // 4, where.context // 2)
            asking = AnswerOptions(max_tokens, temperature, top_p, top_k, seed)
            while line := read_line("> "):
                turns.append({"role": "user", "content": line})
                try:
                    runner.run(answer(where, asking))
                except TooLong as error:
                    typer.echo(printable(str(error)), err=True)
                    turns.pop()
        finally:
            runner.run(stack.aclose())


async def _reply(
    where: Here | There,
    first: list[dict[str, str]],
    turns: list[dict[str, str]],
    asking: AnswerOptions,
    stat: AnswerStats,
) -> AsyncIterator[str]:
    """The answer as it comes.

    first: what comes before the conversation.
    turns: questions and answers alternately; the oldest are taken out when they are too many.

    Raises TooLong for a question that is too long by itself, and then leaves the turns as they are.
    """
    forgotten = max(0, len(turns) - _KEPT + 1) // 2 * 2
    while True:
        try:
            async for text in where.reply([*first, *turns[forgotten:]], asking, stat):
                yield text
            break
        except TooLong:
            forgotten += 2
            if forgotten >= len(turns):
                raise
    del turns[:forgotten]


def _where(model: str, local: bool, url: str, key: str, loading: Loading) -> Here | There:
    if loading.adapter and not local:
        raise BadRequest("--adapter is for --local; of what is served give the adapter's name as --model")
    if not local and loading != Loading():
        raise BadRequest("--runtime, --weights, --draft, --early-blocks and --exit-threshold are for --local")
    return Here(model or "default", loading) if local else There(url, key, model)


def _trusted(file: str) -> ssl.SSLContext:
    """A context that trusts the system's authorities, and those of a PEM file if one is named.

    Raises BadRequest for a file that cannot be used.
    """
    context = ssl.create_default_context()
    if file:
        try:
            context.load_verify_locations(file)
        except OSError as error:
            raise BadRequest(f"ISTHMUS_CA {file}: {error.strerror or error}") from None
    return context


def _refusal(status: int, body: bytes) -> IsthmusError:
    line, code = f"HTTP status {status}", ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(body)["error"]
        line, code = str(told["message"]), told.get("code")
    if code == "context_length_exceeded":
        return TooLong(line)
    return BadRequest(line) if 400 <= status < 500 else IsthmusError(line)
