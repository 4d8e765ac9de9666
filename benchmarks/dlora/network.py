"""What DLoRA costs a device on a narrow link, for real: against LoRA of the whole model there, and SplitLoRA.

A coordinator on Ray and one device daemon, real processes, gRPC over mutual TLS, through an emulated link. Both have
one thread. Each job has a device of its own, since a process's peak memory is that of all that it ever did.

    local        unsplit LoRA in one process: what a device would need that does it all itself
    splitlora    the device trains its own block, the coordinator the others
    dlora        the device trains all modules; all of them are active
    killing      the same with Kill and Revive, killed modules merged
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.harness import (
    ALL_LINEAR,
    E2E_FILE,
    ONE_THREAD,
    DataFile,
    JsonFile,
    begin,
    bench_cluster,
    columns_of,
    command,
    console,
    in_own_process,
    start_job,
    table,
    write_json,
)
from isthmus.coordinator.cli.common import human_bytes
from isthmus.coordinator.emulation import LinkSpec
from isthmus.coordinator.emulation.local_cluster import LocalCluster, events_of, wait_for_job
from isthmus.split.job.config import TrainingConfig
from isthmus.split.training.centralised import train_centralised

LOCAL, SPLITLORA, DLORA, KILLING = "local", "splitlora", "dlora", "killing"
_DATASET = "text"
_ALLOWED = "splitlora,dlora,labels-leave,modules-leave"


@dataclass(frozen=True)
class Row:
    """One job. FLOPs and bytes: of the whole job over its steps, FLOPs with both evaluations in them, bytes without.
    Speed: of the last quarter of the steps (local: of all, in a run without evaluations). peak: of the process."""

    method: str
    perplexity: float | None
    steps_per_second: float
    flops_a_step: float
    bytes_a_step: float  # both ways
    peak_bytes: int


def training_of(method: str, base: TrainingConfig) -> TrainingConfig:
    if method in (SPLITLORA, LOCAL):
        return base
    active = base.but(method="dlora")
    if method == DLORA:
        return active
    third = base.steps // 3
    return active.but(active_fraction=0.125, killed="merge", kill_warmup=max(1, third // 3), kill_anneal=third // 3)


def over_the_link(cluster: LocalCluster, name: str, model: str, training: TrainingConfig) -> Row:
    with cluster.connect() as connection:
        job = start_job(connection, model, _DATASET, [name], training)
        report = wait_for_job(connection, job)
        events = events_of(connection, job, "step")
    times = [event.time for event in events if event.step.step > 3 * training.steps // 4]
    device = report["devices"][0]
    sizes = sum(
        row["payload_bytes"] + row["overhead_bytes"]
        for row in device["traffic"]
        if row["kind"].split()[0] in ("forward", "backward", "step", "aggregate", "merge")
    )
    return Row(
        method=name,
        perplexity=report["perplexity_after"],
        steps_per_second=1 / median(after - before for before, after in pairwise(times)),
        flops_a_step=device["flops"] / training.steps,
        bytes_a_step=sizes / training.steps,
        peak_bytes=int(device["peak_bytes"]),
    )


def on_the_device(text: Path, model: str, training: TrainingConfig, folder: Path) -> Row:
    """Train once to measure the result and the memory, and once more without evaluations for the speed."""
    report = in_own_process(train_centralised, model, [text], folder / "local", training, threads=1)
    bare = training.but(validation_fraction=0)
    timed = in_own_process(train_centralised, model, [text], folder / "timed", bare, threads=1)
    return Row(
        method=LOCAL,
        perplexity=report.perplexity_after,
        steps_per_second=training.steps / timed.resources["compute_seconds"],
        flops_a_step=report.resources["flops"] / training.steps,
        bytes_a_step=0.0,
        peak_bytes=int(report.resources["peak_bytes"]),
    )


def show(link: str, rows: Sequence[Row]) -> None:
    lines = [
        (
            row.method,
            "" if row.perplexity is None else f"{row.perplexity:.3f}",
            f"{row.steps_per_second:.2f}",
            f"{row.flops_a_step / 1e9:.2f} G",
            human_bytes(row.bytes_a_step),
            human_bytes(row.peak_bytes),
        )
        for row in rows
    ]
    columns = ("method", "held-out perplexity", "steps/s", "device FLOPs a step", "bytes a step", "device's peak")
    console.print(table(f"one device on {link}", columns, lines))


def base_training(data: Path, steps: int, codec: str) -> TrainingConfig:
    """Of SplitLoRA and local; the other methods' differ as `training_of` says."""
    return TrainingConfig.of(
        steps=steps,
        batch_size=4,
        sequence_length=64,
        learning_rate=4e-3,
        warmup_steps=min(10, steps // 2),
        precision="float32",
        codec=codec,
        target_modules=ALL_LINEAR,
        **columns_of(data),
    )


def measure(data: Path, model: str, base: TrainingConfig, link: LinkSpec) -> list[Row]:
    """The jobs one after the other."""
    rows: list[Row] = []
    with bench_cluster(coordinator_threads=1) as cluster:
        with console.status(LOCAL):
            rows.append(on_the_device(data, model, base, cluster.folder))
        with console.status("starting the coordinator"):
            cluster.start_coordinator(stage_ports=2)
        for method in (SPLITLORA, DLORA, KILLING):
            with console.status(method):
                arguments = [*ONE_THREAD, "--allow", _ALLOWED]
                cluster.start_device(method, {_DATASET: data}, link=link, arguments=arguments)
                cluster.wait_connected([method])
                rows.append(over_the_link(cluster, method, model, training_of(method, base)))
                cluster.kill(method)
    return rows


def main(
    data: DataFile = E2E_FILE,
    model: Annotated[str, typer.Option(help="Folder in hub format, or default.")] = "default",
    link: Annotated[str, typer.Option(help="RATE,ROUND-TRIP.")] = "20mbit,40ms",
    steps: Annotated[int, typer.Option(help="Of each job.", min=8)] = 60,
    codec: Annotated[str, typer.Option(help="What crosses as what, for all methods.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Perplexity, FLOPs, memory, bytes and speed of a device: local LoRA, SplitLoRA, DLoRA with and without killing.

    Example: python -m benchmarks.dlora.network --link 20mbit,40ms --json dlora_network.json
    """
    base, spec = base_training(data, steps, codec), LinkSpec.parse_short(link)
    result = begin(training=asdict(base), model=model, link=link)
    rows = measure(data, model, base, spec)
    show(link, rows)
    result["rows"] = [asdict(row) for row in rows]
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
