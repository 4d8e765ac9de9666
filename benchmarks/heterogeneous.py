"""Devices that differ: the time to a perplexity with one cut and rank for all, against --cut auto --rank auto.

A coordinator on Ray and four device daemons, real processes, gRPC over mutual TLS. The devices have speeds of 1:2:4:8,
the coordinator that of the fastest, all of them emulated: with `--slow-down` each computes with one thread and then
waits until so many times the processor's time have passed, so that the machine idles for much of the time and nobody
takes another's. Their emulated links have 5, 20, 50 and 100 Mbit/s, the slowest device the narrowest. Every job
starts with new device processes and trains on the same text with the same seed. What is compared is the time, from the
first step's start and without that of evaluations, until the held-out perplexity, evaluated over the split and
interpolated between evaluations, is what the worst of the jobs comes to in the end.

    common cut C    every device holds C blocks and has the job's rank
    auto            chosen by the job from what the devices measured

The headline is against the best common cut of those that were run, which nobody knows before having tried them all. It
has a bound. Where devices and coordinator do not compute at the same time, and a block takes the slowest device 1 and
the coordinator s for one device's rows, a common cut c of L blocks takes c + 4 (L - c) s: least at an end, or the same
for all c at s = 1/4. There automatic cuts of x, 2x, 4x, L take x + (3 L - 7 x) / 4, at best 9/16 of that, at x = L/4:
1.78 times faster, and less at any other s, with few blocks, with the head on the devices, or with micro-batches that
overlap. With speeds of 1:2:4:8 automatic cuts cannot be twice as fast as the best common one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from signal import SIGTERM
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.common import JsonFile, command, console, describe, machine, start_job, table, write_json
from isthmus.coordinator.emulation import LinkSpec
from isthmus.coordinator.emulation.local_cluster import LocalCluster, events_of, wait_for_job
from isthmus.split.data.stdlib_text import PRIVATE_MODULES, private_text
from isthmus.split.job.config import TrainingConfig

DEVICES = {"d1": (1, "5mbit,40ms"), "d2": (2, "20mbit,40ms"), "d4": (4, "50mbit,20ms"), "d8": (8, "100mbit,10ms")}
FASTEST = 8
AUTO = "auto"
_DATASET = "text"


@dataclass(frozen=True)
class Measured:
    """One job. perplexities: by step, each with its seconds since the first step began, evaluations not counted."""

    name: str
    shapes: dict[str, list[int]]
    step_seconds: float  # median
    expected_step_seconds: float  # by the planner, of the slowest device; 0: it was not asked
    perplexities: dict[int, tuple[float, float]]
    largest_aggregation_error: float


def job(cluster: LocalCluster, model: str, training: TrainingConfig, name: str) -> Measured:
    with cluster.connect() as connection:
        started = start_job(connection, model, _DATASET, list(DEVICES), training)
        report = wait_for_job(connection, started)
        events = events_of(connection, started)
    steps = {event.step.step: event.time for event in events if event.HasField("step")}
    evaluated = {
        event.evaluation.step: (event.time, event.evaluation.perplexity)
        for event in events
        if event.HasField("evaluation")
    }
    seconds, before = {}, evaluated[0][0]
    total = 0.0
    for step in sorted(steps):  # an evaluation's own time is that between its step and it
        total += steps[step] - before
        seconds[step] = total
        before = evaluated[step][0] if step in evaluated else steps[step]
    perplexities = {step: (seconds.get(step, 0.0), value) for step, (_, value) in sorted(evaluated.items())}
    shapes = {
        one["name"]: [one.get("cut", training.devices.cut_layer), one.get("rank", training.lora.rank)]
        for one in report["devices"]
    }
    expected = max(one.get("step_seconds", 0.0) for one in report["devices"])
    between = [after - first for first, after in pairwise(seconds[step] for step in sorted(seconds))]
    errors = report["aggregation"]["aggregation_error"].values()
    return Measured(name, shapes, median(between), expected, perplexities, max(errors, default=0.0))


def seconds_to(perplexity: float, measured: Measured) -> float:
    """Interpolated in the logarithm of the perplexity; infinite where a job never comes to it."""
    points = [(at, math.log(value)) for _, (at, value) in sorted(measured.perplexities.items())]
    target = math.log(perplexity)
    for (at, one), (later, other) in pairwise(points):
        if other <= target:
            share = 0.0 if one <= target else (one - target) / (one - other)
            return at + share * (later - at)
    return math.inf


def start_devices(cluster: LocalCluster, texts: dict[str, Path], fastest: float, started: bool) -> None:
    """New processes, so that no job's codecs, memory or measurements are another's."""
    for name, (speed, link) in DEVICES.items():
        if started:
            cluster.kill(name, SIGTERM)
        slow_down = fastest * FASTEST / speed
        arguments = ["--threads", "1", "--allow", "splitlora", "--slow-down", str(slow_down)]
        spec = None if started else LinkSpec.parse_short(link)
        cluster.start_device(name, {_DATASET: texts[name]}, link=spec, arguments=arguments, enrolled=started)
    cluster.wait_connected(list(DEVICES))


def show(results: Sequence[Measured], target: float) -> None:
    rows = [
        (
            one.name,
            " ".join(f"{cut}/{rank}" for cut, rank in one.shapes.values()),
            f"{one.step_seconds:.2f}",
            f"{seconds_to(target, one):.0f}",
            f"{list(one.perplexities.values())[-1][1]:.2f}",
            f"{one.largest_aggregation_error:.2g}",
        )
        for one in results
    ]
    columns = ("job", "cut/rank of " + " ".join(DEVICES), "s a step", f"s to {target:.2f}", "at the end", "error")
    console.print(table("four devices with speeds of 1:2:4:8 and links of 5 to 100 Mbit/s", columns, rows))


def main(
    model: Annotated[str, typer.Option(help="default, or a folder.")] = "default",
    cuts: Annotated[str, typer.Option(help="Common ones: C,C,...")] = "1,2,3,5",
    steps: Annotated[int, typer.Option(help="Optimiser steps of every job.", min=10)] = 40,
    rank: Annotated[int, typer.Option(help="Of the job; auto chooses up to it.", min=1)] = 8,
    labels: Annotated[str, typer.Option(help="device or server.")] = "device",
    fastest: Annotated[float, typer.Option(help="--slow-down of the fastest device.", min=1)] = 2.0,
    server: Annotated[float, typer.Option(help="Speed of the coordinator, where the slowest device has 1.")] = FASTEST,
    json_file: JsonFile = None,
) -> None:
    """Time to a given perplexity: one common cut and rank against automatic ones.

    Example: python -m benchmarks.heterogeneous --json heterogeneous.json
    """
    base = TrainingConfig.of(
        labels=labels,
        rank=rank,
        steps=steps,
        batch_size=4,
        sequence_length=64,
        learning_rate=4e-3,
        warmup_steps=5,
        schedule="constant",
        precision="float32",
        aggregate_every=5,
        checkpoint_every=1_000_000,
        evaluate_every=10,
        validation_fraction=0.01,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )
    runs = [(f"common cut {cut}", base.but(cut_layer=int(cut))) for cut in cuts.split(",")]
    runs.append((AUTO, base.but(cuts=AUTO, ranks=AUTO)))
    result: dict[str, Any] = {"machine": machine(), "training": asdict(base), "model": model}
    result |= {"devices": DEVICES, "server_speed": server, "fastest_slow_down": fastest}
    console.print(describe(result["machine"]))
    results: list[Measured] = []
    with (
        tempfile.TemporaryDirectory(prefix="isthmus-bench-") as temporary,
        LocalCluster(Path(temporary), coordinator_threads=1) as cluster,
    ):
        whole = private_text(PRIVATE_MODULES)
        texts = {}
        for number, name in enumerate(DEVICES):
            texts[name] = Path(temporary) / f"{name}.txt"
            size = len(whole) // len(DEVICES)
            texts[name].write_text(whole[number * size : (number + 1) * size])
        with console.status("starting the coordinator"):
            slower = max(1.0, fastest * FASTEST / server)
            cluster.start_coordinator(stage_ports=2, arguments=["--slow-down", str(slower)])
        for number, (name, training) in enumerate(runs):
            with console.status(name):
                start_devices(cluster, texts, fastest, started=number > 0)
                results.append(job(cluster, model, training, name))
    target = max(list(one.perplexities.values())[-1][1] for one in results)
    show(results, target)
    times = {one.name: seconds_to(target, one) for one in results}
    speedups = {name: seconds / times[AUTO] for name, seconds in times.items() if name != AUTO}
    best = min(speedups, key=lambda name: speedups[name])
    console.print(f"auto against the best common cut ({best}): {speedups[best]:.2f}; against each: {speedups}")
    result |= {
        "perplexity": target,
        "seconds": times,
        "speedup_over_common": speedups[best],
        "best_common": best,
        "speedup_over_each_common": speedups,
        "runs": [asdict(one) for one in results],
    }
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
