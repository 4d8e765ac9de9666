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

from isthmus.coordinator.cli.common import console, human_bytes
from isthmus.coordinator.cli.jobs import write_export
from isthmus.coordinator.cli.watch import check_ended_well, follow
from isthmus.coordinator.connection import Connection
from isthmus.coordinator.emulation import LinkSpec
from isthmus.coordinator.emulation.local_cluster import LocalCluster, submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.data.documents import read_documents, split_documents
from isthmus.split.data.stdlib_text import PRIVATE_MODULES, private_text
from isthmus.split.errors import BadRequest, IsthmusError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import TextSettings
from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER
from isthmus.split.training.perplexity import PERPLEXITY

_MARKER = ".isthmus-demo"  # marks a folder as an earlier demo's, which may be replaced
_DATASET = "notes"
_STAGE_PORTS = 2  # one for the job, and one that something else may take meanwhile


Out = Annotated[Path, typer.Option(help="Folder for the adapter, the held-out text and the logs.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.", min=1)]
CutLayer = Annotated[int, typer.Option(help="Blocks that each device holds.")]
Labels = Annotated[str, typer.Option(help="device or server (see `isthmus finetune --help`).")]
CodecOption = Annotated[str, typer.Option(help="What crosses as what; none: float32 (see `isthmus finetune --help`).")]
Link = Annotated[
    str,
    typer.Option(help="RATE,ROUND-TRIP of each device's own emulated link, such as 20mbit,40ms; empty: none."),
]


def demo(
    out: Out = Path("isthmus-demo"),
    json_file: JsonFile = None,
    steps: Steps = 50,
    cut_layer: CutLayer = 2,
    labels: Labels = "device",
    codec: CodecOption = "auto",
    link: Link = "",
) -> None:
    """Fine-tune the default model by SplitLoRA over a coordinator and three devices, each a process of its own.

    Each device has text that the model has not seen and the others do not have:
    the sources of one part of Python's standard library.

    Example: isthmus demo --link 20mbit,40ms --json report.json
    """
    link_spec = LinkSpec.parse_short(link) if link else None
    if json_file is not None:
        json_file.touch()  # so that a place that cannot be written to shows now
    folder = _fresh(out.expanduser().resolve())
    training = TrainingConfig.of(
        cut_layer=cut_layer,
        labels=labels,
        codec=codec,
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
    texts, held_out = _private_texts(folder, training.text)
    started = time.monotonic()
    report, adapter = _train(folder, texts, training, link_spec)
    peaks, perplexity = _measure_unsplit(folder, texts, held_out, adapter, training)
    result = _result(report, adapter, held_out, training, peaks, perplexity, time.monotonic() - started)
    _show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"report: {json_file}")


def _train(
    folder: Path, texts: dict[str, Path], training: TrainingConfig, link: LinkSpec | None
) -> tuple[dict[str, Any], Path]:
    """Starts coordinator and devices, runs the job and stops them; returns its report and its adapter's folder."""
    with LocalCluster(folder) as cluster:
        with console.status("starting the coordinator on Ray"):
            cluster.start_coordinator(stage_ports=_STAGE_PORTS if link else 0)
        with console.status("enrolling and starting three devices"):
            for name, path in texts.items():
                cluster.start_device(name, {_DATASET: path}, arguments=["--threads", "1"], link=link)
            cluster.wait_connected(list(texts))
        console.print(
            f"coordinator on 127.0.0.1:{cluster.ports[0]}, devices {', '.join(texts)}; logs in {folder / 'logs'}"
        )
        if link:
            console.print(f"each device reaches the coordinator over an emulated link of its own: {link}")
        with cluster.connect() as connection:
            spec = pb.JobSpec(
                method="splitlora", model="default", dataset=_DATASET, devices=list(texts), training=training.to_json()
            )
            job = submit(connection, spec)
            ended = follow(connection, job, as_json=False)
            check_ended_well(ended)
            report = {**json.loads(ended.report), "log": _messages(connection, job.id)}
            adapter = write_export(connection, job.id, folder / "adapter")
        with console.status("stopping the processes"):
            cluster.stop()
    return {**report, "link": str(link or "this machine's loopback")}, adapter


def _measure_unsplit(
    folder: Path, texts: dict[str, Path], held_out: list[Path], adapter: Path, training: TrainingConfig
) -> tuple[dict[str, int], float]:
    """Peak bytes of training the whole model and of the libraries; the adapter's perplexity in the unsplit one."""
    with console.status(
        "measuring the unsplit model: memory of its training, perplexity in plain transformers and peft"
    ):
        peaks = {
            "whole_model_bytes": _whole_model_peak(folder, next(iter(texts.values())), training),
            "libraries_bytes": _libraries_peak(),
            "device_estimate_bytes": _device_estimate(training),
        }
        from isthmus.split.training.evaluate import evaluate_files  # torch and transformers: only now

        check = evaluate_files("default", held_out, adapter=adapter, data=training.text)
    return peaks, check.perplexity


