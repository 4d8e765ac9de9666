"""SplitLoRA against centralised LoRA on E2E: held-out perplexity, and what it costs a device.

Three devices hold different text (by the kind of food that a restaurant serves); the centralised run has the batches
of all three as one, so both see the same number of samples. Every perplexity is that of the exported adapter in the
unsplit model, by plain transformers and peft, on the same held-out text.
"""

from __future__ import annotations

import csv
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGTERM
from statistics import fmean
from typing import Annotated

import typer

from benchmarks.harness import (
    ALL_LINEAR,
    E2E_COLUMNS,
    E2E_FILE,
    ONE_THREAD,
    JsonFile,
    begin,
    bench_cluster,
    command,
    console,
    in_own_process,
    start_job,
    table,
    write_json,
)
from isthmus.coordinator.cli.common import human_bytes
from isthmus.coordinator.cli.jobs import write_export
from isthmus.coordinator.emulation.local_cluster import LocalCluster, wait_for_job
from isthmus.split.data.documents import read_documents, split_documents
from isthmus.split.errors import BadData
from isthmus.split.job.config import TrainingConfig
from isthmus.split.models.source import open_model
from isthmus.split.plan.parts import parts_of
from isthmus.split.training.centralised import train_centralised
from isthmus.split.training.evaluate import evaluate_files

CENTRALISED = "centralised"
LABELS = ("device", "server")
_MODEL, _DATASET = "default", "e2e"
_PROMPT, _COMPLETION = E2E_COLUMNS.values()
_FOOD = re.compile(r"\bfood\[([^\]]*)\]")

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Result:
    """One run. What is of a device is the mean over devices (bytes) or the most of any (FLOPs, memory)."""

    method: str  # centralised, or splitlora with labels
    labels: str
    rank: int
    seed: int
    perplexity: float
    seconds: float  # from submission to adapter, with loading and both evaluations
    trainable_parameters: int  # of a device
    flops: float
    peak_bytes: int
    bytes_sent: float
    bytes_received: float
    loss_before_last_tenth: float  # training loss, mean over a tenth of the steps: about equal where the curve is flat
    loss_last_tenth: float

    @property
    def name(self) -> str:
        return self.method if self.method == CENTRALISED else f"splitlora, labels at {self.labels}"


def read_e2e(path: Path) -> Rows:
    """The rows of an E2E file. Raises BadData with what to do for one that is not there or has other columns."""
    if not path.is_file():
        raise BadData(f"no E2E data at {path}: name its devset.csv (columns {_PROMPT} and {_COMPLETION}) with --data")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {_PROMPT, _COMPLETION} - set(reader.fieldnames or ())
        if missing:
            raise BadData(f"{path.name} has no column {', '.join(sorted(missing))}: name a file of the E2E data")
        return list(reader)


def split_by_food(rows: Rows) -> dict[str, Rows]:
    """A device for each of the two commonest kinds of food, and `others`: who serves one seldom serves another."""
    foods = [match[1] if (match := _FOOD.search(row[_PROMPT])) else "" for row in rows]
    counts = Counter(food for food in foods if food)
    common = sorted(counts, key=lambda food: (-counts[food], food))[:2]
    parts: dict[str, Rows] = {name: [] for name in [*map(_device, common), "others"]}
    for food, row in zip(foods, rows, strict=True):
        parts[_device(food) if food in common else "others"].append(row)
    return parts


