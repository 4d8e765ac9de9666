"""What splitting costs: tokens per second of plain peft, of the split in one process, and of the split over gRPC.

All of them train the same adapter from the same seed on batches of the same size. The variants take turns, round
after round, and every ratio is taken within a round: a machine that is slower for a minute is so for all of them.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import JsonFile, command, console, describe, machine, run_job, table, write_json
from coordinator.cli.common import Connection, human_bytes
from coordinator.local_cluster import LocalCluster
from split.adapters.lora import lora_config
from split.config import TrainingConfig
from split.data import Sequences, batch_indices, sequences_of_file
from split.local import train_split_locally
from split.models.source import ModelFolder, open_model

UNSPLIT, LOCAL, ONE, THREE = "unsplit", "split_local", "grpc_one_device", "grpc_three_devices"
VARIANTS = {UNSPLIT: 1, LOCAL: 1, ONE: 1, THREE: 3}  # and their batches a step
_DEVICES = ("edge-1", "edge-2", "edge-3")
_DATASET = "text"
_WARM_UP = 3  # steps that are not counted: allocation, caches, and the counting of FLOPs in the very first


@dataclass(frozen=True)
class Workload:
    """One model, and what each device trains on in a step."""

    name: str
    model: str  # as a job names it
    batch_size: int
    sequence_length: int

    def training(self, steps: int, cut_layer: int) -> TrainingConfig:
        return TrainingConfig(
            cut_layer=cut_layer,
            steps=steps + _WARM_UP,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            precision="float32",
            aggregate_every=10,
            checkpoint_every=steps + _WARM_UP,  # at the end, behind the last step that is timed
            validation_fraction=0,
        )

    @property
    def tokens(self) -> int:
        """That one device trains on in a step."""
        return self.batch_size * self.sequence_length


def write_random_llama(folder: Path) -> Path:
    """A Llama of 97.5 million random parameters and a tokenizer of bytes, in hub format."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast  # its constructor is not typed
    fast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def write_text(path: Path, seed: int) -> Path:
    """Words of random letters: what a step computes does not depend on what the text says."""
    rng = random.Random(seed)
    words = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(30_000))
    path.write_text(" ".join(words) + "\n")
    return path


def time_unsplit(folder: Path, text: Sequences, config: TrainingConfig) -> list[float]:
    """The loop that a user of plain peft writes. Returns when each step was done, in seconds."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, lora_config(config, base.config))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    times = []
    for step in range(config.steps):
        rows = batch_indices(len(text), config.batch_size, step, config.seed)
        loss = model(input_ids=text.input_ids[rows], labels=text.labels[rows], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    return times


def time_split_locally(folder: Path, text: Sequences, config: TrainingConfig) -> list[float]:
    """The same over a LocalLink, device and server in this process."""
    times: list[float] = []

    def tell(kind: str, device: str, data: dict[str, Any]) -> None:
        if kind == "step":
            times.append(time.perf_counter())

    train_split_locally(ModelFolder(folder), config, [(text, None)], tell=tell)
    return times


def step_seconds(times: Sequence[float]) -> list[float]:
    """From when each step was done: how long the steps after the warm-up took."""
    return [after - before for before, after in pairwise(times[_WARM_UP - 1 :])]


def summarise(workload: Workload, rounds: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """rounds: for each, a variant's seconds of every step. Ratios are the median over rounds of a round's own."""
    speeds = [
        {name: VARIANTS[name] * workload.tokens / median(seconds) for name, seconds in one.items()} for one in rounds
    ]
    result: dict[str, Any] = {
        "tokens_a_device_and_step": workload.tokens,
        "batch_size": workload.batch_size,
        "sequence_length": workload.sequence_length,
        "tokens_per_second": {name: median(speed[name] for speed in speeds) for name in rounds[0]},
    }
    for name in rounds[0]:
        if name != UNSPLIT:
            ratios = [speed[name] / speed[UNSPLIT] for speed in speeds]
            result[f"{name}_over_unsplit"] = median(ratios)
            result[f"{name}_over_unsplit_rounds"] = ratios
    result["step_seconds"] = [{name: list(seconds) for name, seconds in one.items()} for one in rounds]
    return result


def measure(
    workload: Workload, folder: Path, connection: Connection, *, rounds: int, steps: int, cut: int
) -> dict[str, Any]:
    """All variants in turn, `rounds` times; the order is turned around in every second round."""
    config = workload.training(steps, cut)
    source = open_model(workload.model)
    text, _ = sequences_of_file(folder / f"{_DEVICES[0]}.txt", config.data, source.tokenizer())
    reports: dict[str, dict[str, Any]] = {}

    def over_grpc(variant: str) -> list[float]:
        job = run_job(connection, workload.model, _DATASET, _DEVICES[: VARIANTS[variant]], config)
        reports[variant] = job.report
        return job.step_times

    variants: dict[str, Callable[[], list[float]]] = {
        UNSPLIT: lambda: time_unsplit(source.path, text, config),
        LOCAL: lambda: time_split_locally(source.path, text, config),
        ONE: lambda: over_grpc(ONE),
        THREE: lambda: over_grpc(THREE),
    }
    measured = []
    for number in range(rounds):
        one: dict[str, list[float]] = {}
        for name in list(variants) if number % 2 == 0 else list(reversed(variants)):
            with console.status(f"{workload.name}, round {number + 1} of {rounds}: {name}"):
                one[name] = step_seconds(variants[name]())
        measured.append(one)
    result = {"model": workload.name, "cut_layer": cut, "steps": steps, **summarise(workload, measured)}
    device = reports[ONE]["devices"][0]
    result["bytes_a_step"] = {
        "sent": device["bytes_sent"] / config.steps,
        "received": device["bytes_received"] / config.steps,
    }
    result["waited_share"] = device["wait_seconds"] / (device["wait_seconds"] + device["compute_seconds"])
    return result


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
    rounds: Annotated[int, typer.Option(help="Times that all variants take their turn.", min=1)] = 3,
    steps: Annotated[
        int, typer.Option(help="Timed steps of the large model in a turn; the small has 4 x as many.", min=2)
    ] = 12,
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
    result: dict[str, Any] = {"machine": machine(), "models": {}}
    console.print(describe(result["machine"]))
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as temporary, LocalCluster(Path(temporary)) as cluster:
        folder = Path(temporary)
        large = str(write_random_llama(folder / "llama")) if only != "default" else ""
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
                    measured = measure(workload, folder, connection, rounds=rounds, steps=timed, cut=cut)
                    result["models"][key] = measured
                    show(measured)
    first = next(iter(result["models"].values()))  # the large one's are the headline
    result.update({key: value for key, value in first.items() if key.endswith("_over_unsplit")})
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
