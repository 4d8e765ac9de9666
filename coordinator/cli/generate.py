"""`isthmus generate` and `isthmus chat`: answers in the terminal, of a served model or of one in this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli.common import Json, console, human_bytes, print_json
from split.errors import BadRequest, IsthmusError, LinkLost

Model = Annotated[str, typer.Option(help="As it is served; with --local a folder in hub format, a hub id, or default.")]
Local = Annotated[bool, typer.Option("--local", help="Load the model here and answer in this process.")]
Url = Annotated[str, typer.Option(help="Of the API, as `isthmus serve` prints it.", envvar="ISTHMUS_URL")]
Key = Annotated[str, typer.Option(help="Of the API.", envvar="ISTHMUS_API_KEY")]
MaxTokens = Annotated[int, typer.Option(help="Of one answer, at most.", min=1)]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the fewest likeliest tokens that have this share.")]
TopK = Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0: all.")]
Seed = Annotated[int | None, typer.Option(help="The same draws again.")]
Runtime = Annotated[str, typer.Option(help="With --local: auto (the faster one here), torch, or onnxruntime.")]
Weights = Annotated[str, typer.Option(help="With --local: float32, or in onnxruntime int8 or int4.")]
Adapter = Annotated[
    str, typer.Option(help="With --local: the folder of a LoRA adapter, which is put beside the model.")
]
Stats = Annotated[bool, typer.Option("--stats", help="Say afterwards what the answer took, by hop.")]
_KEPT = 20  # turns of a conversation that are sent again at most


@dataclass(frozen=True)
class Asking:
    """How to answer."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...] = ()


@dataclass
class Stat:
    """Seconds since the question, and what each hop took: as in `split.generation.engine.Engine.stats`."""

    first_token: float = 0.0
    total: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    hops: list[dict[str, Any]] = field(default_factory=list)


class Here:
    """A model in this process."""

    def __init__(self, model: str, runtime: str, weights: str, adapter: str) -> None:
        """adapter: a folder; empty: none."""
        self._model, self._runtime, self._weights = model, runtime, weights
        self._adapters = [Path(adapter).expanduser()] if adapter else []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Here:
        from split.adapters.folder import AdapterFolder
        from split.adapters.served import LoraAdapter
        from split.generation.local import local_engine
        from split.models.source import end_tokens, open_model
        from split.runtime.choose import RuntimeChoice

        folder = open_model(self._model)
        self._tokenizer = folder.tokenizer()
        self._ends = end_tokens(folder, self._tokenizer)
        choice = RuntimeChoice(self._runtime, self._weights)
        adapters = [LoraAdapter(path.name, AdapterFolder(path), folder.config) for path in self._adapters]
        engine = await local_engine(folder, sequences=1, choice=choice, adapters=adapters)
        self._engine = await self._stack.enter_async_context(engine)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def complete(self, prompt: str, asking: Asking, stat: Stat) -> AsyncIterator[str]:
        async for text in self._answer(self._tokenizer.encode(prompt), asking, stat, continues=True):
            yield text

    async def reply(self, turns: list[dict[str, str]], asking: Asking, stat: Stat) -> AsyncIterator[str]:
        if not self._tokenizer.chat_template:
            raise BadRequest("this model has no chat template; use `isthmus generate --prompt`")
        text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer.encode(str(text), add_special_tokens=False)
        async for part in self._answer(ids, asking, stat, continues=False):
            yield part

    async def _answer(self, ids: list[int], asking: Asking, stat: Stat, *, continues: bool) -> AsyncIterator[str]:
        from split.generation.request import Request, Sampling
        from split.generation.text import TextStream

        sampling = Sampling(asking.temperature, asking.top_p, asking.top_k, asking.seed)
        room = self._engine.context - len(ids)
        length = min(asking.max_tokens, max(1, room))
        request = Request(tuple(ids), length, sampling, stop_tokens=self._ends, adapter=len(self._adapters))
        before = self._engine.stats()
        answer = self._engine.submit(request)
        text = TextStream(self._tokenizer, asking.stop, after=ids if continues else ())
        try:
            async for token in answer:
                yield text.push(token.id)
                if text.stopped:
                    break
            yield text.finish()
        finally:
            answer.cancel()
        timing = answer.timing
        stat.first_token, stat.total, stat.tokens = timing.first_token, timing.total, timing.tokens
        stat.prompt_tokens = timing.prompt_tokens
        stat.hops = _difference(before["hops"], self._engine.stats()["hops"])


