"""`isthmus demo`: the whole path on this machine - a coordinator on Ray, three devices, one SplitLoRA job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from coordinator.cli.common import console, human_bytes
from coordinator.cli.jobs import write_export
from coordinator.cli.watch import check_ended_well, follow
from coordinator.local_cluster import LocalCluster, submit
from protos.v1 import coordinator_pb2 as pb
from split.config import TrainingConfig
from split.documents import DataConfig, read_documents, split_documents
from split.errors import BadRequest, IsthmusError
from split.models.default_model import DEFAULT_MODEL_FOLDER
from split.perplexity import PERPLEXITY
from split.stdlib_text import PRIVATE_MODULES, private_text

_MARKER = ".isthmus-demo"  # what says that a folder is an earlier demo's and may be replaced
_DATASET = "notes"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the held-out text and the logs.")] = Path(
        "isthmus-demo"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 50,
    cut_layer: Annotated[int, typer.Option(help="Blocks that each device holds.")] = 2,
    labels: Annotated[str, typer.Option(help="device or server (see `isthmus finetune --help`).")] = "device",
) -> None:
    """Fine-tune the default model by SplitLoRA over a coordinator and three devices, each a process of its own.

    Each device has text that the model has not seen and the others do not have:
    the sources of one part of Python's standard library.

    Example: isthmus demo --json report.json
    """
    if json_file is not None:
        json_file.touch()  # a place that cannot be written to is known now, not at the end
    folder = _fresh(out.expanduser().resolve())
    training = TrainingConfig(
        cut_layer=cut_layer,
        labels=labels,
        steps=steps,
        batch_size=8,
        sequence_length=128,
        learning_rate=4e-3,
        warmup_steps=5,
        aggregate_every=10,
        checkpoint_every=20,
        validation_fraction=0.05,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )
    texts, held_out = _private_texts(folder, training.data)
    started = time.monotonic()
    with LocalCluster(folder) as cluster:
        with console.status("starting the coordinator on Ray"):
            cluster.start_coordinator()
        with console.status("enrolling and starting three devices"):
            for name, path in texts.items():
                cluster.start_device(name, {_DATASET: path}, arguments=["--threads", "1"])
            cluster.wait_connected(list(texts))
        console.print(
            f"coordinator on 127.0.0.1:{cluster.ports[0]}, devices {', '.join(texts)}; logs in {folder / 'logs'}"
        )
        with cluster.connect() as connection:
            spec = pb.JobSpec(
                method="splitlora", model="default", dataset=_DATASET, devices=list(texts), training=training.to_json()
            )
            job = submit(connection, spec)
            ended = follow(connection, job, as_json=False)
            check_ended_well(ended)
            report = json.loads(ended.report)
            adapter = write_export(connection, job.id, folder / "adapter")
        with console.status("stopping the processes"):
            cluster.stop()
    with console.status(
        "measuring the unsplit model: memory of its training, perplexity in plain transformers and peft"
    ):
        peaks = {
            "whole_model_bytes": _whole_model_peak(folder, next(iter(texts.values())), training),
            "libraries_bytes": _libraries_peak(),
        }
        from split.evaluate import evaluate_files  # torch and transformers: only now

        check = evaluate_files("default", held_out, adapter=adapter, data=training.data)
    result = _result(report, adapter, held_out, training, peaks, check.perplexity, time.monotonic() - started)
    _show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"report: {json_file}")


def _fresh(folder: Path) -> Path:
    """An empty folder; an earlier demo's is replaced, anything else is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).exists():
            raise BadRequest(f"{folder} is not empty and not an earlier demo's; choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    return folder


def _private_texts(folder: Path, config: DataConfig) -> tuple[dict[str, Path], list[Path]]:
    """A text for each device, and beside them what each will hold out, for whoever wants to repeat the evaluation."""
    texts, held_out = {}, []
    for part in ("texts", "held-out"):
        (folder / part).mkdir()
    for module in PRIVATE_MODULES:
        name = module.strip("_")
        texts[name] = folder / "texts" / f"{name}.txt"
        texts[name].write_text(private_text([module]))
        _, validation = split_documents(read_documents(texts[name], config), config.validation_fraction)
        path = folder / "held-out" / f"{name}.txt"
        path.write_text("".join(document.text for document in validation))
        held_out.append(path)
    return texts, held_out


def _whole_model_peak(folder: Path, text: Path, training: TrainingConfig) -> int:
    """Peak memory of a process that trains the whole model unsplit, on one device's text with one device's batch."""
    command = [sys.executable, "-m", "coordinator.cli.main", "finetune", "--method", "centralised", "--json"]
    command += ["--data", str(text), "--out", str(folder / "unsplit"), "--steps", "3", "--validation-fraction", "0"]
    command += ["--batch-size", str(training.batch_size), "--sequence-length", str(training.sequence_length)]
    command += ["--target-modules", ",".join(training.target_modules)]
    return int(json.loads(_output_of(command, "the unsplit run"))["resources"]["peak_bytes"])


def _libraries_peak() -> int:
    """Peak memory of a process that has imported what a device imports, and has no model."""
    program = "import client.runner, split.ledger; print(split.ledger.peak_bytes())"
    return int(_output_of([sys.executable, "-c", program], "importing the device's libraries"))


def _output_of(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise IsthmusError(f"{what} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def _result(
    report: dict[str, Any],
    adapter: Path,
    held_out: list[Path],
    training: TrainingConfig,
    peaks: dict[str, int],
    unsplit_perplexity: float,
    seconds: float,
) -> dict[str, Any]:
    return {
        "perplexity_before": report["perplexity_before"],
        "perplexity_after": report["perplexity_after"],
        "perplexity_after_unsplit": unsplit_perplexity,
        "perplexity_definition": PERPLEXITY,
        "base_model": str(DEFAULT_MODEL_FOLDER),
        "adapter": str(adapter),
        "validation_files": [str(path) for path in held_out],
        "sequence_length": training.sequence_length,
        "devices": report["devices"],
        "coordinator": report["coordinator"],
        **peaks,
        "training": report["training"],
        "losses": report["losses"],
        "seconds": seconds,
    }


def _show(result: dict[str, Any]) -> None:
    before, after = result["perplexity_before"], result["perplexity_after"]
    console.print(f"held-out perplexity: {before:.3f} before, {after:.3f} after", style="bold")
    console.print(
        f"the adapter in the unsplit model, by plain transformers and peft: {result['perplexity_after_unsplit']:.3f}"
    )
    table = Table("process", "sent", "received", "peak memory", "of the whole model's")
    whole = result["whole_model_bytes"]
    for device in result["devices"]:
        share = f"{100 * device['peak_bytes'] / whole:.0f} %"
        sent, received = human_bytes(device["bytes_sent"]), human_bytes(device["bytes_received"])
        table.add_row(f"device {device['name']}", sent, received, human_bytes(device["peak_bytes"]), share)
    peak = result["coordinator"]["peak_bytes"]
    table.add_row("coordinator's stage", "", "", human_bytes(peak), f"{100 * peak / whole:.0f} %")
    table.add_row("the whole model, unsplit", "", "", human_bytes(whole), "100 %")
    libraries = result["libraries_bytes"]
    table.add_row("in each: the libraries", "", "", human_bytes(libraries), f"{100 * libraries / whole:.0f} %")
    console.print(table)
    console.print(f"adapter: {result['adapter']}", soft_wrap=True)
    console.print(f"done in {result['seconds']:.0f} s", highlight=False)
