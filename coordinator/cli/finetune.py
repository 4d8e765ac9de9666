"""`isthmus finetune`: submit a job and follow it, or train the unsplit yardstick here."""

from __future__ import annotations

import json
from dataclasses import asdict
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
    new_folder,
    print_json,
)
from isthmus.coordinator.cli.config_file import print_file
from isthmus.coordinator.cli.options import PrintConfig, Settings, with_settings
from isthmus.coordinator.cli.watch import check_ended_well, follow, print_report
from isthmus.coordinator.connection import Connection, connected
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import KEEP
from isthmus.split.job.shapes import options_of

Model = Annotated[str, typer.Option(help="Folder in hub format or hub id, on the coordinator; or `default`.")]
Dataset = Annotated[str, typer.Option(help="The name under which the devices' owners offer their text.")]
Devices = Annotated[str, typer.Option(help="NAME,NAME,... or a number: any that offer the dataset.")]
Method = Annotated[
    str,
    typer.Option(
        help="splitlora: split over the devices. dlora: likewise, but all that is trained is on the devices, each "
        "with an adapter of its own. centralised: unsplit, in this process, on --data (the yardstick)."
    ),
]
Data = Annotated[list[Path] | None, typer.Option(help="Files for --method centralised. Repeatable.")]
Out = Annotated[Path | None, typer.Option(help="Write the adapter to this folder when it is done.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for devices that are missing.", min=1)]
Resume = Annotated[str, typer.Option(help="Go on with this job from its last checkpoint; its options are used.")]
Detach = Annotated[bool, typer.Option(help="Submit and return.")]

_CENTRALISED = "centralised"


@with_settings(TrainingConfig, panel="Training")
def finetune(
    settings: Settings,
    model: Model = "default",
    dataset: Dataset = "",
    devices: Devices = "1",
    method: Method = "splitlora",
    data: Data = None,
    out: Out = None,
    wait: Wait = 300,
    resume: Resume = "",
    detach: Detach = False,
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
    json_output: Json = False,
    print_config: PrintConfig = False,
) -> None:
    """Fine-tune a model with LoRA on text that stays on the devices.

    Ctrl-C cancels the job that it started; the last checkpoint is kept.

    Example: isthmus finetune --model default --dataset notes --devices phone,laptop --steps 200
    """
    training = _training(method, settings)
    if print_config:
        print_file(TrainingConfig)
        return
    if not training.averages and out is not None:
        raise BadRequest("--out: the devices keep their adapters; only with --aggregate there is one to write here")
    if out is not None:
        out = new_folder(out)
    if method == _CENTRALISED:
        if dataset or resume or detach or devices != "1":
            raise BadRequest(
                "--dataset, --devices, --resume and --detach are of jobs; --method centralised trains here"
            )
        _centralised(model, data or [], out, training, json_output)
        return
    if data:
        raise BadRequest(
            "--data is for --method centralised; a device's text is offered by its owner: isthmus-client run --data"
        )
    if detach and out is not None:
        raise BadRequest("--detach returns before there is an adapter; `isthmus export JOB --out DIR` writes it later")
    request = pb.SubmitJobRequest(resume=resume)
    if not resume:
        request.spec.CopyFrom(_spec(model, dataset, devices, training, wait))
        if not json_output:
            _warn(training)
    with connected(credentials, coordinator) as connection:
        job = connection.stub.SubmitJob(request)
        if detach:
            _tell_submitted(job.id, json_output)
        else:
            _follow(connection, job, out, json_output)


def _training(method: str, settings: Settings) -> TrainingConfig:
    """The job's configuration. `--cut` and `--rank` are text that sets a number and what differs by name.

    Raises BadRequest for a configuration that cannot be.
    """
    shapes = options_of(settings["cut_layer"], settings["rank"], TrainingConfig())
    own = TrainingConfig.method if method == _CENTRALISED else method
    return TrainingConfig.of(**{**settings, **shapes}, method=own)


def _spec(model: str, dataset: str, devices: str, training: TrainingConfig, wait: float) -> pb.JobSpec:
    if not dataset:
        raise BadRequest("--dataset is missing: the name under which the devices offer their text")
    names, count = _devices(devices)
    return pb.JobSpec(
        method=training.method,
        model=model_name(model),
        dataset=dataset,
        devices=names,
        device_count=count,
        training=training.to_json(),
        wait_seconds=wait,
    )


def _warn(training: TrainingConfig) -> None:
    """Tells what may not be expected of these choices."""
    if training.devices.labels == "server":
        console.print("labels are at the server: the coordinator can read the devices' text", style="bold")
    if training.dlora.kills and training.dlora.killed == KEEP:
        line = "killed modules are kept, and still exchanged: that saves the devices' gradients, not messages"
        console.print(f"{line}; --killed merge or drop does", style="bold")


def _tell_submitted(job: str, as_json: bool) -> None:
    if as_json:
        print_json({"job": job})
    else:
        console.print(f"job {job} is submitted; `isthmus watch {job}` follows it")


def _follow(connection: Connection, job: pb.Job, out: Path | None, as_json: bool) -> None:
    """Shows the job until it ends, and its report; Ctrl-C cancels it.

    out: where the adapter goes; None to leave it at the coordinator.
    """
    try:
        ended = follow(connection, job, as_json=as_json)
    except KeyboardInterrupt:
        connection.stub.CancelJob(pb.JobRequest(id=job.id))
        console.print(f"job {job.id} is cancelled; isthmus finetune --resume {job.id} goes on from its last checkpoint")
        raise typer.Exit(130) from None
    check_ended_well(ended)
    report = json.loads(ended.report)
    if out is not None:
        from isthmus.coordinator.cli.jobs import write_export

        report["adapter"] = str(write_export(connection, job.id, out))
    if as_json:
        print_json(report)
        return
    print_report(report)
    where = report["adapter"] or f"on each device, in its state folder under jobs/{job.id}/adapter"
    console.print(f"job {job.id} is done; adapter: {where}", soft_wrap=True)
    if out is None and report["adapter"]:
        console.print(f"isthmus export {job.id} --out DIR writes it where you want it")


def _centralised(model: str, files: list[Path], out: Path | None, training: TrainingConfig, as_json: bool) -> None:
    if not files or out is None:
        raise BadRequest("--method centralised trains here: give it --data FILE (repeatable) and --out DIR")
    from rich.progress import Progress

    from isthmus.split.training.centralised import train_centralised

    with Progress(console=console, disable=as_json) as bar:
        task = bar.add_task("unsplit training", total=training.steps)
        result = train_centralised(
            model, files, out, training, tell=lambda step, loss: bar.update(task, completed=step)
        )
    if as_json:
        print_json(asdict(result))
    else:
        if result.perplexity_after is not None:
            console.print(
                f"held-out perplexity: {result.perplexity_after:.3f} (before: {result.perplexity_before:.3f})"
            )
        console.print(f"adapter: {result.adapter}", soft_wrap=True)


def _devices(text: str) -> tuple[list[str], int]:
    if text.strip().isdigit():
        if int(text) == 0:
            raise BadRequest("--devices 0: at least one device has to take part")
        return [], int(text)
    return [name.strip() for name in text.split(",") if name.strip()], 0