def _fresh(folder: Path) -> Path:
    """An empty folder in place of an earlier demo's. Raises BadRequest for any other folder that is not empty."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).exists():
            raise BadRequest(f"{folder} is not empty and not an earlier demo's; choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    return folder


def _private_texts(folder: Path, config: TextSettings) -> tuple[dict[str, Path], list[Path]]:
    """A text for each device, and files with what each will hold out, for repeating the evaluation."""
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
    """Peak bytes of a process that trains the whole model unsplit, on one device's text with one device's batch."""
    command = [sys.executable, "-m", "isthmus.coordinator.cli.main", "finetune", "--method", "centralised", "--json"]
    command += ["--data", str(text), "--out", str(folder / "unsplit"), "--steps", "3", "--validation-fraction", "0"]
    command += ["--batch-size", str(training.batch_size), "--sequence-length", str(training.text.sequence_length)]
    command += ["--target-modules", ",".join(training.lora.target_modules)]
    return int(json.loads(_output_of(command, "the unsplit run"))["resources"]["peak_bytes"])


def _libraries_peak() -> int:
    """Peak bytes of a process that has imported what a device imports, and has no model."""
    program = "import isthmus.client.runner; from isthmus.split.resources.memory import peak_bytes; print(peak_bytes())"
    return int(_output_of([sys.executable, "-c", program], "importing the device's libraries"))


def _device_estimate(training: TrainingConfig) -> int:
    """Bytes that a device here needs, as estimated by a job that chooses cuts or refuses a device."""
    from isthmus.split.models.source import open_model  # torch and transformers: only now
    from isthmus.split.plan.costs import Costs
    from isthmus.split.plan.memory import training_bytes

    costs = Costs(open_model("default").config, training)
    return int(training_bytes(costs, training.devices.cut_layer, training.lora.rank))


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
        "sequence_length": training.text.sequence_length,
        "link": report["link"],
        "log": report["log"],
        "devices": [{**device, "reduction": _reduction(device["traffic"], training)} for device in report["devices"]],
        "coordinator": report["coordinator"],
        **peaks,
        "training": report["training"],
        "losses": report["losses"],
        "seconds": seconds,
    }


def _messages(connection: Connection, job: str) -> list[str]:
    """Sentences of the job's log, such as how tensors were to cross and why."""
    events = connection.stub.WatchJob(pb.WatchJobRequest(id=job))
    return [event.log.message for event in events if event.HasField("log")]


def _reduction(traffic: list[dict[str, Any]], training: TrainingConfig) -> float:
    """The factor by which a device's training tensors took fewer bytes than as float32.

    traffic: rows of the traffic as the stage counted it.
    """
    hidden_size: int = json.loads((DEFAULT_MODEL_FOLDER / "config.json").read_text())["hidden_size"]
    steps: int = sum(row["messages"] for row in traffic if row["kind"] == "step" and row["direction"] == "received")
    of_training = [row for row in traffic if row["kind"] in ("forward", "backward") and row["codec"]]
    streams = len({(row["direction"], row["kind"]) for row in of_training})
    tokens = steps * training.batch_size * training.text.sequence_length
    values = streams * tokens * hidden_size + (
        tokens if training.devices.labels == "server" else 0
    )  # labels, of 4 bytes too
    payload: int = sum(row["payload_bytes"] for row in of_training)
    return 4 * values / max(1, payload)


def _show(result: dict[str, Any]) -> None:
    before, after = result["perplexity_before"], result["perplexity_after"]
    console.print(f"held-out perplexity: {before:.3f} before, {after:.3f} after", style="bold")
    console.print(
        f"the adapter in the unsplit model, by plain transformers and peft: {result['perplexity_after_unsplit']:.3f}"
    )
    last = {message.partition(":")[0]: message for message in result["log"]}  # by device: how its tensors cross
    for message in last.values():
        console.print(message, highlight=False)
    console.print(f"link: {result['link']}", highlight=False)
    whole = result["whole_model_bytes"]

    def memory(peak: int) -> str:
        return f"{human_bytes(peak)}, {100 * peak / whole:.0f} %"

    table = Table(
        "process", "sent", "received", "than as float32", "waited for the link", "peak memory, of the whole's"
    )
    for device in result["devices"]:
        table.add_row(
            f"device {device['name']}",
            human_bytes(device["bytes_sent"]),
            human_bytes(device["bytes_received"]),
            f"{device['reduction']:.1f} times fewer",
            f"{device['link_seconds']:.1f} s",
            memory(device["peak_bytes"]),
        )
    table.add_row("a device, as estimated before", "", "", "", "", memory(result["device_estimate_bytes"]))
    table.add_row("coordinator's stage", "", "", "", "", memory(result["coordinator"]["peak_bytes"]))
    table.add_row("the whole model, unsplit", "", "", "", "", memory(whole))
    table.add_row("in each: the libraries", "", "", "", "", memory(result["libraries_bytes"]))
    console.print(table)
    console.print(f"adapter: {result['adapter']}", soft_wrap=True)
    console.print(f"done in {result['seconds']:.0f} s", highlight=False)
