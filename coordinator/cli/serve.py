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
from isthmus.coordinator.cli.watch import check_ended_well, print_report
from isthmus.coordinator.connection import connected
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest
from isthmus.split.job.events import event_as_json
from isthmus.split.terminal import ExitThreshold


def serve(
    model: Annotated[str, typer.Option(help="A folder in hub format at the coordinator, a hub id, or default.")] = (
        "default"
    ),
    stages: Annotated[
        str,
        typer.Option(
            help="Who holds which blocks: HOLDER:FIRST-LAST,... where a holder is a device or `cloud`, the "
            "coordinator. `laptop+desktop:0-8`: desktop stands by for laptop. auto: the best single node that has "
            "the memory, or the fastest split."
        ),
    ] = "auto",
    name: Annotated[str, typer.Option(help="What clients call the model; by default as --model.")] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="DIR or NAME=DIR: a LoRA adapter of this model to serve with it, a folder at the coordinator as "
            "`isthmus export` or peft writes it. Clients choose it by its name, by default the folder's. Repeatable."
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer; 0: what the model takes, up to 4096.")] = 0,
    sequences: Annotated[int, typer.Option(help="Answers at the same time; keys and values are kept for each.")] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait; beyond it: 429, try again later.")] = 64,
    codec: Annotated[str, typer.Option(help="Of hidden states on the way; none is exact (`isthmus codecs`).")] = "none",
    runtime: Annotated[
        str, typer.Option(help="auto (the faster one, measured at each holder), torch, or onnxruntime.")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="Of linear modules: float32, or in onnxruntime int8 or int4.")
    ] = "float32",
    draft: Annotated[
        str,
        typer.Option(
            help="Who guesses at tokens that the chain then verifies together: none, lookup (the text so far), or a "
            "small model with the same tokenizer at the coordinator. Answers stay the same."
        ),
    ] = "none",
    exit_threshold: ExitThreshold = "",
    host: Annotated[str, typer.Option(help="Where HTTP listens, at the coordinator.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 0,
    tls_certificate: Annotated[
        str, typer.Option(help="PEM file at the coordinator: HTTP is encrypted. With --tls-key.")
    ] = "",
    tls_key: Annotated[str, typer.Option(help="Its private key.")] = "",
    api_key: Annotated[
        str, typer.Option(help="That clients have to send; by default one is made.", envvar="ISTHMUS_API_KEY")
    ] = "",
    no_api_key: Annotated[bool, typer.Option("--no-api-key", help="Let everybody in.")] = False,
    users: Annotated[
        str,
        typer.Option(
            help="Devices that may use the chain themselves, so that text stays there (`isthmus-client generate`): "
            "laptop,phone. Those that hold the first blocks may in any case."
        ),
    ] = "",
    guests: Annotated[
        int | None,
        typer.Option(help="Answers at the same time for such devices, beside --sequences; by default 4 if any may."),
    ] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for devices that are missing.")] = 60.0,
    json_output: Json = False,
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
) -> None:
    """Serve a model until Ctrl-C or SIGTERM. Its blocks may lie on devices; when one dies, another goes on.

    Example: isthmus serve --model default --stages laptop:0-2,cloud:2-6 --port 8000
    """
    from isthmus.split.inference.serving import ServingConfig, parse_adapter, parse_stages

    if no_api_key and api_key:
        raise BadRequest("--api-key and --no-api-key exclude each other")
    key = "" if no_api_key else api_key or f"ist-{secrets.token_urlsafe(24)}"
    config = ServingConfig(
        spans=parse_stages(stages),
        name=name or Path(model).name,
        context=context,
        sequences=sequences,
        queue=queue,
        codec=codec,
        runtime=runtime,
        weights=weights,
        draft=draft if draft in ("none", "lookup", "early") else model_name(draft),
        exit_threshold=exit_threshold,
        http_host=host,
        http_port=port,
        http_certificate=_full_path(tls_certificate),
        http_key=_full_path(tls_key),
        key_sha256=hashlib.sha256(key.encode()).hexdigest() if key else "",
        users=tuple(user.strip() for user in users.split(",") if user.strip()),
        guests=guests,
        adapters=tuple(map(parse_adapter, adapter or ())),
    )
    spec = pb.JobSpec(
        method="serve",
        model=model_name(model),
        devices=config.devices,
        serving=config.to_json(),
        wait_seconds=wait,
    )
    if not tls_certificate and host not in ("127.0.0.1", "::1", "localhost") and not json_output:
        console.print(f"HTTP at {host} is not encrypted: --tls-certificate and --tls-key change that", style="yellow")
    with connected(credentials, coordinator) as connection:
        job = connection.stub.SubmitJob(pb.SubmitJobRequest(spec=spec))
        try:
            with _stoppable():
                for event in connection.stub.WatchJob(pb.WatchJobRequest(id=job.id)):
                    _show(event, "" if api_key else key, as_json=json_output)
        except KeyboardInterrupt:
            ended = connection.stub.CancelJob(pb.JobRequest(id=job.id))
            if not json_output:
                console.print("the model is not served any more")
                if ended.report:
                    print_report(json.loads(ended.report))
            raise typer.Exit(130) from None
        ended = connection.stub.GetJob(pb.JobRequest(id=job.id))
    check_ended_well(ended)


def _full_path(file: str) -> str:
    """Of a file here; another one may be at the coordinator."""
    path = Path(file).expanduser()
    return str(path.resolve()) if file and path.is_file() else file


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, and Ctrl-C also where the shell has it ignored, raise KeyboardInterrupt."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _show(event: pb.Event, key: str, *, as_json: bool) -> None:
    """key: to tell once, when there is something to use it for; empty: the user knows it."""
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
