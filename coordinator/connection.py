"""A user's connection to the coordinator, from the credentials that it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.split.errors import NotFound
from isthmus.split.tls import Credentials, channel, error_of


@dataclass(frozen=True)
class Connection:
    """A stub of the coordinator, and the host under which it was reached."""

    stub: CoordinatorStub
    address: str


@contextmanager
def connected(credentials: Path, address: str) -> Iterator[Connection]:
    """The coordinator's service. A failed call inside becomes one line that says what to do."""
    folder = credentials.expanduser()
    if not folder.is_dir():
        raise NotFound(
            f"no credentials in {folder}: start the coordinator with `isthmus up`, or copy its `admin` folder here "
            "and name it with --credentials"
        )
    where = address or address_of(folder)
    with channel(where, Credentials.load(folder)) as opened:
        try:
            yield Connection(CoordinatorStub(opened), where)
        except grpc.RpcError as error:
            raise error_of(error, where) from None


def address_of(credentials: Path) -> str:
    """HOST:PORT that the coordinator wrote beside a user's credentials."""
    try:
        return str(json.loads((credentials / "address.json").read_text())["address"])
    except (OSError, ValueError, KeyError):
        raise NotFound(f"no usable address.json in {credentials}: give --coordinator HOST:PORT") from None
