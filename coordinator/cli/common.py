"""What the commands share: the connection to the coordinator, and output for people or for machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from isthmus.split.errors import BadRequest
from isthmus.split.terminal import Json as Json
from isthmus.split.terminal import PlainConsole
from isthmus.split.terminal import console as console
from isthmus.split.terminal import human_bytes as human_bytes
from isthmus.split.terminal import print_json as print_json

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


def new_folder(path: Path) -> Path:
    """The full path of a folder that is not there yet, or is empty.

    Raises BadRequest, before work is lost, for one that cannot be made.
    """
    folder = path.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequest(f"{folder} is there already and not an empty folder; choose another --out")
    parent = next(above for above in folder.parents if above.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadRequest(f"{folder} cannot be made: {parent} is not a folder that you may write to")
    return folder


def model_name(model: str) -> str:
    """A model's name for the coordinator: a folder by its full path, since the coordinator may run elsewhere."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() and model != "default" else model


def as_dict(message: Message) -> dict[str, Any]:
    """A message as plain values for JSON, with every field, by the names in the .proto file."""
    return dict(MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
