"""Sending a job's answers, as one body or as server-sent events, for as long as the client is there."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from isthmus.coordinator.gateway.choices import ChoiceDelta, ChoiceSet
from isthmus.coordinator.gateway.errors import api_error
from isthmus.coordinator.gateway.formats import AnswerFormat

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collects events would defeat them
]


class Generated(Response):
    """A response that generates while it is sent, so that nothing can be left over when it ends, in any way."""

    def __init__(self, job: ChoiceSet, shape: AnswerFormat, model: str, *, stream: bool, include_usage: bool) -> None:
        super().__init__()
        self._job = job
        self._shape = shape
        self._stream = stream
        self._include_usage = include_usage
        self._head = {"id": f"{shape.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send_events(send) if self._stream else self._send_whole(scope, receive, send)
        await while_connected(receive, work)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[list[ChoiceDelta]] = [[] for _ in self._job.choices]
        async with aclosing(self._job.run()) as deltas:
            async for index, delta in deltas:
                parts[index].append(delta)
        choices = [{"index": index} | self._shape.whole(_joined(part)) for index, part in enumerate(parts)]
        body = self._head | {"object": self._shape.object, "choices": choices, "usage": self._job.usage.body()}
        await JSONResponse(body)(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events()) as events:
            first = await anext(events)  # an error before it still has a status of its own
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as error:  # noqa: BLE001 (the client is told, and the log)
                event = _event(api_error(error).body())
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes]:
        opened: set[int] = set()
        async with aclosing(self._job.run()) as deltas:
            async for index, delta in deltas:
                opening = None if index in opened else self._shape.opening()
                opened.add(index)
                for fields in (*([opening] if opening else ()), *self._shape.chunks(delta)):
                    yield self._chunk([{"index": index} | fields], None)
        if self._include_usage:
            yield self._chunk([], self._job.usage.body())
        yield b"data: [DONE]\n\n"

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, object] | None) -> bytes:
        body = self._head | {"object": self._shape.chunk, "choices": choices}
        return _event(body | {"usage": usage} if self._include_usage else body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work to its end, or until the client goes away. The request's body must have been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _joined(deltas: list[ChoiceDelta]) -> ChoiceDelta:
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    return ChoiceDelta("".join(delta.text for delta in deltas), tokens, deltas[-1].finish)


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n".encode()
