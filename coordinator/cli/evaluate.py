"""`isthmus evaluate`: held-out perplexity with plain transformers and peft, so that anyone can repeat it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from isthmus.coordinator.cli.common import Json, console, print_json
from isthmus.split.job.groups import TextSettings
from isthmus.split.training.perplexity import PERPLEXITY


def evaluate(
    data: Annotated[list[Path], typer.Option(help="Held-out text: .txt, .jsonl or .csv. Repeatable.")],
    model: Annotated[str, typer.Option(help="Folder in hub format or hub id; or `default`.")] = "default",
    adapter: Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 128,
    packing: Annotated[str, typer.Option(help="packed or padded.")] = "packed",
    text_column: Annotated[str | None, typer.Option(help="Of .csv and .jsonl.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Takes no loss.")] = None,
    completion_column: Annotated[str | None, typer.Option(help="Takes the loss.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="torch device: auto, cpu, cuda, ...")] = "auto",
    json_output: Json = False,
) -> None:
    from isthmus.split.models.precision import pick_device
    from isthmus.split.training.evaluate import evaluate_files  # for torch and transformers, not with --help

    config = TextSettings(
        sequence_length=sequence_length,
        packing=packing,
        text_column=text_column,
        prompt_column=prompt_column,
        completion_column=completion_column,
        validation_fraction=0.0,
    )
    with Progress(console=console, transient=True, disable=json_output) as bar:
        task = bar.add_task("evaluating", total=None)
        result = evaluate_files(
            model,
            data,
            adapter=adapter,
            data=config,
            batch_size=batch_size,
            device=str(pick_device(device)),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json_output:
        print_json(asdict(result))
    else:
        console.print(f"perplexity {result.perplexity:.4f} over {result.tokens} predicted tokens")


evaluate.__doc__ = f"""Perplexity of a model, with or without an adapter, on held-out text.

{PERPLEXITY}

Example: isthmus evaluate --model default --adapter adapter --data held-out.txt
"""
