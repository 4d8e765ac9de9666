"""Errors as clients hear of them: always one line, in a body of OpenAI's form."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from isthmus.split.errors import IsthmusError
from isthmus.split.inference.request import Busy

log = logging.getLogger(__name__)

_STATUS = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 503,
    "UNAVAILABLE": 503,
}
_TYPE = {401: "authentication_error", 429: "rate_limit_error"}
_MAX_MESSAGE = 500  # characters; messages quote what the client sent


class ApiError(Exception):
    """An answer that is an error. param: the parameter at fault; code: what a program can look for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        type_ = _TYPE.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = " ".join(str(self).split())[:_MAX_MESSAGE]
        return {"error": {"message": message, "type": type_, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """The answer to any exception; one that is nobody's message is logged, and the client learns nothing of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, Busy):
        wait = max(1, math.ceil(min(error.retry_after, 3600)))
        return ApiError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": str(wait)})
    if isinstance(error, IsthmusError):
        status = _STATUS.get(error.status, 500)
        if status >= 500:
            log.warning("a request failed: %s", error)
        return ApiError(status, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the request failed inside the gateway; its log says why")


def _invalid(error: ValidationError) -> ApiError:
    """The first of the faults that pydantic found."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")[:200]
    if not param:  # of the body as a whole
        return ApiError(400, f"the body must be a JSON object: {fault['msg']}")
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {param}", param=param, code="unknown_parameter")
    if fault["type"] == "missing":
        return ApiError(400, f"missing parameter: {param}", param=param, code="missing_required_parameter")
    code = "unsupported_parameter" if fault["type"] == "unsupported" else "invalid_value"
    return ApiError(400, f"{param}: {fault['msg']}", param=param, code=code)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    answer = api_error(error)
    return JSONResponse(answer.body(), answer.status, headers=answer.headers)


def install(app: FastAPI) -> None:
    for kind in (ApiError, ValidationError, IsthmusError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