def _device(food: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", food.lower()).strip("-")


def write_rows(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [_PROMPT, _COMPLETION], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def last_tenths(losses: Sequence[float]) -> tuple[float, float]:
    """The mean loss of the last tenth of the steps but one, and of the last."""
    size = max(1, len(losses) // 10)
    return fmean(losses[-2 * size : -size] or losses), fmean(losses[-size:])


def over_centralised(results: Sequence[Result]) -> dict[str, dict[int, float]]:
    """Labels -> rank -> perplexity of SplitLoRA over that of the centralised run, the mean over seeds."""
    yardstick = {(r.rank, r.seed): r.perplexity for r in results if r.method == CENTRALISED}
    ratios: dict[str, dict[int, list[float]]] = {}
    for result in results:
        if result.method != CENTRALISED:
            ratio = result.perplexity / yardstick[result.rank, result.seed]
            ratios.setdefault(result.labels, {}).setdefault(result.rank, []).append(ratio)
    return {labels: {rank: fmean(each) for rank, each in ranks.items()} for labels, ranks in ratios.items()}


def worst_ratio(ratios: Mapping[str, Mapping[int, float]]) -> tuple[float, int]:
    """The worse of the two label modes at rank 8 (or at the largest rank that was run), and that rank."""
    ranks = next(iter(ratios.values()))
    rank = 8 if 8 in ranks else max(ranks)
    return max(each[rank] for each in ratios.values()), rank


class Bench:
    """The files of one benchmark, and its runs."""

    def __init__(self, folder: Path, rows: Rows) -> None:
        self.folder = folder
        parts = split_by_food(rows)
        self.files = {name: write_rows(folder / f"{name}.csv", part) for name, part in parts.items()}
        self.held_out: list[Path] = []

    def hold_out(self, training: TrainingConfig) -> None:
        """Writes what each device will hold out, for the evaluation of the exported adapters."""
        for name, path in self.files.items():
            _, documents = split_documents(read_documents(path, training.text), training.text.validation_fraction)
            rows = [{_PROMPT: document.prompt, _COMPLETION: document.text} for document in documents]
            self.held_out.append(write_rows(self.folder / f"{name}-held-out.csv", rows))

    def perplexity(self, training: TrainingConfig, adapter: Path | None) -> float:
        return evaluate_files(_MODEL, self.held_out, adapter=adapter, data=training.text).perplexity

    def centralised(self, training: TrainingConfig) -> Result:
        """In a process of its own, so that its peak memory is its own."""
        out = self.folder / f"centralised-{training.lora.rank}-{training.seed}"
        started = time.monotonic()
        report = in_own_process(train_centralised, _MODEL, list(self.files.values()), out, training)
        seconds = time.monotonic() - started
        before, last = last_tenths(report.losses)
        return Result(
            method=CENTRALISED,
            labels="",
            rank=training.lora.rank,
            seed=training.seed,
            perplexity=self.perplexity(training, out),
            seconds=seconds,
            trainable_parameters=report.trainable_parameters,
            flops=report.resources["flops"],
            peak_bytes=report.resources["peak_bytes"],
            bytes_sent=0,
            bytes_received=0,
            loss_before_last_tenth=before,
            loss_last_tenth=last,
        )

    def splitlora(self, cluster: LocalCluster, training: TrainingConfig) -> Result:
        self.start_devices(cluster)
        started = time.monotonic()
        with cluster.connect() as connection:
            job = start_job(connection, _MODEL, _DATASET, list(self.files), training)
            report = wait_for_job(connection, job)
            seconds = time.monotonic() - started
            adapter = write_export(connection, job, self.folder / f"adapter-{job}")
        devices = report["devices"]
        before, last = last_tenths(report["losses"])
        parts = parts_of(open_model(_MODEL).config, training)
        return Result(
            method="splitlora",
            labels=training.devices.labels,
            rank=training.lora.rank,
            seed=training.seed,
            perplexity=self.perplexity(training, adapter),
            seconds=seconds,
            trainable_parameters=sum(value.numel() for value in parts.adapter.values()),
            flops=max(device["flops"] for device in devices),
            peak_bytes=max(device["peak_bytes"] for device in devices),
            bytes_sent=fmean(device["bytes_sent"] for device in devices),
            bytes_received=fmean(device["bytes_received"] for device in devices),
            loss_before_last_tenth=before,
            loss_last_tenth=last,
        )

    def start_devices(self, cluster: LocalCluster) -> None:
        """New processes for every job, since a process's peak memory is that of all that it ever did."""
        for name, path in self.files.items():
            enrolled = name in cluster.processes
            if enrolled:
                cluster.kill(name, SIGTERM)
            cluster.start_device(name, {_DATASET: path}, arguments=ONE_THREAD, enrolled=enrolled)
        cluster.wait_connected(list(self.files))


def show(results: Sequence[Result], base: float) -> None:
    ratios = over_centralised(results)
    rows = [
        (
            result.name,
            result.rank,
            f"{result.perplexity:.3f}",
            f"{ratios[result.labels][result.rank]:.4f}" if result.labels else "1",
            human_bytes(result.bytes_sent),
            human_bytes(result.bytes_received),
            f"{result.flops / 1e12:.2f} T",
            human_bytes(result.peak_bytes),
            f"{result.trainable_parameters:,}",
            f"{result.seconds:.0f}",
        )
        for result in results
    ]
    columns = ("method", "rank", "perplexity", "over central.", "sent", "received", "FLOPs", "peak", "trained", "s")
    console.print(f"held-out perplexity of the base model: {base:.3f}")
    console.print(table("a device's share (centralised: the whole of it)", columns, rows))


def main(
    data: Annotated[Path, typer.Option(help="E2E's devset.csv (columns mr and ref).")] = E2E_FILE,
    steps: Annotated[int, typer.Option(help="Optimiser steps of every run.", min=2)] = 150,
    ranks: Annotated[str, typer.Option(help="R,R,...")] = "1,2,4,8",
    cut: Annotated[int, typer.Option(help="Blocks that a device holds.", min=0)] = 1,
    seeds: Annotated[int, typer.Option(help="Runs of each, with seeds 0, 1, ...", min=1)] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="10 steps, an eighth of the rows, rank 8: does it run?")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Centralised LoRA against SplitLoRA (labels at the devices, and at the server) on three devices' E2E text.

    Example: python -m benchmarks.methods --data e2e/devset.csv --json methods.json
    """
    rows = read_e2e(data)
    if quick:
        rows, steps, ranks = rows[::8], 10, "8"
    chosen = [int(rank) for rank in ranks.split(",")]
    base = TrainingConfig.of(
        cut_layer=cut,
        steps=steps,
        batch_size=4,
        sequence_length=128,
        learning_rate=4e-3,
        warmup_steps=min(10, steps // 2),
        precision="float32",
        codec="none",
        micro_batches=1,
        aggregate_every=5,
        target_modules=ALL_LINEAR,
        **E2E_COLUMNS,
    )
    result = begin(training=asdict(base))
    results: list[Result] = []
    with bench_cluster() as cluster:
        bench = Bench(cluster.folder, rows)
        bench.hold_out(base)
        before = bench.perplexity(base, None)
        runs = [base.but(rank=rank, seed=seed) for seed in range(seeds) for rank in chosen]
        for training in runs:  # before the cluster is there: nothing else runs beside them
            with console.status(f"centralised, rank {training.lora.rank}, seed {training.seed}"):
                results.append(bench.centralised(training))
        with console.status("starting the coordinator"):
            cluster.start_coordinator()
        for training in [training.but(labels=labels) for labels in LABELS for training in runs]:
            with console.status(
                f"splitlora, labels {training.devices.labels}, rank {training.lora.rank}, seed {training.seed}"
            ):
                results.append(bench.splitlora(cluster, training))
    show(results, before)
    ratios = over_centralised(results)
    worst, rank = worst_ratio(ratios)
    console.print(f"SplitLoRA over centralised, rank {rank}, the worse label mode: {worst:.4f}")
    result |= {
        "data": data.name,
        "rows_a_device": {name: len(part) for name, part in split_by_food(rows).items()},
        "perplexity_before": before,
        "splitlora_over_centralised_perplexity": worst,
        "splitlora_over_centralised_perplexity_rank": rank,
        "splitlora_over_centralised_perplexity_by_labels_and_rank": ratios,
        "runs": [asdict(each) for each in results],
    }
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
