"""Training over narrow links: a plain split, ours, and ours on a link without limits.

A coordinator on Ray and one device daemon, real processes, gRPC over mutual TLS, through an emulated link (a TCP proxy
with a rate and a delay, `isthmus link`). Device and stage have one thread each, so that on two cores neither takes the
other's: two machines of one core.

    plain      float32, one micro-batch: every transfer is waited for
    ours       --codec auto: compressed and overlapped, as the job chooses by itself
    unlimited  the same on loopback, without the emulated link
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.common import JsonFile, command, console, describe, machine, start_job, table, write_json
from benchmarks.split_training import write_random_llama
from isthmus.coordinator.cli.common import human_bytes
from isthmus.coordinator.emulation import LinkSpec
from isthmus.coordinator.emulation.local_cluster import LocalCluster, events_of, wait_for_job
from isthmus.split.data.stdlib_text import PRIVATE_MODULES, private_text
from isthmus.split.errors import BadData, BadRequest
from isthmus.split.job.config import TrainingConfig

LINKS = ("100mbit,10ms", "20mbit,40ms", "5mbit,100ms")
HEADLINE = "20mbit,40ms"
PLAIN, OURS, STALE, UNLIMITED = "plain", "ours", "ours, stale", "unlimited"
_DATASET = "text"
_ONE_THREAD = ("--threads", "1")
_TRAINING_KINDS = ("forward", "backward", "aggregate", "step", "probe")


@dataclass(frozen=True)
class Measured:
    """One job. Seconds are medians over the steps after the plan has settled, aggregations included in their means."""

    variant: str
    link: str
    step_seconds: float  # mean
    median_step_seconds: float
    tokens_per_second: float
    bytes_a_step: dict[str, float]  # sent, received, of the settled steps: messages of training
    link_seconds_a_step: float
    plan: str  # the last sentence of it


def job(cluster: LocalCluster, device: str, model: str, training: TrainingConfig, variant: str, link: str) -> Measured:
    """Runs it; the first half of the steps, in which `auto` looks at the link and at the tensors, is not counted."""
    with cluster.connect() as connection:
        started = start_job(connection, model, _DATASET, [device], training)
        report = wait_for_job(connection, started)
        events = events_of(connection, started)
    times = {event.step.step: event.time for event in events if event.HasField("step")}
    settled = [times[step] for step in sorted(times) if step >= training.steps // 2]
    seconds = [after - before for before, after in pairwise(settled)]
    plans = [event.log.message for event in events if event.HasField("log")]
    row = report["devices"][0]
    mean = sum(seconds) / len(seconds)
    return Measured(
        variant,
        link,
        mean,
        median(seconds),
        training.batch_size * training.text.sequence_length / mean,
        bytes_a_step(row["traffic"], training),
        row["link_seconds"] / training.steps,
        plans[-1] if plans else "",
    )


def bytes_a_step(traffic: Sequence[dict[str, Any]], training: TrainingConfig) -> dict[str, float]:
    """Over the whole job, looks at the link included. The traffic is the stage's: what it received, the device sent."""
    sizes = {"sent": 0.0, "received": 0.0}
    for way, other in (("received", "sent"), ("sent", "received")):
        for kind in _TRAINING_KINDS:
            rows = [row for row in traffic if (row["direction"], row["kind"]) == (way, kind)]
            total = sum(row["payload_bytes"] + row["overhead_bytes"] for row in rows)
            sizes[other] += total / training.steps
    return sizes


def bound(measured: Measured, spec: LinkSpec, unlimited: Measured) -> float:
    """Seconds that no overlap within a step can beat: the longest of the transfers of one direction, of the computing
    and coding (as on the link without limits), and of the two round trips of a step that waits for the one before."""
    up = 8 * measured.bytes_a_step["sent"] / spec.up_rate
    down = 8 * measured.bytes_a_step["received"] / spec.down_rate
    return max(up, down, unlimited.step_seconds, 4 * spec.delay)


def _cluster(folder: str) -> LocalCluster:
    return LocalCluster(Path(folder), coordinator_threads=1)


def show(model: str, results: Sequence[Measured], bounds: dict[str, float]) -> None:
    unlimited = next(one for one in results if one.variant == UNLIMITED)
    rows = []
    for one in results:
        limit = f"{bounds[one.link]:.2f}" if one.variant == OURS else ""
        rows.append(
            (
                f"{one.link}: {one.variant}",
                f"{one.tokens_per_second:.0f}",
                f"{one.tokens_per_second / unlimited.tokens_per_second:.2f}",
                f"{one.step_seconds:.2f}",
                limit,
                human_bytes(one.bytes_a_step["sent"]),
                human_bytes(one.bytes_a_step["received"]),
                f"{one.link_seconds_a_step:.2f}",
            )
        )
    columns = ("link", "tokens/s", "of unlimited", "s a step", "bound", "sent", "received", "waited for the link")
    console.print(table(f"{model}: a device's training", columns, rows))
    for one in results:
        if one.plan:
            console.print(f"{one.link}, {one.variant}: {one.plan}", soft_wrap=True)


