"""A server in a running event loop: its port, its end, and that it leaves the program's signals alone."""

from __future__ import annotations

import asyncio
import signal
import socket

import httpx2
import pytest

from coordinator.gateway import make_app, serve
from split.errors import BadRequest
from tests.coordinator.gateway.generators import forever, saying, served_model


def test_a_free_port_is_chosen_and_free_again_at_the_end() -> None:
    async def use() -> int:
        server = await serve(make_app({}, key_sha256=None), "127.0.0.1", 0)
        async with httpx2.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{server.port}/health")).json() == {"status": "ok"}
        await server.close()
        return server.port

    port = asyncio.run(use())
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_that_is_taken_is_an_error_of_one_line() -> None:
    async def use(port: int) -> None:
        with pytest.raises(BadRequest, match="cannot listen on"):
            await serve(make_app({}, key_sha256=None), "127.0.0.1", port)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        asyncio.run(use(taken.getsockname()[1]))


def test_signals_are_left_to_the_program() -> None:
    async def use() -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        server = await serve(make_app({}, key_sha256=None), "127.0.0.1", 0)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        await server.close()

    asyncio.run(use())


def test_answers_that_do_not_end_in_time_are_given_up_when_the_server_closes() -> None:
    script = saying("one", after=forever)

    async def use() -> None:
        server = await serve(make_app({"m": served_model(script)}, key_sha256=None), "127.0.0.1", 0, grace=1)
        body = {"model": "m", "prompt": "a", "stream": True}
        async with (
            httpx2.AsyncClient() as client,
            client.stream("POST", f"http://127.0.0.1:{server.port}/v1/completions", json=body) as answer,
        ):
            await anext(answer.aiter_lines())
            await server.close()
            await asyncio.wait_for(script.answers[0].given_up.wait(), 10)

    asyncio.run(use())


def test_a_client_that_stalls_in_its_body_is_cut_off() -> None:
    async def use() -> bytes:
        server = await serve(make_app({}, key_sha256=None, body_timeout=0.2), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\n{")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await server.close()
        return answer

    assert asyncio.run(use()).startswith(b"HTTP/1.1 408")
