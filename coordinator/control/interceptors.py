"""What every gRPC server of the project does around a call: errors become status codes, and callers are checked."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from isthmus.split.errors import IsthmusError, NotAllowed, NotEnrolled
from isthmus.split.tls import Peer, peer_of

log = logging.getLogger(__name__)

_MAX_DETAILS = 2000  # characters; gRPC carries them in a header of at most 8 KiB


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns an IsthmusError into its status code and message, so that no servicer has a try block.

    Any other exception is logged with its traceback and answered INTERNAL without a word of it. Handlers with
    one answer are coroutines, handlers with many are async generators.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        method = str(handler_call_details.method)
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            wrapped: Any = _stream(inner, method)
        else:
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            wrapped = _unary(inner, method)
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _unary(inner: Any, method: str) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await inner(request, context)
        except Exception as error:  # noqa: BLE001 (_abort answers or logs each)
            await _abort(context, method, error)

    return call


def _stream(inner: Any, method: str) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async with aclosing(inner(request, context)) as answers:  # closed also when the caller goes away
                async for answer in answers:
                    yield answer
        except Exception as error:  # noqa: BLE001 (_abort answers or logs each)
            await _abort(context, method, error)

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):  # the handler itself has answered
        raise error
    if isinstance(error, IsthmusError):
        log.info("%s of %s refused: %s", method, context.peer(), error)
        await context.abort(grpc.StatusCode[error.status], str(error)[:_MAX_DETAILS])
    log.error("%s of %s failed", method, context.peer(), exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"{method} failed inside the coordinator; its log says why")


class Certificates(Protocol):
    """Who knows which certificate of a device is the valid one."""

    def check_certificate(self, name: str, serial: str) -> None:
        """Raises NotEnrolled if this is not the device's present certificate, or the device is revoked."""


def caller(context: grpc.aio.ServicerContext[Any, Any], certificates: Certificates, role: str | None = None) -> Peer:
    """Who calls, after all checks. role: device or user, if only they may make this call.

    Raises NotEnrolled (no certificate, an old or a revoked one) or NotAllowed (another role).
    """
    peer = peer_of(context.auth_context())
    if peer.role == "device":
        certificates.check_certificate(peer.name, peer.serial)
    elif peer.role != "user":
        raise NotEnrolled(f"a certificate of the role {peer.role!r} cannot call")
    if role is not None and peer.role != role:
        raise NotAllowed(f"{peer.role} {peer.name} may not make this call: it is for a {role}'s certificate")
    return peer
