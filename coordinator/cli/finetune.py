"""`isthmus finetune`: submit a job and follow it, or train the unsplit yardstick here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from isthmus.coordinator.cli.common import (
    DEFAULT_CREDENTIALS,
    Address,
    CredentialsFolder,
    Json,
    console,
    model_name,
    new_folder,
    print_json,
)
from isthmus.coordinator.cli.watch import check_ended_well, follow, print_report
from isthmus.coordinator.connection import connected
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import KEEP
from isthmus.split.job.shapes import options_of

_DEFAULTS = TrainingConfig()
_TEXT = "Text"
_TRAINING = "Training"
_LINK = "Link"
_DLORA = "DLoRA"


def finetune(
    model: Annotated[
        str, typer.Option(help="Folder in hub format or hub id, on the coordinator; or `default`.")
    ] = "default",
    dataset: Annotated[str, typer.Option(help="The name under which the devices' owners offer their text.")] = "",
    devices: Annotated[str, typer.Option(help="NAME,NAME,... or a number: any that offer the dataset.")] = "1",
    method: Annotated[
        str,
        typer.Option(
            help="splitlora: split over the devices. dlora: likewise, but all that is trained is on the devices, each "
            "with an adapter of its own. centralised: unsplit, in this process, on --data (the yardstick)."
        ),
    ] = "splitlora",
    labels: Annotated[
        str,
        typer.Option(
            help="device: text and labels are not sent (U-shaped split; docs/security.md says what a coordinator that "
            "attacks can still work out). server: the paper's form; the labels are the text, so THE COORDINATOR CAN "
            "READ THE TEXT."
        ),
    ] = _DEFAULTS.devices.labels,
    cut: Annotated[
        str,
        typer.Option(
            "--cut",
            "--cut-layer",
            help="A device holds blocks 0..CUT-1. 0: only the embedding: it trains nothing, and what it sends is as "
            "good as the text, for the embedding can be looked up. auto: as its speed, memory and link allow. For "
            "single devices: NAME=CUT,NAME=auto,CUT (the last is for the rest).",
        ),
    ] = str(_DEFAULTS.devices.cut_layer),
    rank: Annotated[
        str,
        typer.Option(
            help="Of LoRA; auto: as a device's speed and link allow. For single devices: NAME=RANK,NAME=auto,RANK. "
            "0: such a device trains nothing. The largest number is the job's, and that of the coordinator's blocks.",
            rich_help_panel=_TRAINING,
        ),
    ] = str(_DEFAULTS.lora.rank),
    aggregation: Annotated[
        str,
        typer.Option(
            help="How the devices' adapters become one. average: A and B each for itself, an approximation, for equal "
            "ranks. padding: the same, with zeros in the place of ranks that a device does not have. stacking: "
            "exact; the sum of all rounds is kept frozen and grows. svd: the exact average, factorised anew to the "
            "job's rank. Empty: average where all ranks are equal, else svd. With dlora only average, and only with "
            "--aggregate.",
            rich_help_panel=_TRAINING,
        ),
    ] = _DEFAULTS.devices.aggregation,
    alpha: Annotated[
        float, typer.Option(help="Of LoRA: its output is scaled by ALPHA/RANK.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.lora.alpha,
    target_modules: Annotated[
        str, typer.Option(help="NAME,NAME,...; empty: the architecture's usual ones.", rich_help_panel=_TRAINING)
    ] = "",
    steps: Annotated[int, typer.Option(help="Optimiser steps.", rich_help_panel=_TRAINING)] = _DEFAULTS.steps,
    batch_size: Annotated[
        int, typer.Option(help="Sequences a device a step.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.batch_size,
    sequence_length: Annotated[
        int, typer.Option(help="Tokens.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.text.sequence_length,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.", rich_help_panel=_TRAINING)] = _DEFAULTS.optimizer.name,
    learning_rate: Annotated[
        float, typer.Option(help="The largest of the schedule.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.optimizer.learning_rate,
    weight_decay: Annotated[
        float, typer.Option(help="Of the LoRA values.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.optimizer.weight_decay,
    schedule: Annotated[
        str, typer.Option(help="constant, or linear or cosine down to 0.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.optimizer.schedule,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps of linear warm-up.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.optimizer.warmup_steps,
    max_gradient_norm: Annotated[
        float, typer.Option(help="Clip the whole model's gradient to it; 0: do not.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.optimizer.max_gradient_norm,
    seed: Annotated[
        int, typer.Option(help="Of LoRA's first values and of the batches.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.seed,
    precision: Annotated[
        str,
        typer.Option(help="float32, bfloat16, or auto: measured on each processor.", rich_help_panel=_TRAINING),
    ] = _DEFAULTS.optimizer.precision,
    codec: Annotated[
        str,
        typer.Option(
            help="What crosses the link as what. auto: as the measured link makes it worth, within --error-budget. Or "
            "a codec of `isthmus codecs` for hidden states and gradients. Or KEY=CODEC;KEY=CODEC with KEY up, down, "
            "hidden, gradients, adapters, evaluation, hidden_up, ...; the rest is auto. none: float32.",
            rich_help_panel=_LINK,
        ),
    ] = _DEFAULTS.link.codec,
    error_budget: Annotated[
        float,
        typer.Option(
            help="By how much of it perplexity may be worse for compression, as `auto` aims at.", rich_help_panel=_LINK
        ),
    ] = _DEFAULTS.link.error_budget,
    micro_batches: Annotated[
        int,
        typer.Option(
            help="Parts of a step's batch that are under way at the same time; 0: as the link makes it worth.",
            rich_help_panel=_LINK,
        ),
    ] = _DEFAULTS.link.micro_batches,
    overlap: Annotated[
        str,
        typer.Option(
            help="exact. stale: a device begins its next step before the last gradient has come, with adapter values "
            "that are one step old: faster on a slow link, and another result.",
            rich_help_panel=_LINK,
        ),
    ] = _DEFAULTS.link.overlap,
    active_fraction: Annotated[
        float,
        typer.Option(
            help="Kill and Revive goes down to modules that take this share of all modules' bytes; 1: it kills none. "
            "With --killed keep it saves the device's gradients only: bytes with merge or drop.",
            rich_help_panel=_DLORA,
        ),
    ] = _DEFAULTS.dlora.active_fraction,
    bytes_per_step: Annotated[
        int,
        typer.Option(
            help="Instead: down to so many bytes a step of a device, both ways. Takes --killed merge or drop.",
            rich_help_panel=_DLORA,
        ),
    ] = _DEFAULTS.dlora.bytes_per_step,
    killed: Annotated[
        str,
        typer.Option(
            help="A killed module. keep: frozen, and still exchanged, which saves no bytes. merge: frozen, and its "
            "values go to the coordinator, which applies it (the device's owner has to allow modules-leave). drop: "
            "left out.",
            rich_help_panel=_DLORA,
        ),
    ] = _DEFAULTS.dlora.killed,
    kill_warmup: Annotated[
        int | None,
        typer.Option(
            help="Steps with all modules active, which score them. Left out: 15 % of the steps, 30 at most.",
            rich_help_panel=_DLORA,
        ),
    ] = _DEFAULTS.dlora.kill_warmup,
    kill_anneal: Annotated[
        int | None,
        typer.Option(
            help="Steps in which the share goes down from there. Left out: 35 % of the steps, 100 at most.",
            rich_help_panel=_DLORA,
        ),
    ] = _DEFAULTS.dlora.kill_anneal,
    kill_interval: Annotated[
        int | None, typer.Option(help="Steps between decisions. Left out: 10.", rich_help_panel=_DLORA)
    ] = _DEFAULTS.dlora.kill_interval,
    aggregate: Annotated[
        bool,
        typer.Option(
            "--aggregate",
            help="Average the devices' adapters every --aggregate-every steps (owners have to allow modules-leave).",
            rich_help_panel=_DLORA,
        ),
    ] = False,
    aggregate_every: Annotated[
        int,
        typer.Option(
            help="Steps between averages of the devices' adapters; with dlora, takes --aggregate.",
            rich_help_panel=_TRAINING,
        ),
    ] = _DEFAULTS.devices.aggregate_every,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps; rounded up to an aggregation.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.devices.checkpoint_every,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps; 0: before the first and after the last.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.devices.evaluate_every,
    packing: Annotated[
        str,
        typer.Option(help="packed: text cut into full sequences. padded: a record a sequence.", rich_help_panel=_TEXT),
    ] = _DEFAULTS.text.packing,
    text_column: Annotated[str | None, typer.Option(help="Of .csv and .jsonl.", rich_help_panel=_TEXT)] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Takes no loss.", rich_help_panel=_TEXT)] = None,
    completion_column: Annotated[str | None, typer.Option(help="Takes the loss.", rich_help_panel=_TEXT)] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the text held out, by hash.", rich_help_panel=_TEXT)
    ] = _DEFAULTS.text.validation_fraction,
    data: Annotated[list[Path] | None, typer.Option(help="Files for --method centralised. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the adapter to this folder when it is done.")] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for devices that are missing.", min=1)] = 300,
    resume: Annotated[
        str, typer.Option(help="Go on with this job from its last checkpoint; its options are used.")
    ] = "",
    detach: Annotated[bool, typer.Option(help="Submit and return.")] = False,
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
    json_output: Json = False,
) -> None:
    """Fine-tune a model with LoRA on text that stays on the devices.

    Ctrl-C cancels the job that it started; the last checkpoint is kept.

    Example: isthmus finetune --model default --dataset notes --devices phone,laptop --steps 200
    """
    training = TrainingConfig.of(
        **options_of(cut, rank, _DEFAULTS),
        labels=labels,
        aggregation=aggregation,
        alpha=alpha,
        target_modules=tuple(part.strip() for part in target_modules.split(",") if part.strip()),
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup_steps=warmup_steps,
        max_gradient_norm=max_gradient_norm,
        seed=seed,
        precision=precision,
        codec=codec,
        error_budget=error_budget,
        micro_batches=micro_batches,
        overlap=overlap,
        aggregate_every=aggregate_every,
        checkpoint_every=checkpoint_every,
        evaluate_every=evaluate_every,
        packing=packing,
        text_column=text_column,
        prompt_column=prompt_column,
        completion_column=completion_column,
        validation_fraction=validation_fraction,
        method="splitlora" if method == "centralised" else method,
        active_fraction=active_fraction,
        bytes_per_step=bytes_per_step,
        killed=killed,
        kill_warmup=kill_warmup,
        kill_anneal=kill_anneal,
        kill_interval=kill_interval,
        aggregate=aggregate,
    )
    if not training.averages and out is not None:
        raise BadRequest("--out: the devices keep their adapters; only with --aggregate there is one to write here")
    if out is not None:
        out = new_folder(out)
    if method == "centralised":
        if dataset or resume or detach or devices != "1":
            raise BadRequest(
                "--dataset, --devices, --resume and --detach are of jobs; --method centralised trains here"
            )
        _centralised(model, data or [], out, training, json_output)
        return
    if data:
        raise BadRequest(
            "--data is for --method centralised; a device's text is offered by its owner: isthmus-client run --data"
        )
    if detach and out is not None:
        raise BadRequest("--detach returns before there is an adapter; `isthmus export JOB --out DIR` writes it later")
    request = pb.SubmitJobRequest(resume=resume)
    if not resume:
        if not dataset:
            raise BadRequest("--dataset is missing: the name under which the devices offer their text")
        names, count = _devices(devices)
        request.spec.CopyFrom(
            pb.JobSpec(
                method="splitlora" if method == "centralised" else method,
                model=model_name(model),
                dataset=dataset,
                devices=names,
                device_count=count,
                training=training.to_json(),
                wait_seconds=wait,
            )
        )
    if not json_output and labels == "server" and not resume:
        console.print("labels are at the server: the coordinator can read the devices' text", style="bold")
    if not json_output and training.dlora.kills and training.dlora.killed == KEEP and not resume:
        line = "killed modules are kept, and still exchanged: that saves the devices' gradients, not messages"
        console.print(f"{line}; --killed merge or drop does", style="bold")
    with connected(credentials, coordinator) as connection:
        job = connection.stub.SubmitJob(request)
        if detach:
            if json_output:
                print_json({"job": job.id})
            else:
                console.print(f"job {job.id} is submitted; `isthmus watch {job.id}` follows it")
            return
        try:
            ended = follow(connection, job, as_json=json_output)
        except KeyboardInterrupt:
            connection.stub.CancelJob(pb.JobRequest(id=job.id))
            console.print(
                f"job {job.id} is cancelled; isthmus finetune --resume {job.id} goes on from its last checkpoint"
            )
            raise typer.Exit(130) from None
        check_ended_well(ended)
        report = json.loads(ended.report)
        if out is not None:
            from isthmus.coordinator.cli.jobs import write_export

            report["adapter"] = str(write_export(connection, job.id, out))
    if json_output:
        print_json(report)
    else:
        print_report(report)
        where = report["adapter"] or f"on each device, in its state folder under jobs/{job.id}/adapter"
        console.print(f"job {job.id} is done; adapter: {where}", soft_wrap=True)
        if out is None and report["adapter"]:
            console.print(f"isthmus export {job.id} --out DIR writes it where you want it")


def _centralised(model: str, files: list[Path], out: Path | None, training: TrainingConfig, as_json: bool) -> None:
    if not files or out is None:
        raise BadRequest("--method centralised trains here: give it --data FILE (repeatable) and --out DIR")
    from rich.progress import Progress

    from isthmus.split.training.centralised import train_centralised

    with Progress(console=console, disable=as_json) as bar:
        task = bar.add_task("unsplit training", total=training.steps)
        result = train_centralised(
            model, files, out, training, tell=lambda step, loss: bar.update(task, completed=step)
        )
    if as_json:
        print_json(asdict(result))
    else:
        if result.perplexity_after is not None:
            console.print(
                f"held-out perplexity: {result.perplexity_after:.3f} (before: {result.perplexity_before:.3f})"
            )
        console.print(f"adapter: {result.adapter}", soft_wrap=True)


def _devices(text: str) -> tuple[list[str], int]:
    if text.strip().isdigit():
        if int(text) == 0:
            raise BadRequest("--devices 0: at least one device has to take part")
        return [], int(text)
    return [name.strip() for name in text.split(",") if name.strip()], 0
