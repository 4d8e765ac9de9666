"""The OpenAI-compatible HTTP API: its routes, and what a request's parameters mean to the engine."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from isthmus.coordinator.gateway import errors
from isthmus.coordinator.gateway.choices import Choice, ChoiceSet
from isthmus.coordinator.gateway.errors import ApiError
from isthmus.coordinator.gateway.formats import ChatFormat, CompletionFormat
from isthmus.coordinator.gateway.models import ServedModel, answer_length, check_ids, encode, encode_chat
from isthmus.coordinator.gateway.respond import Generated
from isthmus.coordinator.gateway.schemas import ChatRequest, CompletionRequest
from isthmus.split.inference import request as engine
from isthmus.split.inference.text import TextStream

MAX_CHOICES = 128
COMPLETION_TOKENS = 16  # OpenAI's default


def make_app(
    models: Mapping[str, ServedModel],
    *,
    key_sha256: str | None,
    stats: Callable[[], dict[str, Any]] | None = None,
    chat_template: str | None = None,
    max_body: int = 2 * 2**20,
    body_timeout: float = 60.0,
) -> FastAPI:
    """Make the HTTP app.

    models: by the name that clients use; looked up at each request, so that it may change. key_sha256: of the API key,
    in hexadecimal; None lets everybody in. stats: answers /v1/stats. chat_template: for models whose tokenizer has
    none. max_body: bytes. body_timeout: seconds that a client may take to send a body.
    """
    app = FastAPI(title="Isthmus", docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(key_check(key_sha256))])

    def find(name: str) -> ServedModel:
        if name not in models:
            raise ApiError(404, f"the model {name[:100]!r} does not exist", param="model", code="model_not_found")
        return models[name]

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    if stats is not None:

        @v1.get("/stats")
        async def figures() -> dict[str, Any]:
            return stats()

    @v1.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_body(name, model) for name, model in models.items()]}

    @v1.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return model_body(name, find(name))

    @v1.post("/completions")
    async def completions(request: Request) -> Response:
        asked = CompletionRequest.model_validate_json(await read_body(request, max_body, body_timeout))
        model = find(asked.model)
        shape = CompletionFormat(model.tokenizer, asked.logprobs is not None)
        return respond(asked, await completion_job(model, asked, client_of(request, asked)), shape)

    @v1.post("/chat/completions")
    async def chat(request: Request) -> Response:
        asked = ChatRequest.model_validate_json(await read_body(request, max_body, body_timeout))
        model = find(asked.model)
        shape = ChatFormat(model.tokenizer, bool(asked.logprobs))
        return respond(asked, await chat_job(model, asked, client_of(request, asked), chat_template), shape)

    app.include_router(v1)
    return app


def model_body(name: str, model: ServedModel) -> dict[str, Any]:
    """Describe a model as the API does.

    max_model_len, the tokens of a prompt and its answer, is not OpenAI's, but other servers tell it by this name, too.
    """
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        "max_model_len": model.generator.context,
    }


def key_check(key_sha256: str | None) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()  # latin-1: as headers are decoded
        if key_sha256 is not None and not (scheme.lower() == "bearer" and hmac.compare_digest(given, key_sha256)):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer …`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """Read the whole body, of which never more than `limit` bytes are in memory. timeout: seconds."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        late = f"the body did not come within {timeout:g} s"
        raise ApiError(408, late, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the body is not complete") from None
    return bytes(body)


def respond(asked: CompletionRequest | ChatRequest, job: ChoiceSet, shape: CompletionFormat | ChatFormat) -> Response:
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options: only for a stream", param="stream_options")
    return Generated(job, shape, asked.model, stream=bool(asked.stream), include_usage=asked.include_usage)


def client_of(request: Request, asked: CompletionRequest | ChatRequest) -> str:
    """Name the client whose turn it is when requests have to wait: by address, and by the `user` that it names."""
    address = request.client.host if request.client else ""
    return f"{address}/{asked.user}" if isinstance(asked.user, str) else address


async def completion_job(model: ServedModel, asked: CompletionRequest, client: str) -> ChoiceSet:
    n = asked.n or 1
    if asked.best_of not in (None, n):
        raise ApiError(400, "best_of: only the same as n", param="best_of", code="unsupported_parameter")
    prompts = prompts_of(asked)
    alone = n == len(prompts) == 1
    check_count(model, len(prompts) * n)
    choices: list[Choice] = []
    for prompt in prompts:
        ids = await encode(model, prompt) if isinstance(prompt, str) else tuple(prompt)
        check_ids(model, ids)
        length = answer_length(model, ids, asked.max_tokens, COMPLETION_TOKENS, "prompt")
        echo = None
        if asked.echo:
            echo = prompt if isinstance(prompt, str) else text_of(model, ids)
        for request in requests_of(model, asked, client, ids, length, asked.logprobs, bool(asked.echo), alone):
            choices.append(Choice(request, asked.stops, echo))  # noqa: PERF401
    return ChoiceSet(model, choices, n)


async def chat_job(model: ServedModel, asked: ChatRequest, client: str, chat_template: str | None) -> ChoiceSet:
    n = asked.n or 1
    check_count(model, n)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs", code="invalid_value")
    ids = await encode_chat(model, asked.messages, chat_template)
    length = answer_length(model, ids, asked.max_completion_tokens or asked.max_tokens, None, "messages")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    requests = requests_of(model, asked, client, ids, length, logprobs, False, n == 1)
    return ChoiceSet(model, [Choice(request, asked.stops, continues=False) for request in requests], n)


def check_count(model: ServedModel, choices: int) -> None:
    most = min(MAX_CHOICES, model.generator.capacity)
    if choices > most:
        raise ApiError(400, f"n: {choices} answers are more than the {most} that one request may ask for", param="n")


def prompts_of(asked: CompletionRequest) -> list[str | list[int]]:
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt: is empty", param="prompt", code="invalid_value")
    if isinstance(prompt[0], int):
        return [[id for id in prompt if isinstance(id, int)]]
    return [part for part in prompt if not isinstance(part, int)]


def text_of(model: ServedModel, ids: tuple[int, ...]) -> str:
    """Decode token ids, without half a character at the end, which comes with the answer."""
    text = TextStream(model.tokenizer)
    return "".join(text.push(id) for id in ids)


def requests_of(
    model: ServedModel,
    asked: CompletionRequest | ChatRequest,
    client: str,
    prompt: tuple[int, ...],
    length: int,
    logprobs: int | None,
    echo: bool,
    alone: bool,
) -> list[engine.Request]:
    """Make the n requests for one prompt; with a seed, each has its own."""
    return [
        engine.Request(
            prompt=prompt,
            max_tokens=length,
            sampling=engine.Sampling(
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                top_k=max(0, asked.top_k or 0),
                seed=None if asked.seed is None else asked.seed + i,
            ),
            logprobs=logprobs,
            prompt_logprobs=echo and logprobs is not None,
            stop_tokens=model.ends(),
            adapter=model.adapter,
            client=client,
            alone=alone,
        )
        for i in range(asked.n or 1)
    ]
