"""What the benchmarks share: the machine in words, tables, JSON, and jobs on a local cluster."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from isthmus.coordinator.connection import Connection
from isthmus.coordinator.emulation.local_cluster import submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.runtime.speed import processor

console = Console()
if not console.is_terminal:
    console = Console(width=160)  # a log or a pipe: tables are not squeezed into 80 columns


def _touched(path: Path | None) -> Path | None:
    if path is not None:
        path.touch()  # a place that cannot be written to is known now, not at the end
    return path


JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the result to this file.", dir_okay=False, callback=_touched)
]


def machine() -> dict[str, Any]:
    """What a figure has to be read with: processor, cores, memory, load at the start, versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_at_start": round(os.getloadavg()[0], 2),  # the mean of the last minute: above 0.5, it was not quiet
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def describe(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    memory = machine["memory_bytes"] / 2**30
    return (
        f"{machine['processor']}, {machine['cores']} cores ({machine['cpu_capability']}), {memory:.0f} GiB, "
        f"torch {machine['torch']}, Python {machine['python']}; load at the start {machine['load_at_start']}"
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """The first column is the row's name; the others are figures, on the right."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def write_json(path: Path | None, result: dict[str, Any], tell: bool = True) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
        if tell:
            console.print(f"written to {path}")


def start_job(
    connection: Connection, model: str, dataset: str, devices: Sequence[str], training: TrainingConfig
) -> str:
    """Submits a job of the method that its configuration is for; returns its id."""
    spec = pb.JobSpec(
        method=training.method,
        model=model,
        dataset=dataset,
        devices=devices,
        training=training.to_json(),
        wait_seconds=60,
    )
    return submit(connection, spec).id


def quieten() -> None:
    """In this process, no bar for loading weights in the midst of ours, and no warning of transformers about itself."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)


def command(main: Callable[..., None]) -> None:
    """Runs a benchmark's command line; what goes wrong is one line."""
    quieten()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except IsthmusError as error:
        console.print(f"error: {error}", style="red")
        raise SystemExit(1) from None
