"""What the commands share: the connection to the coordinator, and output for people or for machines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from protos.v1.coordinator_pb2_grpc import CoordinatorStub
from split.errors import BadRequest, NotFound
from split.terminal import Json as Json
from split.terminal import PlainConsole
from split.terminal import console as console
from split.terminal import human_bytes as human_bytes
from split.terminal import print_json as print_json
from split.tls import Credentials, channel, error_of

errors = PlainConsole(stderr=True)

DEFAULT_STATE = Path("~/.isthmus/coordinator")

CredentialsFolder = Annotated[
    Path,
    typer.Option(
        "--credentials",
        help="Folder with ca.pem, cert.pem, key.pem and address.json: the `admin` folder in the coordinator's state.",
        envvar="ISTHMUS_CREDENTIALS",
    ),
]
Address = Annotated[
    str,
    typer.Option("--coordinator", help="HOST:PORT, if not the one in address.json.", envvar="ISTHMUS_COORDINATOR"),
]
DEFAULT_CREDENTIALS = DEFAULT_STATE / "admin"


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


def new_folder(path: Path) -> Path:
    """The full path of a folder that can be made: not there yet, or empty. Raises BadRequest, before work is lost."""
    folder = path.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequest(f"{folder} is there already and not an empty folder; choose another --out")
    parent = next(above for above in folder.parents if above.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadRequest(f"{folder} cannot be made: {parent} is not a folder that you may write to")
    return folder


def model_name(model: str) -> str:
    """A folder by its full path, since the coordinator may have been started elsewhere."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() and model != "default" else model


def address_of(credentials: Path) -> str:
    """HOST:PORT that the coordinator wrote beside a user's credentials."""
    try:
        return str(json.loads((credentials / "address.json").read_text())["address"])
    except (OSError, ValueError, KeyError):
        raise NotFound(f"no usable address.json in {credentials}: give --coordinator HOST:PORT") from None


def as_dict(message: Message) -> dict[str, Any]:
    """A message as JSON-ready values, with every field, by the names in the .proto file."""
    return dict(MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
