"""Predicted against measured: how well `isthmus serve` foretells the tokens a second of one answer.

A Llama of 97.5 million random parameters (or any model), greedy, 16 tokens of prompt and 64 of answer, in real
processes: one node, and a device with the coordinator on loopback and over emulated links. All share one machine, where
each device measures itself alone. What is compared takes turns, `--rounds` times; each round of a chain is a start of
its own with its own prediction.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.common import JsonFile, command, console, describe, machine, table, write_json
from benchmarks.generate import ANSWER, LINKS, PROMPT, prompt_of
from benchmarks.serving import Served, served, wait_measured
from benchmarks.split_training import write_random_llama
from isthmus.coordinator.emulation import LinkSpec
from isthmus.coordinator.emulation.local_cluster import LocalCluster
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.inference.serving import CLOUD
from isthmus.split.models.source import open_model
from isthmus.split.runtime.choose import AUTO

NEAR, ALONE = "near", "coordinator alone"


def chains(links: list[str], layers: int) -> dict[str, str]:
    """Names of what is compared -> stages. Devices: NEAR on loopback, far-0 ... over the links."""
    half = layers // 2
    found = {
        ALONE: f"{CLOUD}:0-{layers}",
        "device alone": f"{NEAR}:0-{layers}",
        "two spans at the coordinator": f"cloud:0-{half},cloud:{half}-{layers}",
        "two, loopback": f"{NEAR}:0-{half},cloud:{half}-{layers}",
    }
    found |= {f"two, {link}": f"far-{number}:0-{half},cloud:{half}-{layers}" for number, link in enumerate(links)}
    return found


def told(model: Served) -> pb.ServingPlanned:
    """The predictions; none of the coordinator alone."""
    events = model.connection.stub.WatchJob(pb.WatchJobRequest(id=model.job), timeout=60)
    found = pb.ServingPlanned()
    for event in events:
        if event.HasField("plan"):
            found = event.plan
        if event.HasField("serving"):
            break
    events.cancel()
    return found


def measured(model: Served, vocabulary: int) -> float:
    """Tokens a second of an answer after its first token."""

    def seconds(number: int, tokens: int) -> float:
        return model.ask_all([list(prompt_of(PROMPT, number, vocabulary))], tokens)[1]

    seconds(0, ANSWER)  # everything has been touched once
    first = seconds(1, 1)
    return ANSWER / (seconds(2, ANSWER + 1) - first)


def main(
    model: Annotated[str, typer.Option(help="large (97.5 million random parameters), default, or a folder.")] = "large",
    rounds: Annotated[int, typer.Option(help="Starts of every chain.", min=1)] = 3,
    runtime: Annotated[str, typer.Option(help="auto, torch or onnxruntime.")] = AUTO,
    links: Annotated[str, typer.Option(help="RATE,ROUND_TRIP;... or empty.")] = ";".join(LINKS),
    json_file: JsonFile = None,
) -> None:
    """Predicted and measured tokens per second of served chains.

    Example: python -m benchmarks.plan --json plan.json
    """
    specs = {text: LinkSpec.parse_short(text) for text in links.split(";") if text}
    result: dict[str, Any] = {"machine": machine(), "model": model}
    console.print(describe(result["machine"]))
    runs: dict[str, list[dict[str, float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="isthmus-bench-") as temporary,
        LocalCluster(Path(temporary)) as cluster,
    ):
        folder = Path(temporary)
        source = open_model(str(write_random_llama(folder / "llama")) if model == "large" else model)
        vocabulary, layers = source.config.vocab_size, source.config.num_hidden_layers
        cluster.start_coordinator(stage_ports=2)
        for device, spec in [(NEAR, None), *((f"far-{number}", spec) for number, spec in enumerate(specs.values()))]:
            with console.status(f"{device} measures itself"):
                cluster.start_device(device, {}, link=spec)
                cluster.wait_connected([device])
                wait_measured(cluster, [device])
        for _ in range(rounds):
            for name, stages in chains(list(specs), layers).items():
                settings = {"sequences": 4, "context": PROMPT + ANSWER + 1, "runtime": runtime}
                with console.status(name), served(cluster, str(source.path), stages, **settings) as here:
                    run = {"measured": measured(here, vocabulary)}
                    foretold = told(here)
                    runs.setdefault(name, []).append(run)
                if foretold.tokens_per_second:
                    run["predicted"] = foretold.tokens_per_second
                if foretold.single == CLOUD and ALONE in runs:
                    runs[ALONE][-1]["predicted"] = foretold.single_tokens_per_second
    show(runs)
    result["runs"] = runs
    result |= errors(runs)
    console.print(f"prediction_error: {result['prediction_error']:.3f}")
    write_json(json_file, result)


def errors(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """|predicted / measured - 1| of each start that had a prediction: the median of a chain's, and of all."""
    each = {
        name: [abs(run["predicted"] / run["measured"] - 1) for run in some if "predicted" in run]
        for name, some in runs.items()
    }
    found = {name: median(values) for name, values in each.items() if values}
    return {"prediction_errors": found, "prediction_error": median(value for some in each.values() for value in some)}


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    rows = []
    found = errors(runs)["prediction_errors"]
    for name, some in runs.items():
        foretold = [run["predicted"] for run in some if "predicted" in run]
        rows.append(
            (
                name,
                f"{median(foretold):.1f}" if foretold else "",
                f"{median(run['measured'] for run in some):.1f}",
                f"{100 * found[name]:.0f} %" if name in found else "",
            )
        )
    console.print(table("tokens/s, medians of the rounds", ("", "predicted", "measured", "error"), rows))


if __name__ == "__main__":
    command(main)
