"""The one error tree: what a user can meet, as one line that says what to do.

A gRPC servicer raises these and one interceptor turns them into status codes (`status`); a
client call turns the status code back into the same class (`from_status`). Command lines print the message alone.
"""

from __future__ import annotations

from typing import ClassVar


class IsthmusError(Exception):
    """Base of all errors with a message for the user. `status` is the name of a gRPC status code."""

    status: ClassVar[str] = "INTERNAL"


class BadRequest(IsthmusError):
    """Something the user or the other side asked for cannot be done as asked."""

    status = "INVALID_ARGUMENT"


class UnsupportedModel(BadRequest):
    """An architecture or a configuration that would be split wrongly."""


class BadModelFolder(BadRequest):
    """A model folder without what is needed: config, safetensors, tokenizer."""


class BadData(BadRequest):
    """A text file that cannot be used: empty, a missing column, too short."""


class BadTensor(BadRequest):
    """A tensor on the wire that is not what was agreed: shape, dtype, size, codec."""


class CodecError(BadTensor):
    """A tensor that a codec cannot code, a payload that it cannot have made, or a codec that there is not."""


class BadFrame(BadRequest):
    """A frame on the wire that does not fit the session: job, step, phase."""


class NotFound(IsthmusError):
    """No such job, device, dataset or file."""

    status = "NOT_FOUND"


class NotEnrolled(IsthmusError):
    """No certificate, a wrong one, a used or expired token, a revoked device."""

    status = "UNAUTHENTICATED"


class NotAllowed(IsthmusError):
    """A valid certificate, but not for this: a device asking for what only a user may do, or for another's weights."""

    status = "PERMISSION_DENIED"


class WrongState(IsthmusError):
    """The job or device is in a state in which this cannot be done."""

    status = "FAILED_PRECONDITION"


class LinkLost(IsthmusError):
    """The other side cannot be reached, or went away in the middle."""

    status = "UNAVAILABLE"


_BY_STATUS: dict[str, type[IsthmusError]] = {
    cls.status: cls for cls in (IsthmusError, BadRequest, NotFound, NotEnrolled, NotAllowed, WrongState, LinkLost)
}


def from_status(status: str, message: str) -> IsthmusError:
    """The error that a gRPC status stands for; unknown codes become IsthmusError."""
    return _BY_STATUS.get(status, IsthmusError)(message)
