"""Every kind of handler: the error tree arrives as its status code, and other errors tell the caller nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from isthmus.coordinator.control.interceptors import ErrorInterceptor, caller
from isthmus.split import errors
from isthmus.split.errors import BadFrame, IsthmusError, LinkLost, NotAllowed, NotEnrolled, NotFound, WrongState
from isthmus.split.tls import error_of

RAISES: dict[bytes, Exception] = {
    b"frame": BadFrame("step 4 after step 2"),
    b"job": NotFound("no job 'x'"),
    b"revoked": NotEnrolled("device edge is revoked"),
    b"role": NotAllowed("for an administrator's certificate"),
    b"state": WrongState("the job has ended"),
    b"link": LinkLost("the stage went away"),
    b"bug": KeyError("a secret of the coordinator"),
}
closed: list[str] = []


async def unary(request: Any, context: Any) -> bytes:
    if not isinstance(request, bytes):
        request = [part async for part in request][-1]
    if request == b"abort":
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, "the handler's own")
    if request in RAISES:
        raise RAISES[request]
    return b"answer"


async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
    try:
        yield b"first"
        yield await unary(request, context)
    finally:
        closed.append("stream")


HANDLERS: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
    "UU": grpc.unary_unary_rpc_method_handler(unary),
    "US": grpc.unary_stream_rpc_method_handler(stream),
    "SU": grpc.stream_unary_rpc_method_handler(unary),
    "SS": grpc.stream_stream_rpc_method_handler(stream),
}


def ask(kind: str, request: bytes) -> tuple[list[bytes], grpc.aio.AioRpcError | None]:
    """What the caller gets: the answers before the error, and the error."""

    async def requests() -> AsyncIterator[bytes]:
        yield request

    async def go() -> tuple[list[bytes], grpc.aio.AioRpcError | None]:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Service", HANDLERS)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        answers: list[bytes] = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            shapes: dict[str, Any] = {
                "UU": channel.unary_unary,
                "US": channel.unary_stream,
                "SU": channel.stream_unary,
                "SS": channel.stream_stream,
            }
            call = shapes.get(kind, channel.unary_unary)(f"/test.Service/{kind}")
            try:
                reply = call(requests() if kind[0] == "S" else request, timeout=10)
                if kind[1] == "S":
                    async for answer in reply:
                        answers.append(answer)  # noqa: PERF401 (what came before the error counts)
                else:
                    answers.append(await reply)
            except grpc.aio.AioRpcError as error:
                return answers, error
            finally:
                await server.stop(None)
        return answers, None

    return asyncio.run(go())


@pytest.mark.parametrize("kind", HANDLERS)
def test_answers_go_through_untouched(kind: str) -> None:
    answers, error = ask(kind, b"hello")
    assert error is None
    assert answers == ([b"first", b"answer"] if kind[1] == "S" else [b"answer"])


@pytest.mark.parametrize("kind", HANDLERS)
@pytest.mark.parametrize("request_", [key for key, value in RAISES.items() if isinstance(value, IsthmusError)])
def test_an_error_of_the_tree_arrives_as_its_status_and_message(kind: str, request_: bytes) -> None:
    raised = RAISES[request_]
    assert isinstance(raised, IsthmusError)
    answers, error = ask(kind, request_)
    assert error is not None
    assert error.code() is grpc.StatusCode[raised.status]
    assert error.details() == str(raised)
    assert answers == ([b"first"] if kind[1] == "S" else [])
    back = error_of(error, "h:1")
    assert type(back) is type(errors.from_status(raised.status, ""))
    assert str(raised) in str(back)


@pytest.mark.parametrize("kind", HANDLERS)
def test_any_other_error_is_logged_and_not_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        _, error = ask(kind, b"bug")
    assert error is not None
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    assert "its log says why" in str(error.details())
    assert "a secret of the coordinator" in caplog.text
    assert "Traceback" in caplog.text


def test_a_status_that_got_lost_on_the_way_is_a_lost_link() -> None:
    """grpc.aio tells of a message that it could not write, instead of the status with which the stream ended."""

    async def refuse(requests: Any, context: Any) -> AsyncIterator[bytes]:
        raise NotAllowed("not for you")
        yield b""

    async def go() -> list[grpc.aio.AioRpcError]:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        handler = grpc.method_handlers_generic_handler(
            "test.Service", {"SS": grpc.stream_stream_rpc_method_handler(refuse)}
        )
        server.add_generic_rpc_handlers([handler])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        lost: list[grpc.aio.AioRpcError] = []

        async def requests() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b"hello"

        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            for _ in range(50):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    async for _ in channel.stream_stream("/test.Service/SS")(requests(), timeout=10):
                        pass
                lost.append(raised.value)
        await server.stop(None)
        return lost

    known = [error_of(error, "h:1") for error in asyncio.run(go())]
    assert {type(one) for one in known} <= {NotAllowed, LinkLost}


def test_a_handlers_own_status_is_kept() -> None:
    _, error = ask("UU", b"abort")
    assert error is not None
    assert (error.code(), error.details()) == (grpc.StatusCode.ALREADY_EXISTS, "the handler's own")


def test_an_unknown_method_is_unimplemented() -> None:
    _, error = ask("XU", b"")
    assert error is not None
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_stream_is_closed_when_it_ends_by_an_error() -> None:
    closed.clear()
    ask("US", b"job")
    assert closed == ["stream"]


def test_a_very_long_message_still_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RAISES, b"long", NotFound("x" * 100_000))
    _, error = ask("UU", b"long")
    assert error is not None
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_a_caller_without_a_certificate_is_refused() -> None:
    class Context:
        def auth_context(self) -> dict[str, list[bytes]]:
            return {}

    class Nobody:
        def check_certificate(self, name: str, serial: str) -> None:
            raise AssertionError

    with pytest.raises(NotEnrolled, match="needs a certificate"):
        caller(Context(), Nobody())  # type: ignore[arg-type]
