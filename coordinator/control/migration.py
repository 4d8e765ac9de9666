"""Brings a database of an earlier version to the present tables, in one transaction, without loss.

Version 0.1 (schema 1) kept events as a kind and JSON. What cannot be read as one of its events is refused, so that
nothing is ever taken for something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from google.protobuf.message import Message

from isthmus.coordinator.control.schema import events, metadata
from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.errors import WrongState

_WITH_FIELD = {
    ("joined", "span"): "holder_joined",
    ("left", "span"): "holder_left",
    ("started", "url"): "serving",
    ("log", "span"): "took_over",
}
"""Kinds of version 0.1 that stood for two things, told apart by a field of the second."""

_KINDS = {field.name for field in Event.DESCRIPTOR.oneofs_by_name["kind"].fields} - {"task"} | {"device"}
_DROPPED = {"holder_left": {"done", "step"}}  # fields of version 0.1 that were always the same


def migrate(connection: sa.Connection, path: Path, version: int) -> None:
    """From schema `version`. Raises WrongState for what cannot be read."""
    if version == 1:
        _type_events(connection, path)


def _type_events(connection: sa.Connection, path: Path) -> None:
    connection.exec_driver_sql("ALTER TABLE events RENAME TO events_1")
    metadata.create_all(connection, [events])
    for row in connection.exec_driver_sql("SELECT job, number, time, kind, device, data FROM events_1").fetchall():
        try:
            event = event_of_version_0_1(row.kind, row.device, json.loads(row.data))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise WrongState(
                f"{path}: event {row.number} of job {row.job} is not one that isthmus 0.1 wrote ({error}): restore the "
                "file from a backup, or move it away to start without its devices and jobs"
            ) from error
        event.number, event.time = row.number, row.time
        connection.execute(
            events.insert().values(
                job=row.job,
                number=row.number,
                time=row.time,
                kind=event.WhichOneof("kind"),
                device=row.device,
                event=event.SerializeToString(),
            )
        )
    connection.exec_driver_sql("DROP TABLE events_1")


def event_of_version_0_1(kind: str, device: str, data: Mapping[str, Any]) -> Event:
    """Raises ValueError, TypeError, KeyError or AttributeError for what was not an event of version 0.1."""
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {kind!r}")
    name = next((new for (old, field), new in _WITH_FIELD.items() if old == kind and field in data), kind)
    event = Event(device=device)
    message = getattr(event, "task" if name == "device" else name)
    message.SetInParent()
    _fill(message, {field: value for field, value in data.items() if field not in _DROPPED.get(name, ())})
    return event


def _fill(message: Message, data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.enum_type is not None:
            setattr(message, name, field.enum_type.values_by_name[value.upper()].number)
        elif isinstance(value, Mapping):
            getattr(message, name).update({key: _number(one) for key, one in value.items()})
        elif isinstance(value, list):
            getattr(message, name).extend(value)
        elif value is not None or not field.has_presence:
            setattr(message, name, _number(value))


def _number(value: Any) -> Any:
    """JSON had null for what is not finite."""
    return math.nan if value is None else value
