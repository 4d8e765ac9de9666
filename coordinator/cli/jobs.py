"""`isthmus jobs`, `watch`, `cancel` and `export`."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.table import Table

from isthmus.coordinator.cli.common import (
    DEFAULT_CREDENTIALS,
    Address,
    CredentialsFolder,
    Json,
    as_dict,
    console,
    new_folder,
    print_json,
)
from isthmus.coordinator.cli.watch import check_ended_well, follow, print_report
from isthmus.coordinator.connection import Connection, connected
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
JobId = Annotated[str, typer.Argument(help="As `isthmus jobs` shows it.")]


def jobs(
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS, coordinator: Address = "", json_output: Json = False
) -> None:
    """List the jobs, oldest first.

    Example: isthmus jobs
    """
    with connected(credentials, coordinator) as connection:
        listed = connection.stub.ListJobs(pb.ListJobsRequest()).jobs
    if json_output:
        print_json([_job_as_dict(job) for job in listed])
        return
    if not listed:
        console.print("no jobs yet; `isthmus finetune` submits one")
        return
    table = Table("job", "state", "step", "model", "dataset", "devices", "since", "message")
    for job in listed:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created))
        table.add_row(
            job.id,
            pb.JobState.Name(job.state).lower(),
            f"{job.step}/{job.steps}",
            Path(job.spec.model).name,
            job.spec.dataset,
            ", ".join(job.devices or job.spec.devices) or str(job.spec.device_count),
            since,
            job.message,
        )
    console.print(table)


def watch(
    job: JobId,
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
    json_output: Json = False,
) -> None:
    """Follow a job until it ends. Ctrl-C stops watching; the job goes on.

    JOB is as `isthmus jobs` shows it.

    Example: isthmus watch k3v9x2ab
    """
    with connected(credentials, coordinator) as connection:
        found = connection.stub.GetJob(pb.JobRequest(id=job))
        try:
            ended = follow(connection, found, as_json=json_output)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    _print(ended.report, as_json=json_output)
    check_ended_well(ended)


def report(
    job: JobId,
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
    json_output: Json = False,
) -> None:
    """Show what a job has taken: computation, memory, energy, money, and bytes on the network.

    A job has a report once it has ended, a served model at any time. JOB is as `isthmus jobs` shows it.

    Example: isthmus report k3v9x2ab
    """
    with connected(credentials, coordinator) as connection:
        text = connection.stub.GetReport(pb.JobRequest(id=job)).report
    _print(text, as_json=json_output)


def _print(report: str, *, as_json: bool) -> None:
    """Prints a report.

    report: the report as JSON; empty if there is none.
    """
    if report and as_json:
        print_json(json.loads(report))
    elif report:
        print_report(json.loads(report))


def cancel(
    job: JobId,
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
    json_output: Json = False,
) -> None:
    """Stop a job. Its last checkpoint is kept; `isthmus finetune --resume JOB` goes on from it.

    Example: isthmus cancel k3v9x2ab
    """
    with connected(credentials, coordinator) as connection:
        ended = connection.stub.CancelJob(pb.JobRequest(id=job))
    if json_output:
        print_json(_job_as_dict(ended))
    else:
        console.print(f"job {job} is cancelled; its last checkpoint is of step {ended.checkpoint_step}")


def export(
    job: JobId,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet, or be empty.")],
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
    json_output: Json = False,
) -> None:
    """Write a job's adapter to a folder: an ordinary PEFT adapter.

    The job has to have succeeded; JOB is as `isthmus jobs` shows it.

    Example: isthmus export k3v9x2ab --out adapter
    """
    with connected(credentials, coordinator) as connection:
        folder = write_export(connection, job, out)
    if json_output:
        print_json({"job": job, "adapter": str(folder)})
    else:
        console.print(f"adapter: {folder}", soft_wrap=True)


def write_export(connection: Connection, job: str, out: Path) -> Path:
    """Streams the adapter's files into `out`, which appears whole or not at all.

    Raises BadRequest for a folder that cannot be made, and IsthmusError for a file that is not an adapter's.
    """
    folder = new_folder(out)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        file: BinaryIO | None = None
        for piece in connection.stub.ExportJob(pb.JobRequest(id=job)):
            if piece.name:
                if piece.name not in _ADAPTER_FILES:
                    raise IsthmusError(f"the coordinator sent {piece.name[:80]!r}, which is no file of an adapter")
                if file is not None:
                    file.close()
                file = (partial / piece.name).open("wb")
            if file is not None:
                file.write(piece.data)
        if file is not None:
            file.close()
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _job_as_dict(job: pb.Job) -> dict[str, Any]:
    fields = as_dict(job)
    fields["spec"]["training"] = json.loads(job.spec.training or "{}")
    fields["report"] = json.loads(job.report) if job.report else None
    return fields
