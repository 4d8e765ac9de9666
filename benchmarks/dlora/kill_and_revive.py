"""Kill and Revive in DLoRA: what it saves on the link and at the device until the same held-out perplexity.

The frozen backbone is in the cloud; the device has the embedding, the first block, the norm, the head, the text and all
LoRA modules (Gao and Zhang 2024). Runs are unsplit training with the same modules active at the same steps; bytes and
FLOPs are counted. Each is held against the run of the same seed in which every module trains at every step. Then jobs
over a real link, for speed and memory (network.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.dlora import network
from benchmarks.dlora.pretrained import pretrain, random_llama
from benchmarks.dlora.runs import Case, Outcome, run
from benchmarks.dlora.summary import keys, summarise
from benchmarks.harness import (
    ALL_LINEAR,
    E2E_COLUMNS,
    E2E_FILE,
    SHAKESPEARE_FILE,
    DataNames,
    E2eFile,
    JsonFile,
    ShakespeareFile,
    begin,
    console,
    data_named,
    in_processes,
    names_in,
    table,
    write_json,
)
from isthmus.coordinator.emulation import LinkSpec
from isthmus.coordinator.jobs.heat_map import heat_map
from isthmus.split.dlora.kill_policy import KillPolicy
from isthmus.split.dlora.module_costs import module_costs
from isthmus.split.errors import BadData, BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.models.source import open_model

_POLICY = KillPolicy(  # chosen on validation text: few modules at a time, for many steps, all of them in turn
    warmup_steps=1, schedule="step", probe_share=0.8, probe_steps=40, probe_interval=5, hold_steps=40
)
_CHOICES = ("shorter", "controller", "fixed", "random")
_LARGE, _LARGE_START = "large", 300
_CODECS = ("hadamard,int8", "hadamard,int8:stochastic")


def training_of(case: Case) -> TrainingConfig:
    training = TrainingConfig.of(
        cut_layer=1,
        steps=case.steps,
        batch_size=4,
        sequence_length=64,
        learning_rate=case.learning_rate,
        warmup_steps=min(10, case.steps // 2),
        precision="float32",
        codec="none",
        seed=case.seed,
        target_modules=ALL_LINEAR,
    )
    return training.but(**E2E_COLUMNS) if case.data == "e2e" else training


def cases_of(
    data: Sequence[str],
    steps: int,
    stretch: float,
    seeds: int,
    fractions: Sequence[float],
    choices: Sequence[str],
    policy: KillPolicy,
    base: Case,
    codecs: bool,
    only: Sequence[str] = (),
) -> list[Case]:
    """The baseline, and shorter and longer ones that show where it is flat; then each choice at each budget."""
    cases = []
    for seed in range(seeds):
        for which in data:
            mine = replace(base, data=which, seed=seed, steps=steps, choice="all")
            cases.append(mine)
            if "shorter" in choices:
                cases += [replace(mine, steps=max(2, int(steps * share))) for share in (0.125, 0.25, 0.5, 2)]
            longer = replace(mine, steps=max(2, int(steps * stretch)))
            for choice in choices:
                if choice in ("controller", "fixed", "random"):
                    for fraction in fractions:
                        cases.append(replace(longer, choice=choice, policy=replace(policy, active_fraction=fraction)))
            cases += [replace(longer, choice="named", named=tuple(parts.split(","))) for parts in only]
            if codecs:
                cases += [
                    replace(each, codecs=_CODECS)
                    for each in cases
                    if each.choice == "controller" and (each.data, each.seed) == (which, seed)
                ]
    return cases


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    lines = []
    for row in rows:
        error = row["perplexity_ratio_standard_error"]
        lines.append(
            (
                f"{row['data']}: {row['name']}",
                row["steps"],
                f"{row['start']:.3g}",
                f"{row['perplexity']:.3f}",
                f"{row['perplexity_ratio']:.4f}",
                "" if error is None else f"{error:.4f}",
                f"{row['bytes'] / 1e6:.0f}",
                *(
                    f"{100 * row[key]:.1f} %"
                    for key in ("communication_reduction", "compute_reduction", "compute_reduction_of_modules")
                ),
            )
        )
    columns = ("run", "steps", "start", "perplexity", "ratio", "s.e.", "MB", "bytes saved", "FLOPs saved", "of modules")
    console.print(table("held-out perplexity of the adapter, against all active", columns, lines))


def report(outcomes: Sequence[Outcome], baseline_steps: int) -> dict[str, Any]:
    rows = summarise(outcomes, baseline_steps)
    return {**keys(rows), "rows": rows, "runs": [asdict(each) for each in outcomes]}


def draw(path: Path, outcome: Outcome, model: str) -> None:
    costs = module_costs(open_model(model).config, training_of(outcome.case))
    heat_map(path, list(costs), outcome.decisions, outcome.case.steps, dict(outcome.scores))


def main(
    e2e: E2eFile = E2E_FILE,
    shakespeare: ShakespeareFile = SHAKESPEARE_FILE,
    data: DataNames = "e2e,shakespeare",
    documents: Annotated[int, typer.Option(help="That the device has: rows, or paragraphs.", min=1)] = 500,
    model: Annotated[
        str, typer.Option(help="default, large (97.5 million random parameters), or a folder in hub format.")
    ] = "default",
    pretrain_steps: Annotated[
        int | None,
        typer.Option(help=f"Train the whole model on other text first. Default: 0; large: {_LARGE_START}.", min=0),
    ] = None,
    pretrain_text: Annotated[
        Path | None,
        typer.Option(help="That text; default: Python's documentation, which the default model knows."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps with all modules active.", min=2)] = 300,
    stretch: Annotated[float, typer.Option(help="Steps with Kill and Revive over those.", min=0.01)] = 2.0,
    seeds: Annotated[int, typer.Option(help="Paired runs of each, with seeds 0, 1, ...", min=1)] = 2,
    fractions: Annotated[str, typer.Option(help="Budgets of values on the link, by commas.")] = "0.035,0.125,0.4",
    choices: Annotated[
        str, typer.Option(help="controller, fixed, random, and shorter: all active for fewer and more steps.")
    ] = "shorter,controller,fixed,random",
    only: Annotated[
        list[str] | None,
        typer.Option(help="Train these modules and no others: parts of their names, by commas. Repeatable."),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 8e-3,
    codecs: Annotated[bool, typer.Option(help="The controller's runs once more with 8 bits on the link.")] = True,
    workers: Annotated[int, typer.Option(help="Runs at the same time, each with one thread.", min=1)] = 2,
    map_file: Annotated[
        Path | None, typer.Option("--heat-map", help="Draw the first controller's run here (PNG).", dir_okay=False)
    ] = None,
    link: Annotated[
        str, typer.Option(help="Of the real jobs of one device that come last, RATE,ROUND-TRIP; empty: none.")
    ] = "20mbit,40ms",
    network_steps: Annotated[int, typer.Option(help="Of each of these jobs.", min=8)] = 40,
    quick: Annotated[bool, typer.Option("--quick", help="8 steps, 20 documents, one budget: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """What Kill and Revive saves until the perplexity of DLoRA without it, against fixed and random choice.

    Example: python -m benchmarks.dlora --json dlora.json --heat-map dlora.png
    """
    files = {"e2e": e2e, "shakespeare": shakespeare}
    spec = LinkSpec.parse_short(link) if link else None  # before hours of work: it may be wrong
    policy = _POLICY
    if quick:
        steps, documents, seeds, fractions = 8, 20, 1, "0.1"
        policy = replace(policy, warmup_steps=2, anneal_steps=2, interval=1)
    which = data_named(data, files)
    base = Case(data="", choice="", steps=steps, seed=0, learning_rate=learning_rate, documents=documents)
    cases = cases_of(
        which,
        steps,
        stretch,
        seeds,
        _numbers(fractions),
        names_in("choices", choices, _CHOICES),
        policy,
        base,
        codecs,
        only or (),
    )
    result = begin(model=model, policy=asdict(policy), training=asdict(training_of(cases[0])))
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as temporary:
        start = _start(model, pretrain_steps, pretrain_text, Path(temporary))
        calls = [(case, training_of(case), files[case.data], start, 64, 6) for case in cases]
        for done in in_processes(run, calls, workers):
            outcomes = sorted([*outcomes, done], key=lambda outcome: cases.index(outcome.case))
            result |= report(outcomes, steps)
            write_json(json_file, result, tell=False)  # after each run: what has ended is kept when it is stopped
        show(result["rows"])
        for key in keys(result["rows"]):
            value = result[key]
            console.print(f"{key}: " + ("no budget of these keeps within 1 %" if value is None else f"{value:.3f}"))
        mine = [each for each in outcomes if each.case.choice == "controller"]
        if map_file is not None and mine:
            draw(map_file, mine[0], start)
            console.print(f"heat map in {map_file}")
        if spec is not None:
            for name in which:
                training = network.base_training(files[name], network_steps, "auto")
                rows = network.measure(files[name], start, training, spec)
                network.show(f"{name}, {link}", rows)
                result.setdefault("network", {})[name] = [asdict(row) for row in rows]
                write_json(json_file, result, tell=False)
    write_json(json_file, result)


def _start(model: str, steps: int | None, text: Path | None, folder: Path) -> str:
    """The model that all runs begin with, made in the folder where it is not there yet."""
    if text is not None and not text.is_file():
        raise BadData(f"no text at {text}: name a .txt file with --pretrain-text")
    if model == _LARGE:
        model, steps = str(random_llama(folder / "random")), _LARGE_START if steps is None else steps
    return str(pretrain(model, text, steps, folder / "start")) if steps else model


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadRequest(f"--fractions {text!r}: write numbers from 0 to 1 with commas between them") from None
