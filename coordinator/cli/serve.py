"""`isthmus serve`: a model over the coordinator and devices, behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import hashlib
import json
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from isthmus.coordinator.cli.common import (
    DEFAULT_CREDENTIALS,
    Address,
    CredentialsFolder,
    Json,
    console,
    model_name,
    print_json,
)
from isthmus.coordinator.cli.config_file import print_file
from isthmus.coordinator.cli.options import PrintConfig, Settings, with_settings
from isthmus.coordinator.cli.watch import check_ended_well, print_report
from isthmus.coordinator.connection import Connection, connected
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest
from isthmus.split.inference.serving import ServingConfig, parse_adapter, parse_stages
from isthmus.split.job.events import event_as_json

Model = Annotated[str, typer.Option(help="A folder in hub format at the coordinator, a hub id, or default.")]
Stages = Annotated[
    str,
    typer.Option(
        help="Who holds which blocks: HOLDER:FIRST-LAST,... where a holder is a device or `cloud`, the coordinator. "
        "`laptop+desktop:0-8`: desktop stands by for laptop. auto: the best single node that has the memory, or the "
        "fastest split."
    ),
]
Name = Annotated[str, typer.Option(help="What clients call the model; by default as --model.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="DIR or NAME=DIR: a LoRA adapter of this model to serve with it, a folder at the coordinator as "
        "`isthmus export` or peft writes it. Clients choose it by its name, by default the folder's. Repeatable."
    ),
]
ApiKey = Annotated[
    str, typer.Option(help="That clients have to send; by default one is made.", envvar="ISTHMUS_API_KEY")
]
NoApiKey = Annotated[bool, typer.Option("--no-api-key", help="Let everybody in.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for devices that are missing.")]


@with_settings(ServingConfig)
def serve(
    settings: Settings,
    model: Model = "default",
    stages: Stages = "auto",
    name: Name = "",
    adapter: Adapters = None,
    api_key: ApiKey = "",
    no_api_key: NoApiKey = False,
    wait: Wait = 60.0,
    json_output: Json = False,
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
    print_config: PrintConfig = False,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM. Its blocks may lie on devices; when one dies, another goes on.

    Example: isthmus serve --model default --stages laptop:0-2,cloud:2-6 --port 8000
    """
    if no_api_key and api_key:
        raise BadRequest("--api-key and --no-api-key exclude each other")
    key = "" if no_api_key else api_key or f"ist-{secrets.token_urlsafe(24)}"
    config = _serving(settings, key).but(
        spans=parse_stages(stages),
        name=name or Path(model).name,
        adapters=tuple(map(parse_adapter, adapter or ())),
    )
    if print_config:
        print_file(ServingConfig)
        return
    spec = pb.JobSpec(
        method="serve",
        model=model_name(model),
        devices=config.devices,
        serving=config.to_json(),
        wait_seconds=wait,
    )
    if not json_output:
        _warn(config)
    with connected(credentials, coordinator) as connection:
        _follow(
            connection, connection.stub.SubmitJob(pb.SubmitJobRequest(spec=spec)), "" if api_key else key, json_output
        )


def _serving(settings: Settings, key: str) -> ServingConfig:
    """The configuration, with full paths of what is on this machine.

    key: the clients' API key; empty if none is needed.
    """
    draft, certificate, tls_key = (settings[name] for name in ("draft", "tls_certificate", "tls_key"))
    changes = {
        "draft": draft if draft in ("none", "lookup", "early") else model_name(draft),
        "tls_certificate": _full_path(certificate),
        "tls_key": _full_path(tls_key),
        "key_sha256": hashlib.sha256(key.encode()).hexdigest() if key else "",
    }
    return ServingConfig.of(**{**settings, **changes})


def _warn(config: ServingConfig) -> None:
    if not config.http.tls_certificate and config.http.host not in ("127.0.0.1", "::1", "localhost"):
        line = f"HTTP at {config.http.host} is not encrypted: --tls-certificate and --tls-key change that"
        console.print(line, style="yellow")


def _follow(connection: Connection, job: pb.Job, key: str, as_json: bool) -> None:
    """Shows what happens until the job ends; Ctrl-C ends it.

    key: an API key to tell once; empty if the caller has it.
    """
    try:
        with _stoppable():
            for event in connection.stub.WatchJob(pb.WatchJobRequest(id=job.id)):
                _show(event, key, as_json=as_json)
    except KeyboardInterrupt:
        ended = connection.stub.CancelJob(pb.JobRequest(id=job.id))
        if not as_json:
            console.print("the model is not served any more")
            if ended.report:
                print_report(json.loads(ended.report))
        raise typer.Exit(130) from None
    check_ended_well(connection.stub.GetJob(pb.JobRequest(id=job.id)))


def _full_path(file: str) -> str:
    """The full path of a file here, or the text as it is, for a file that may be at the coordinator."""
    path = Path(file).expanduser()
    return str(path.resolve()) if file and path.is_file() else file


@contextmanager
def _stoppable() -> Iterator[None]:
    """Makes SIGTERM, and Ctrl-C also where the shell has it ignored, raise KeyboardInterrupt."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _show(event: pb.Event, key: str, *, as_json: bool) -> None:
    """Shows an event.

    key: an API key to tell once the model is served; empty if the caller has it.
    """
    kind, who = event.WhichOneof("kind"), event.device or "the coordinator"
    if as_json:
        shown = event_as_json(event)
        if kind == "serving" and key:
            shown["data"]["api_key"] = key
        print_json(shown)
        return
    line = {
        "state": lambda: f"{pb.JobState.Name(event.state.state).lower()} {event.state.message}".strip(),
        "task": lambda: f"{who}: {pb.TaskState.State.Name(event.task.state).lower()} {event.task.message}".strip(),
        "holder_joined": lambda: f"blocks {event.holder_joined.span}: {who} holds them ({event.holder_joined.runtime})",
        "holder_left": lambda: f"blocks {event.holder_left.span}: {who} has gone",
        "serving": lambda: (
            f"{event.serving.model} is served at {event.serving.url}" + (f"\nAPI key: {key}" if key else "")
        ),
        "log": lambda: event.log.message,
        "took_over": lambda: event.took_over.message,
        "plan": lambda: event.plan.message,
    }.get(kind or "")
    if line is not None:
        console.print(line(), soft_wrap=True, style="yellow" if event.plan.slower else None)
    if kind == "serving" and key:
        console.print(f"API key: {key}", soft_wrap=True)
