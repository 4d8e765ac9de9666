"""Serving an app in the event loop that is running already, where the engine is, too."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from isthmus.split.errors import BadRequest, IsthmusError


class _Server(uvicorn.Server):
    """Leaves signals to the program, and tells when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class HttpServer:
    """An HTTP server that is up. port: the one that it has, also where any was asked for."""

    port: int
    _server: uvicorn.Server
    _task: asyncio.Task[None]

    async def close(self) -> None:
        """Take no more requests, let those that run end for a while (`grace`), then end them."""
        self._server.should_exit = True
        await self.wait()

    async def wait(self) -> None:
        """Wait until the server is closed. Raises if it fails."""
        await asyncio.shield(self._task)


async def serve(
    app: ASGIApp, host: str, port: int, *, grace: float = 5.0, certificate: str = "", key: str = ""
) -> HttpServer:
    """Serve an app. Returns when requests are answered.

    port: 0 for any free one. grace: seconds, see HttpServer.close. certificate, key: files in PEM form, for TLS; empty:
    none. Raises BadRequest.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise BadRequest(f"cannot listen on {host}:{port}: {error}; choose another address or port") from None
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody can write them, and clients take turns by their address
        timeout_graceful_shutdown=max(1, round(grace)),
        ssl_certfile=certificate or None,
        ssl_keyfile=key or None,
    )
    try:
        config.load()
    except OSError as error:  # SSLError is one
        listener.close()
        raise BadRequest(f"TLS certificate {certificate} with key {key}: {error.strerror or error}") from None
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    up = asyncio.create_task(server.up.wait())
    await asyncio.wait([task, up], return_when=asyncio.FIRST_COMPLETED)
    up.cancel()
    if task.done():
        listener.close()
        task.result()
        raise IsthmusError("the HTTP server ended as it began; the log says why")
    return HttpServer(listener.getsockname()[1], server, task)