def main(
    model: Annotated[
        str, typer.Option(help="default, large (97.5 million random parameters), or a folder.")
    ] = "default",
    data: Annotated[
        Path | None, typer.Option(help="The device's text; without it, a part of Python's library.")
    ] = None,
    links: Annotated[str, typer.Option(help="RATE,ROUND_TRIP;...")] = ";".join(LINKS),
    steps: Annotated[int, typer.Option(help="Steps of each job; the second half is timed.", min=20)] = 60,
    plain_steps: Annotated[int, typer.Option(help="Steps of the plain jobs, which are slow.", min=4)] = 12,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    sequence_length: Annotated[int, typer.Option(min=8)] = 128,
    cut: Annotated[int, typer.Option(help="Blocks that a device holds.", min=0)] = 1,
    stale: Annotated[bool, typer.Option(help="Measure --overlap stale too.")] = True,
    json_file: JsonFile = None,
) -> None:
    """Tokens per second over narrow links, against a plain split and against a link without limits.

    Example: python -m benchmarks.slow_link --json slow_link.json
    """
    specs = {text: LinkSpec.parse_short(text) for text in links.split(";")}
    if data is not None and not data.is_file():
        raise BadData(f"no text at {data}")
    if steps % 10 or plain_steps > steps:
        raise BadRequest("--steps has to be a multiple of 10, and no less than --plain-steps")
    ours = TrainingConfig.of(
        cut_layer=cut,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        precision="float32",
        aggregate_every=10,
        checkpoint_every=1_000_000,
        validation_fraction=0,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )
    plain = ours.but(codec="none", micro_batches=1, steps=plain_steps)
    result: dict[str, Any] = {"machine": machine(), "training": asdict(ours), "model": model}
    console.print(describe(result["machine"]))
    results: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as temporary, _cluster(temporary) as cluster:
        folder = Path(temporary)
        name = str(write_random_llama(folder / "llama")) if model == "large" else model
        text = data or folder / "text.txt"
        if data is None:
            text.write_text(private_text(PRIVATE_MODULES))
        with console.status("starting the coordinator and a device for each link"):
            cluster.start_coordinator(stage_ports=2)
            cluster.start_device("unlimited", {_DATASET: text}, arguments=_ONE_THREAD)
            devices = {link: f"link-{number}" for number, link in enumerate(specs)}
            for link, spec in specs.items():
                cluster.start_device(devices[link], {_DATASET: text}, link=spec, arguments=_ONE_THREAD)
            cluster.wait_connected(["unlimited", *devices.values()])
        runs = [("unlimited", "", UNLIMITED, ours)]
        for link in specs:
            runs += [(devices[link], link, PLAIN, plain), (devices[link], link, OURS, ours)]
            if stale:
                runs.append((devices[link], link, STALE, ours.but(overlap="stale")))
        runs.append(("unlimited", "", UNLIMITED, ours))  # again: this machine's speed may drift
        for device, link, variant, training in runs:
            with console.status(f"{link} {variant}"):
                results.append(job(cluster, device, name, training, variant, link))
    first, last = (one for one in results if one.variant == UNLIMITED)
    unlimited = first if first.step_seconds <= last.step_seconds else last
    results = [unlimited, *(one for one in results if one.variant != UNLIMITED)]
    speeds = {(one.link, one.variant): one for one in results}
    bounds = {link: bound(speeds[link, OURS], spec, unlimited) for link, spec in specs.items()}
    show(model, results, bounds)
    for link in specs:
        mine = speeds[link, OURS].tokens_per_second
        result[link] = {
            "speedup_over_plain": mine / speeds[link, PLAIN].tokens_per_second,
            "fraction_of_unlimited": mine / unlimited.tokens_per_second,
            "bound_seconds": bounds[link],
            "fewer_bytes_than_plain": sum(speeds[link, PLAIN].bytes_a_step.values())
            / sum(speeds[link, OURS].bytes_a_step.values()),
        }
        console.print(f"{link}: " + ", ".join(f"{key} {value:.2f}" for key, value in result[link].items()))
    headline = result.get(HEADLINE, next(iter(result[link] for link in specs)))
    result |= {key: headline[key] for key in ("speedup_over_plain", "fraction_of_unlimited")}
    result["unlimited_drift"] = max(first.step_seconds, last.step_seconds) / unlimited.step_seconds
    if math.isfinite(result["unlimited_drift"]) and result["unlimited_drift"] > 1.2:
        console.print(f"the machine's speed drifted by {result['unlimited_drift']:.2f} meanwhile", style="yellow")
    result["runs"] = [asdict(one) for one in results]
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