class There:
    """A model that is served."""

    def __init__(self, url: str, key: str, model: str) -> None:
        import httpx2

        if not url:
            raise BadRequest("--url is missing: what `isthmus serve` printed; or load the model here with --local")
        self._url, self._model = url.rstrip("/"), model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(600, connect=10))

    async def __aenter__(self) -> There:
        if not self._model:
            served = (await self._get("/models"))["data"]
            self._model = served[0]["id"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def complete(self, prompt: str, asking: Asking, stat: Stat) -> AsyncIterator[str]:
        async for choice in self._stream("/completions", {"prompt": prompt}, asking, stat):
            yield choice.get("text") or ""

    async def reply(self, turns: list[dict[str, str]], asking: Asking, stat: Stat) -> AsyncIterator[str]:
        async for choice in self._stream("/chat/completions", {"messages": turns}, asking, stat):
            yield choice["delta"].get("content") or ""

    async def _stream(
        self, path: str, what: dict[str, Any], asking: Asking, stat: Stat
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
        stat.hops = _difference(before, (await self._get("/stats"))["hops"])

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
    adapter: Adapter = "",
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
    stats: Stats = False,
    json_output: Json = False,
) -> None:
    """Continue a text; tokens appear as they come.

    Example: isthmus generate --local --prompt "Shall I compare thee" --max-tokens 40 --temperature 0 --stats
    """
    asking = Asking(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))

    async def work() -> None:
        stat, whole = Stat(), ""
        async with _where(model, local, url, api_key, runtime, weights, adapter) as where:
            async for text in where.complete(prompt, asking, stat):
                whole += text
                if not json_output:
                    typer.echo(text, nl=False)
        if json_output:
            print_json({"text": whole, "stats": vars(stat)})
            return
        typer.echo()
        if stats:
            _show(stat)

    _run(work())


def chat(
    model: Model = "",
    local: Local = False,
    url: Url = "",
    api_key: Key = "",
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    runtime: Runtime = "auto",
    weights: Weights = "float32",
    adapter: Adapter = "",
    stats: Stats = False,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it.

    Example: isthmus chat --url http://127.0.0.1:8000/v1 --system "Answer in one sentence."
    """
    asking = Asking(max_tokens, temperature, top_p, top_k, seed)

    async def work() -> None:
        first = [{"role": "system", "content": system}] if system else []
        turns: list[dict[str, str]] = []
        async with _where(model, local, url, api_key, runtime, weights, adapter) as where:
            while line := await asyncio.to_thread(_ask):
                turns.append({"role": "user", "content": line})
                stat, whole = Stat(), ""
                async for text in where.reply([*first, *turns[-_KEPT:]], asking, stat):
                    whole += text
                    typer.echo(text, nl=False)
                typer.echo()
                turns.append({"role": "assistant", "content": whole})
                if stats:
                    _show(stat)

    _run(work())


def _ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def _where(model: str, local: bool, url: str, key: str, runtime: str, weights: str, adapter: str) -> Here | There:
    if adapter and not local:
        raise BadRequest("--adapter is for --local; of what is served give the adapter's name as --model")
    return Here(model or "default", runtime, weights, adapter) if local else There(url, key, model)


def _run(work: Any) -> None:
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(130) from None


def _refusal(status: int, body: bytes) -> IsthmusError:
    try:
        line = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        line = f"HTTP status {status}"
    return BadRequest(line) if 400 <= status < 500 else IsthmusError(line)


def _difference(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What came to each hop's figures between two looks at them."""
    known = {(hop["span"], hop["holder"]): hop for hop in before}
    hops = []
    for hop in after:
        old = known.get((hop["span"], hop["holder"]), {})
        sums = {name: value - old.get(name, 0) for name, value in hop.items() if isinstance(value, int | float)}
        hops.append({**hop, **sums, "median_ms_beyond_computing": hop["median_ms_beyond_computing"]})
    return [hop for hop in hops if hop["batches"]]


def _show(stat: Stat) -> None:
    from rich.table import Table

    after = max(stat.total - stat.first_token, 1e-9)
    rate = f", {(stat.tokens - 1) / after:.1f} tokens a second after it" if stat.tokens > 1 else ""
    console.print(
        f"{stat.prompt_tokens} tokens of prompt, {stat.tokens} of answer; first after {stat.first_token:.2f} s{rate}"
    )
    table = Table("blocks", "holder", "batches", "computing", "encoding", "waiting", "sent", "received")
    for hop in stat.hops:
        table.add_row(
            hop["span"],
            hop["holder"],
            str(hop["batches"]),
            f"{hop['computing']:.2f} s",
            f"{hop['coding']:.2f} s",
            f"{max(0.0, hop['seconds'] - hop['computing'] - hop['coding']):.2f} s",
            human_bytes(hop["sent"]),
            human_bytes(hop["received"]),
        )
    console.print(table)
