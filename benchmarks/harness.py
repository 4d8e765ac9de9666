"""What the benchmarks share: their command line, the machine that they ran on, tables, JSON, data, processes, clusters.

A benchmark's `main` is run by `command`. It begins its result with `begin`, prints tables, and ends with `write_json`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import psutil
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from isthmus.coordinator.connection import Connection
from isthmus.coordinator.emulation import LinkSpec
from isthmus.coordinator.emulation.local_cluster import LocalCluster, submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadData, BadRequest, IsthmusError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.runtime.speed import processor

T = TypeVar("T")

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Target modules: every linear module of a Llama's block."""

ONE_THREAD = ("--threads", "1")
"""Arguments of a device that leaves the machine's other processors to the others."""

DATA = Path(os.environ.get("ISTHMUS_BENCHMARK_DATA", "."))
"""The folder where data is looked for that no option names."""

E2E_COLUMNS = {"prompt_column": "mr", "completion_column": "ref"}
NOT_QUIET = 0.5  # load at the start, in the mean of the last minute, above which a machine was not quiet

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
E2eFile = Annotated[Path, typer.Option(help="E2E's devset.csv.")]
ShakespeareFile = Annotated[Path, typer.Option(help="A text.")]
DataNames = Annotated[str, typer.Option(help="Which of the two, by commas.")]
DataFile = Annotated[Path, typer.Option(help="E2E's devset.csv, or a text.")]
E2E_FILE, SHAKESPEARE_FILE = DATA / "e2e" / "devset.csv", DATA / "shakespeare" / "input.txt"


# ---- the result ----


def begin(**facts: Any) -> dict[str, Any]:
    """Begin a benchmark's result with the machine and what else it has to be read with, and print the machine."""
    result = {"machine": machine(), **facts}
    console.print(describe(result["machine"]))
    if result["machine"]["load_at_start"] > NOT_QUIET:
        console.print("this machine was not quiet at the start: times are not to be relied on", style="yellow")
    return result


def machine() -> dict[str, Any]:
    """What a figure has to be read with: processor, cores, memory in bytes, load at the start, versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_at_start": round(os.getloadavg()[0], 2),
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


def report_keys(result: Mapping[str, Any], keys: Iterable[str], form: str = ".2f") -> None:
    """Print those of the result's figures that it has, a line each."""
    for key in keys:
        if key in result:
            console.print(f"{key}: {result[key]:{form}}")


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


# ---- data and options ----


def names_in(option: str, text: str, known: Iterable[str]) -> list[str]:
    """The names that an option gives by commas. Raises BadRequest for one that is not known."""
    names, known = [name.strip() for name in text.split(",") if name.strip()], list(known)
    for name in names:
        if name not in known:
            raise BadRequest(f"--{option} {name!r}: choose from {', '.join(known)}")
    return names


def data_named(text: str, files: Mapping[str, Path]) -> list[str]:
    """The names of the data that `--data` gives. Raises BadRequest, and BadData for a file that is not there."""
    names = names_in("data", text, files)
    for name in names:
        if not files[name].is_file():
            raise BadData(f"no {name} data at {files[name]}: name it with --{name}")
    return names


def columns_of(data: Path) -> dict[str, str]:
    """Settings for the columns of a file: E2E's for a .csv, none for a text. Raises BadData if it is not there."""
    if not data.is_file():
        raise BadData(f"no text at {data}: name E2E's devset.csv or a .txt file with --data")
    return E2E_COLUMNS if data.suffix == ".csv" else {}


def links_in(text: str) -> dict[str, LinkSpec]:
    """The emulated links that an option gives as RATE,ROUND_TRIP;..., by their text. Raises BadRequest."""
    return {link: LinkSpec.parse_short(link) for link in text.split(";") if link}


# ---- processes ----


def _prepare(threads: int | None) -> None:
    quieten()
    if threads is not None:
        torch.set_num_threads(threads)


def in_own_process(function: Callable[..., T], *arguments: Any, threads: int | None = None) -> T:
    """Call a function in a process of its own, so that its memory and threads are its own. Raises what it raises.

    threads: of torch; None: as many as it takes.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_prepare, initargs=(threads,)) as pool:
        return pool.submit(function, *arguments).result()


def in_processes(function: Callable[..., T], calls: Sequence[Sequence[Any]], workers: int) -> Iterator[T]:
    """Call a function with each of these arguments, each in a process with one thread; results as they come."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_prepare, initargs=(1,))
    with pool, Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=len(calls))
        started = [pool.submit(function, *arguments) for arguments in calls]
        for done in as_completed(started):
            bar.advance(task)
            yield done.result()


@contextmanager
def bench_cluster(coordinator_threads: int = 0) -> Iterator[LocalCluster]:
    """A cluster in a temporary folder, `cluster.folder`; nothing of it is started yet. coordinator_threads: 0: all."""
    with (
        tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder,
        LocalCluster(Path(folder), coordinator_threads=coordinator_threads) as cluster,
    ):
        yield cluster


def start_job(
    connection: Connection, model: str, dataset: str, devices: Sequence[str], training: TrainingConfig
) -> str:
    """Submit a job of the method that its configuration is for; returns its id."""
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
    """Keep transformers from printing its own bars and warnings in this process."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)


def command(main: Callable[..., None]) -> None:
    """Run a benchmark's command line; what goes wrong is told in one line."""
    quieten()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except IsthmusError as error:
        console.print(f"error: {error}", style="red")
        raise SystemExit(1) from None
