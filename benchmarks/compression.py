"""What compressing the link costs in quality: fine-tuning with each pair of codecs, against the lossless run.

One device and the stage in one process (a LocalLink: a job over a network gives the same losses), labels on the device.
Every perplexity is that of the exported adapter in the unsplit, uncompressed model, by plain transformers and peft, on
held-out text. Seeds are paired: a change is that of two runs with the same seed, batches and first adapter.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from transformers import AutoModelForCausalLM

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
    command,
    console,
    data_named,
    in_processes,
    report_keys,
    table,
    write_json,
)
from benchmarks.methods import last_tenths
from isthmus.split.data.sequences import Sequences, sequences_of_file
from isthmus.split.errors import BadData
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.profile import LinkProfile
from isthmus.split.lora.lora import lora_config, save_adapter
from isthmus.split.methods.local import train_locally
from isthmus.split.models.source import open_model
from isthmus.split.training.loss import nll

_TRAINING_KINDS = ("forward", "backward", "aggregate", "step")
LOSSLESS, STALE = "none", "stale"  # stale: float32, with --overlap stale
_NARROW = LinkProfile(round_trip=0.04, up=2.5e6, down=2.5e6)  # what `auto` is told that the link is: 20 Mbit/s, 40 ms


def klt(up: float, down: float, gradients: float, entropy: str = "range") -> str:
    """Steps in RMS: of hidden states up and down, and of gradients, which are rounded without bias."""
    uniform = "klt,uniform:step={:g}:per=tensor{},{}"
    return ";".join(
        [
            f"hidden_up={uniform.format(up, '', entropy)}",
            f"hidden_down={uniform.format(down, '', entropy)}",
            f"gradients={uniform.format(gradients, ':stochastic', entropy)}",
        ]
    )


PAIRS = {
    "int8": "hidden=hadamard,int8;gradients=hadamard,int8:stochastic",
    "int4": "hidden=hadamard,int4;gradients=hadamard,int4:stochastic",
    "klt .25/.16/.35": klt(0.25, 0.16, 0.35),
    "klt .3/.2/.5": klt(0.3, 0.2, 0.5),
    "klt .4/.3/.8": klt(0.4, 0.3, 0.8),
}


@dataclass(frozen=True)
class Case:
    """One run. name: of the codec pair; data: e2e or shakespeare."""

    data: str
    name: str
    codec: str
    seed: int
    overlap: str = "exact"


@dataclass(frozen=True)
class Result:
    case: Case
    perplexity: float
    bytes_a_step: float  # both ways, with adapters
    bits_a_value: dict[str, float]  # by direction and kind
    loss_before_last_tenth: float
    loss_last_tenth: float


def texts(data: str, files: Mapping[str, Path], training: TrainingConfig, model: str) -> tuple[Sequences, Sequences]:
    source = open_model(model)
    train, held_out = sequences_of_file(files[data], training.text, source.tokenizer())
    if held_out is None:
        raise BadData(f"{files[data].name} leaves nothing to hold out")
    return train, held_out


def training_of(case: Case, base: TrainingConfig) -> TrainingConfig:
    training = base.but(codec=case.codec, seed=case.seed, overlap=case.overlap)
    return training.but(**E2E_COLUMNS) if case.data == "e2e" else training


def run(case: Case, base: TrainingConfig, files: Mapping[str, Path], model: str, held_out_rows: int) -> Result:
    training = training_of(case, base)
    train, held_out = texts(case.data, files, training, model)
    source = open_model(model)
    done = train_locally(source, training, [(train, None)], profile=_NARROW)
    ledger = done.ledgers["d0"]
    traffic = ledger.traffic
    size = sum(
        traffic.payload_bytes[key] + traffic.overhead_bytes[key]
        for key in traffic.messages
        if key[1] in _TRAINING_KINDS
    )
    values = training.batch_size * training.text.sequence_length * source.config.hidden_size * training.steps
    bits: dict[str, float] = {}
    for key, payload in traffic.payload_bytes.items():
        if key[1] in ("forward", "backward"):
            bits[f"{key[0]} {key[1]}"] = bits.get(f"{key[0]} {key[1]}", 0.0) + 8 * payload / values
    before, last = last_tenths(done.outcome.losses)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        save_adapter(adapter, done.adapter, lora_config(training, source.config), model)
        perplexity = unsplit_perplexity(str(source.path), adapter, held_out, held_out_rows)
    return Result(case, perplexity, size / training.steps, bits, before, last)


def unsplit_perplexity(model: str, adapter: Path, held_out: Sequences, rows: int) -> float:
    """By plain transformers and peft, on at most `rows` held-out sequences."""
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), str(adapter))
    whole.eval()
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, min(rows, len(held_out)), 16):
            part = slice(start, min(start + 16, rows))
            loss, count = nll(whole(input_ids=held_out.input_ids[part]).logits, held_out.labels[part])
            total, tokens = total + float(loss), tokens + count
    return math.exp(total / tokens)


def summarise(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """By data and name of the pair: reduction of bytes and change of perplexity, the mean over paired seeds.

    A run whose lossless partner has not ended yet is left out.
    """
    lossless = {(r.case.data, r.case.seed): r for r in results if r.case.name == LOSSLESS}
    results = [r for r in results if (r.case.data, r.case.seed) in lossless]
    rows: dict[str, dict[str, Any]] = {}
    for data, name in dict.fromkeys((r.case.data, r.case.name) for r in results):
        mine = [r for r in results if (r.case.data, r.case.name) == (data, name)]
        pairs = [(r, lossless[data, r.case.seed]) for r in mine]
        changes = [math.log(r.perplexity / base.perplexity) for r, base in pairs]
        rows[f"{data}: {name}"] = {
            "data": data,
            "name": name,
            "codec": mine[0].case.codec,
            "seeds": len(mine),
            "perplexity": fmean(r.perplexity for r in mine),
            "change": math.expm1(fmean(changes)),
            "change_standard_error": stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None,
            "bytes_a_step": fmean(r.bytes_a_step for r in mine),
            "reduction": fmean(base.bytes_a_step / r.bytes_a_step for r, base in pairs),
            "bits_a_value": {
                stream: fmean(r.bits_a_value[stream] for r in mine) for stream in sorted(mine[0].bits_a_value)
            },
            "loss_before_last_tenth": fmean(r.loss_before_last_tenth for r in mine),
            "loss_last_tenth": fmean(r.loss_last_tenth for r in mine),
        }
    return rows


def reduction_within(rows: Mapping[str, Mapping[str, Any]], change: float) -> float:
    """The largest reduction that keeps within the change of perplexity on every data set, of one and the same pair."""
    names = dict.fromkeys(row["name"] for row in rows.values())
    data = {row["data"] for row in rows.values()}
    best = 1.0
    for name in names:
        mine = [row for row in rows.values() if row["name"] == name]
        if len(mine) == len(data) and all(row["change"] <= change for row in mine):
            best = max(best, min(row["reduction"] for row in mine))
    return best


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    lines = []
    for name, row in rows.items():
        error = row["change_standard_error"]
        bits = " ".join(f"{value:.2f}" for value in row["bits_a_value"].values())
        lines.append(
            (
                name,
                f"{row['perplexity']:.3f}",
                f"{100 * row['change']:+.2f} %",
                "" if error is None else f"{100 * error:.2f}",
                f"{row['bytes_a_step'] / 1e3:.0f}",
                f"{row['reduction']:.1f}",
                bits,
            )
        )
    columns = ("data: codecs", "perplexity", "change", "s.e.", "kB a step", "fewer bytes", "bits (bwd, fwd down; up)")
    console.print(table("perplexity of the exported adapter, unsplit and uncompressed", columns, lines))


def main(
    e2e: E2eFile = E2E_FILE,
    shakespeare: ShakespeareFile = SHAKESPEARE_FILE,
    data: DataNames = "e2e,shakespeare",
    model: Annotated[str, typer.Option(help="Folder in hub format, or default.")] = "default",
    codecs: Annotated[
        list[str] | None,
        typer.Option(
            help="A pair of the default list, a codec as of `isthmus finetune --codec`, NAME::CODEC, or stale. "
            "Repeatable."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of every run.", min=2)] = 300,
    seeds: Annotated[int, typer.Option(help="Paired runs of each, with seeds 0, 1, ...", min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    sequence_length: Annotated[int, typer.Option(min=8)] = 64,
    held_out: Annotated[int, typer.Option(help="Held-out sequences that are evaluated, at most.", min=1)] = 256,
    workers: Annotated[int, typer.Option(help="Runs at the same time, each with one thread.", min=1)] = 2,
    json_file: JsonFile = None,
) -> None:
    """Perplexity after equal steps against bytes sent, for each pair of codecs and for auto.

    Example: python -m benchmarks.compression --json compression.json
    """
    files = {"e2e": e2e, "shakespeare": shakespeare}
    chosen = data_named(data, files)
    pairs = _pairs(codecs)
    base = TrainingConfig.of(
        cut_layer=1,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=4e-3,
        warmup_steps=min(10, steps // 2),
        precision="float32",
        micro_batches=1,
        aggregate_every=10,
        validation_fraction=0.1,
        target_modules=ALL_LINEAR,
    )
    result = begin(training=asdict(base), model=model)
    cases = [
        Case(which, name, codec, seed, "stale" if name == STALE else "exact")
        for seed in range(seeds)
        for which in chosen
        for name, codec in {LOSSLESS: LOSSLESS, **pairs}.items()
    ]
    results: list[Result] = []
    calls = [(case, base, files, model, held_out) for case in cases]
    for done in in_processes(run, calls, workers):
        results = sorted([*results, done], key=lambda r: cases.index(r.case))
        result |= report(results)
        write_json(json_file, result, tell=False)  # after each run: what has ended is kept when the command is stopped
    show(result["rows"])
    report_keys(result, ("bytes_reduction_at_half_percent", "bytes_reduction_at_two_percent"), ".1f")
    write_json(json_file, result)


def report(results: Sequence[Result]) -> dict[str, Any]:
    rows = summarise(results)
    return {
        "bytes_reduction_at_half_percent": reduction_within(rows, 0.005),
        "bytes_reduction_at_two_percent": reduction_within(rows, 0.02),
        "rows": rows,
        "runs": [asdict(each) for each in results],
    }


def _pairs(codecs: Sequence[str] | None) -> dict[str, str]:
    if not codecs:
        return {**PAIRS, "auto": "auto", STALE: LOSSLESS}
    pairs = {}
    for text in codecs:
        name, equals, codec = text.partition("::")
        pairs[name] = codec if equals else PAIRS.get(name, LOSSLESS if name == STALE else name)
    return pairs


if __name__ == "__main__":
    command(main)
