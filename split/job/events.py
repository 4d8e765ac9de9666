"""What happened in a job, as `Event` of events.proto: makers of events, and their one translation to JSON.

Everything inside reads the messages themselves. JSON is for programs that watch a job with --json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from isthmus.protos.v1.events_pb2 import Event

Tell = Callable[[Event], None]

JSON_KINDS = {
    "task": "device",
    "serving": "started",
    "holder_joined": "joined",
    "holder_left": "left",
    "took_over": "log",
}
"""Kinds of event that JSON calls by another name than events.proto does."""

_LEFT_OUT = {"resumed", "device_step", "step_seconds", "deadline_seconds", "memory_bytes"}
"""Optional fields that JSON leaves out where they are not set; the others are null there."""

_NOT_SHOWN = {"task"}  # a task's number is between the device and the coordinator

_CONSTANT = {"holder_left": {"done": False, "step": 0}}
"""What JSON says beside the message's fields, so that all kinds of `left` read alike."""


def tell_nobody(event: Event) -> None:
    """Drops the event, in a job that nobody watches."""


def log_line(message: str, device: str = "") -> Event:
    """An event that is no more than a sentence for people."""
    return Event(device=device, log={"message": message})


def event_as_json(event: Event) -> dict[str, Any]:
    """An event as JSON has it.

    The number is text, as in protobuf's own JSON; data has the fields of the kind's message.
    """
    name = event.WhichOneof("kind") or ""  # empty for a kind of a newer version
    kind = JSON_KINDS.get(name, name)
    return {
        "number": str(event.number),
        "time": event.time,
        "kind": kind,
        "device": event.device,
        "data": {**fields_of(getattr(event, name)), **_CONSTANT.get(name, {})} if name else {},
    }


def fields_of(message: Message) -> dict[str, Any]:
    """The fields of a kind's message as JSON has them, by name; enumerations in lower case."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.name in _NOT_SHOWN:
            continue
        if field.has_presence and not message.HasField(field.name):
            if field.name not in _LEFT_OUT:
                found[field.name] = None
        elif field.enum_type is not None:
            found[field.name] = field.enum_type.values_by_number[value].name.lower()
        elif isinstance(value, Mapping):
            found[field.name] = dict(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found[field.name] = list(value)
        else:
            found[field.name] = value
    return {name: finite(value) for name, value in found.items()}


def finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
