"""What splitting costs: tokens per second of plain peft, of the split in one process, and of the split over gRPC.

All of them train the same adapter from the same seed on batches of the same size. Every variant and the unsplit run
take turns of a few steps, each with its processes stopped while the other computes, and a ratio is that of two turns
beside each other: a machine that is slower for some seconds is so for both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.harness import JsonFile, begin, bench_cluster, command, console, start_job, table, write_json
from benchmarks.random_llama import model_named
from benchmarks.turns import Turns, child, over_grpc, take_turns
from isthmus.coordinator.cli.common import human_bytes
from isthmus.coordinator.connection import Connection
from isthmus.coordinator.emulation.local_cluster import LocalCluster, wait_for_job
from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.data.sequences import Sequences, batch_indices, sequences_of_file
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.lora import lora_config
from isthmus.split.methods.local import train_locally
from isthmus.split.models.source import ModelFolder, open_model

UNSPLIT, LOCAL, ONE, THREE = "unsplit", "split_local", "grpc_one_device", "grpc_three_devices"
VARIANTS = {LOCAL: 1, ONE: 1, THREE: 3}  # and their devices
_DEVICES = ("edge-1", "edge-2", "edge-3")
_DATASET = "text"
_ENDLESS = 1_000_000  # steps: a run is ended after its last turn


@dataclass(frozen=True)
class Workload:
    """One model, and what each device trains on in a step."""

    name: str
    model: str  # as a job names it
    batch_size: int
    sequence_length: int

    def training(self, cut_layer: int) -> TrainingConfig:
        return TrainingConfig.of(
            cut_layer=cut_layer,
            steps=_ENDLESS,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            precision="float32",
            codec="none",
            micro_batches=1,
            aggregate_every=10,
            checkpoint_every=_ENDLESS,
            validation_fraction=0,
        )

    @property
    def tokens(self) -> int:
        """That one device trains on in a step."""
        return self.batch_size * self.sequence_length


def write_text(path: Path, seed: int) -> Path:
    """Words of random letters: what a step computes does not depend on what the text says."""
    rng = random.Random(seed)
    words = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(30_000))
    path.write_text(" ".join(words) + "\n")
    return path


def bytes_a_step(connection: Connection, model: str, training: TrainingConfig) -> dict[str, float]:
    """What one device sends and receives in a short job, by step, with an aggregation in every `aggregate_every`."""
    short = training.but(steps=training.devices.aggregate_every)
    device = wait_for_job(connection, start_job(connection, model, _DATASET, _DEVICES[:1], short))["devices"][0]
    return {way: device[f"bytes_{way}"] / short.steps for way in ("sent", "received")}


def train_unsplit(model: str, text_file: Path, config: TrainingConfig, step_done: Callable[[], None]) -> None:
    """The loop that a user of plain peft writes."""
    source, text = _text(model, text_file, config)
    base = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    peft_model = get_peft_model(base, lora_config(config, base.config))
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay
    )
    for step in range(config.steps):
        rows = batch_indices(len(text), config.batch_size, step, config.seed)
        loss = peft_model(input_ids=text.input_ids[rows], labels=text.labels[rows], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        step_done()


def train_split(model: str, text_file: Path, config: TrainingConfig, step_done: Callable[[], None]) -> None:
    """The same over a LocalLink, device and server in one process."""
    source, text = _text(model, text_file, config)

    def tell(event: Event) -> None:
        if event.HasField("step"):
            step_done()

    train_locally(source, config, [(text, None)], tell=tell)


def _text(model: str, file: Path, config: TrainingConfig) -> tuple[ModelFolder, Sequences]:
    source = open_model(model)
    text, _ = sequences_of_file(file, config.text, source.tokenizer())
    return source, text


def summarise(workload: Workload, turns: Mapping[str, Turns]) -> dict[str, Any]:
    """turns: of each split variant. Speeds and ratios are medians over turns, a ratio that of two beside each other."""

    def speed(seconds: Sequence[float], batches: int) -> float:
        return batches * workload.tokens * len(seconds) / sum(seconds)

    speeds = {
        name: [(speed(unsplit, 1), speed(split, VARIANTS[name])) for unsplit, split in pairs]
        for name, pairs in turns.items()
    }
    result: dict[str, Any] = {
        "tokens_a_device_and_step": workload.tokens,
        "batch_size": workload.batch_size,
        "sequence_length": workload.sequence_length,
        "tokens_per_second": {
            UNSPLIT: median(unsplit for pairs in speeds.values() for unsplit, _ in pairs),
            **{name: median(split for _, split in pairs) for name, pairs in speeds.items()},
        },
    }
    for name, pairs in speeds.items():
        ratios = [split / unsplit for unsplit, split in pairs]
        result[f"{name}_over_unsplit"] = median(ratios)
        result[f"{name}_over_unsplit_turns"] = ratios
    result["step_seconds"] = {
        name: [{UNSPLIT: list(unsplit), name: list(split)} for unsplit, split in pairs] for name, pairs in turns.items()
    }
    return result


def measure(
    workload: Workload,
    folder: Path,
    cluster: LocalCluster,
    connection: Connection,
    *,
    rounds: int,
    steps: int,
    cut: int,
) -> dict[str, Any]:
    """Each variant against the unsplit run."""
    config = workload.training(cut)
    arguments = (workload.model, folder / f"{_DEVICES[0]}.txt", config)
    turns: dict[str, Turns] = {}
    for name, devices in VARIANTS.items():
        with (
            console.status(f"{workload.name}: {name}, in turns with {UNSPLIT}"),
            child(train_unsplit, *arguments) as unsplit,
        ):
            unsplit.turn(1)  # it has loaded, and is stopped
            if name == LOCAL:
                with child(train_split, *arguments) as run:
                    turns[name] = take_turns(unsplit, run, rounds, steps)
                continue
            job = start_job(connection, workload.model, _DATASET, _DEVICES[:devices], config)
            with over_grpc(cluster, connection, _DEVICES[:devices], job) as run:
                turns[name] = take_turns(unsplit, run, rounds, steps)
    result = {"model": workload.name, "cut_layer": cut, "rounds": rounds, "steps": steps, **summarise(workload, turns)}
    return {**result, "bytes_a_step": bytes_a_step(connection, workload.model, config)}


def show(result: dict[str, Any]) -> None:
    title = (
        f"{result['model']}: {result['batch_size']} x {result['sequence_length']} tokens a device and step, "
        f"cut {result['cut_layer']}, float32"
    )
    rows = [
        (name.replace("_", " "), f"{speed:.0f}", f"{result.get(f'{name}_over_unsplit', 1.0):.3f}")
        for name, speed in result["tokens_per_second"].items()
    ]
    console.print(table(title, ("variant", "tokens/s", "over unsplit"), rows))
    sent, received = (human_bytes(result["bytes_a_step"][way]) for way in ("sent", "received"))
    console.print(f"a device sends {sent} and receives {received} a step\n")


def main(
    rounds: Annotated[int, typer.Option(help="Turns that are counted of every variant.", min=1)] = 8,
    steps: Annotated[
        int, typer.Option(help="Timed steps of the large model in a turn; the small has 4 x as many.", min=1)
    ] = 2,
    cut: Annotated[int, typer.Option(help="Blocks that a device holds.", min=0)] = 1,
    only: Annotated[str, typer.Option(help="large or default: measure just this model.")] = "",
    json_file: JsonFile = None,
) -> None:
    """Tokens per second of LoRA training: unsplit, split in one process, split over gRPC with one and three devices.

    The large model is a Llama of 97.5 million random parameters (12 layers of 768), the other the default model.

    Example: python -m benchmarks.split_training --json split_training.json
    """
    if only not in ("", "large", "default"):
        raise typer.BadParameter(f"{only!r}: choose large or default", param_hint="--only")
    result = begin(models={})
    with bench_cluster() as cluster:
        folder = cluster.folder
        large = model_named("large", folder) if only != "default" else ""
        workloads = {"large": (Workload("Llama, 97.5 million", large, 4, 256), steps)}
        workloads["default"] = (Workload("default", "default", 8, 128), 4 * steps)
        with console.status("starting the coordinator and three devices"):
            cluster.start_coordinator()
            for number, name in enumerate(_DEVICES):
                cluster.start_device(name, {_DATASET: write_text(folder / f"{name}.txt", number)})
            cluster.wait_connected(_DEVICES)
        with cluster.connect() as connection:
            for key, (workload, timed) in workloads.items():
                if only in ("", key):
                    measured = measure(workload, folder, cluster, connection, rounds=rounds, steps=timed, cut=cut)
                    result["models"][key] = measured
                    show(measured)
    first = next(iter(result["models"].values()))  # the large one's are the headline
    result.update({key: value for key, value in first.items() if key.endswith("_over_unsplit")})
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
