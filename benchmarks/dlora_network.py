"""What DLoRA costs a device on a narrow link, for real: against LoRA of the whole model there, and SplitLoRA.

A coordinator on Ray and one device daemon, real processes, gRPC over mutual TLS, through an emulated link. Both have
one thread. Each job has a device of its own, since a process's peak memory is that of all that it ever did.

    local        unsplit LoRA in one process: what a device would need that does it all itself
    splitlora    the device trains its own block, the coordinator the others
    dlora        the device trains all modules; all of them are active
    killing      the same with Kill and Revive, killed modules merged
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.common import JsonFile, command, console, describe, machine, start_job, table, write_json
from isthmus.coordinator.cli.common import human_bytes
from isthmus.coordinator.emulation import LinkSpec
from isthmus.coordinator.emulation.local_cluster import LocalCluster, events_of, wait_for_job
from isthmus.split.errors import BadData, IsthmusError
from isthmus.split.job.config import TrainingConfig

LOCAL, SPLITLORA, DLORA, KILLING = "local", "splitlora", "dlora", "killing"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DATASET = "text"
_SHARED = Path(__file__).parents[2] / "shared" / "data"
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
    """In a process of its own, with one thread."""
    call = [sys.executable, "-m", "isthmus.coordinator.cli.main", "finetune", "--method", "centralised", "--json"]
    call += ["--model", model, "--data", str(text), "--out", str(folder / "local")]
    for key, value in asdict(training).items():
        if key in (
            "rank",
            "steps",
            "batch_size",
            "sequence_length",
            "learning_rate",
            "warmup_steps",
            "seed",
            "precision",
        ):
            call.append(f"--{key.replace('_', '-')}={value}")
    call.append(f"--target-modules={','.join(training.lora.target_modules)}")
    if training.text.prompt_column and training.text.completion_column:
        call += ["--prompt-column", training.text.prompt_column, "--completion-column", training.text.completion_column]
    report, _ = _run(call)
    _, seconds = _run([*call, f"--out={folder / 'timed'}", "--validation-fraction=0"])
    resources = report["resources"]
    return Row(
        method=LOCAL,
        perplexity=report["perplexity_after"],
        steps_per_second=training.steps / seconds,
        flops_a_step=resources["flops"] / training.steps,
        bytes_a_step=0.0,
        peak_bytes=int(resources["peak_bytes"]),
    )


def _run(call: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Its report, and the seconds that it computed."""
    done = subprocess.run(call, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise IsthmusError(f"the local run failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report, report["resources"]["compute_seconds"]


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
    columns = {"prompt_column": "mr", "completion_column": "ref"} if data.suffix == ".csv" else {}
    return TrainingConfig.of(
        steps=steps,
        batch_size=4,
        sequence_length=64,
        learning_rate=4e-3,
        warmup_steps=min(10, steps // 2),
        precision="float32",
        codec=codec,
        target_modules=MODULES,
        **columns,  # type: ignore[arg-type]
    )


def measure(data: Path, model: str, base: TrainingConfig, link: LinkSpec) -> list[Row]:
    """The jobs one after the other."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as temporary:
        folder = Path(temporary)
        with console.status(LOCAL):
            rows.append(on_the_device(data, model, base, folder))
        with LocalCluster(folder, coordinator_threads=1) as cluster:
            with console.status("starting the coordinator"):
                cluster.start_coordinator(stage_ports=2)
            for method in (SPLITLORA, DLORA, KILLING):
                with console.status(method):
                    arguments = ["--threads", "1", "--allow", _ALLOWED]
                    cluster.start_device(method, {_DATASET: data}, link=link, arguments=arguments)
                    cluster.wait_connected([method])
                    rows.append(over_the_link(cluster, method, model, training_of(method, base)))
                    cluster.kill(method)
    return rows


def main(
    data: Annotated[Path, typer.Option(help="E2E's devset.csv, or a text.")] = _SHARED / "e2e" / "devset.csv",
    model: Annotated[str, typer.Option(help="Folder in hub format, or default.")] = "default",
    link: Annotated[str, typer.Option(help="RATE,ROUND-TRIP.")] = "20mbit,40ms",
    steps: Annotated[int, typer.Option(help="Of each job.", min=8)] = 60,
    codec: Annotated[str, typer.Option(help="What crosses as what, for all methods.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Perplexity, FLOPs, memory, bytes and speed of a device: local LoRA, SplitLoRA, DLoRA with and without killing.

    Example: python -m benchmarks.dlora_network --link 20mbit,40ms --json dlora_network.json
    """
    if not data.is_file():
        raise BadData(f"no text at {data}: name E2E's devset.csv or a .txt file with --data")
    base, spec = base_training(data, steps, codec), LinkSpec.parse_short(link)
    result: dict[str, Any] = {"machine": machine(), "training": asdict(base), "model": model, "link": link}
    console.print(describe(result["machine"]))
    rows = measure(data, model, base, spec)
    show(link, rows)
    result["rows"] = [asdict(row) for row in rows]
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
