"""A server in a running event loop: its port, its end, and that it leaves the program's signals alone."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from pathlib import Path

import httpx2
import pytest

from isthmus.coordinator.control.authority import Authority
from isthmus.coordinator.gateway import make_app, serve
from isthmus.split.errors import BadRequest
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


def test_http_is_encrypted_with_a_certificate(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    for name, content in zip(("certificate", "key", "ca"), (*authority.issue_server(), authority.ca_pem), strict=True):
        (tmp_path / name).write_bytes(content)
    files = {"certificate": str(tmp_path / "certificate"), "key": str(tmp_path / "key")}

    async def use() -> None:
        server = await serve(make_app({}, key_sha256=None), "127.0.0.1", 0, **files)
        trusting = ssl.create_default_context(cafile=tmp_path / "ca")
        trusting.check_hostname = False  # these certificates name the coordinator, not an address
        async with httpx2.AsyncClient(verify=trusting) as client:
            assert (await client.get(f"https://127.0.0.1:{server.port}/health")).json() == {"status": "ok"}
        async with httpx2.AsyncClient() as stranger:
            with pytest.raises(httpx2.ConnectError, match="certificate"):
                await stranger.get(f"https://127.0.0.1:{server.port}/health")
        await server.close()

    asyncio.run(use())


def test_a_certificate_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "junk").write_text("no certificate")

    async def use() -> None:
        for name in ("junk", "nothing"):
            file = str(tmp_path / name)
            with pytest.raises(BadRequest, match=f"TLS certificate .*/{name} with key"):
                await serve(make_app({}, key_sha256=None), "127.0.0.1", 0, certificate=file, key=file)

    asyncio.run(use())
