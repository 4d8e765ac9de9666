"""Codecs on what split training really sends: bits, error and speed on its four streams, beside other libraries' ways.

A model is trained for some steps over a link in this process, and the tensors that pass are kept. Then every codec
encodes and decodes each stream from its first tensor on, as in a job, and the last tensors are measured: whatever a
codec learns or remembers, it has learnt by then.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.codec_baselines import Method, Ours, others
from benchmarks.codec_bounds import decibels, gaussian_bits, spectrum, water_filling
from benchmarks.codec_streams import Passed, capture
from benchmarks.codec_sweep import bounds, draw, sweep
from benchmarks.harness import JsonFile, begin, command, console, table, write_json
from isthmus.split.codecs import parse
from isthmus.split.data.stdlib_text import PRIVATE_MODULES
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import TRAINING
from isthmus.split.link.ladder import ladder

GIGABIT = 1e9  # bits a second, of the link that codecs are compared with
_CODECS = (
    "none",
    "lossless",
    "float16",
    "bfloat16",
    "fp8",
    "int8",
    "int4",
    "hadamard,int8",
    "hadamard,int4",
    "hadamard,int4:stochastic",
    "hadamard,int3",
    "hadamard,int2",
    "hadamard,int2:stochastic",
    "delta,hadamard,int4",
    "topk:0.05",
    "ef,topk:0.05",
    "randtopk:0.05",
    "topk:0.2,zstd",
    "lowrank:16",
    "powersgd:16",
)
_QUICK = ("none", "hadamard,int4", "klt,uniform:step=0.13:per=tensor,zstd")
_TIMES = 5
_SWEPT = 2  # tensors that count in the sweep

Figures = dict[str, Any]


def codec_names(text: str, quick: bool) -> list[str]:
    """Canonical names: of `--codecs`, or the default ones, which include all that `auto` chooses from."""
    budget = TrainingConfig.link.error_budget
    names: Sequence[str] = [name for name in text.split(";") if name.strip()]
    if not names:
        names = _QUICK if quick else [*_CODECS, *chain.from_iterable(ladder(stream, budget) for stream in TRAINING)]
    return list(dict.fromkeys(parse(name).name for name in names))


def measure(method: Method, passed: Sequence[Passed], measured: int, eigenvalues: Tensor) -> Figures:
    """Of the last `measured` tensors of a stream; those before are what the method learns from.

    A tensor's time is the best of _TIMES with the same state, as others use the machine too; seconds are the median
    over the tensors. `best`, `at_best`: the best of all, which is what counts on a machine that is not quiet.
    """
    encoding, decoding, sizes = [], [], []
    error = power = 0.0
    for index, each in enumerate(passed):
        counts = index >= len(passed) - measured
        if counts:
            times = [_timed(copy.deepcopy(method), each) for _ in range(_TIMES)]
            encoding.append(min(encode for encode, _ in times))
            decoding.append(min(decode for _, decode in times))
        payload = method.encode(each.tensor, each.keys)
        decoded = method.decode(payload, each.tensor.shape, each.keys)
        sizes.append(len(payload))
        if counts:
            error += float((decoded - each.tensor).double().square().sum())
            power += float(each.tensor.double().square().sum())
    values = passed[-1].tensor.numel()
    gigabytes, gigabit_seconds = 4 * values / 1e9, 32 * values / GIGABIT
    bytes_a_value = sum(sizes[-measured:]) / (measured * values)
    nmse = error / power if power else 0.0
    encode, decode = median(encoding), median(decoding)
    return {
        "bits_a_value": 8 * bytes_a_value,
        "bytes_a_value": bytes_a_value,
        "bits_a_value_from_the_first_tensor": 8 * sum(sizes) / sum(each.tensor.numel() for each in passed),
        "reduction": 4 / bytes_a_value,
        "nmse": nmse,
        "nmse_db": decibels(nmse) if nmse else None,
        "gaussian_bits": gaussian_bits(nmse) if nmse else None,
        "water_filling_bits": water_filling(eigenvalues, nmse) if nmse else None,
        "encode_gb_per_second": gigabytes / encode,
        "decode_gb_per_second": gigabytes / decode,
        "encode_gb_per_second_best": gigabytes / min(encoding),
        "decode_gb_per_second_best": gigabytes / min(decoding),
        "encode_seconds": encode,
        "decode_seconds": decode,
        "gigabit_seconds": gigabit_seconds,
        "faster_than_gigabit": encode + decode < gigabit_seconds,
        "faster_than_gigabit_at_best": min(encoding) + min(decoding) < gigabit_seconds,
    }


def _timed(method: Method, passed: Passed) -> tuple[float, float]:
    """Seconds to encode and to decode."""
    start = time.perf_counter()
    payload = method.encode(passed.tensor, passed.keys)
    encoded = time.perf_counter()
    method.decode(payload, passed.tensor.shape, passed.keys)
    return encoded - start, time.perf_counter() - encoded


def faster_everywhere(streams: dict[str, dict[str, Figures]], key: str = "faster_than_gigabit") -> list[str]:
    """Names of those that are faster than the gigabit link on every stream."""
    names = next(iter(streams.values()))
    return [name for name in names if all(figures[name][key] for figures in streams.values())]


def show_stream(stream: str, figures: dict[str, Figures]) -> None:
    rows = [
        (
            name,
            f"{one['bits_a_value']:.3f}",
            f"{one['reduction']:.2f}",
            _number(one["nmse"], ".2e"),
            _number(one["nmse_db"], ".1f"),
            _number(one["gaussian_bits"], ".2f"),
            _number(one["water_filling_bits"], ".2f"),
            f"{one['encode_gb_per_second']:.2f}",
            f"{one['decode_gb_per_second']:.2f}",
            f"{1e3 * (one['encode_seconds'] + one['decode_seconds']):.1f}",
            "yes" if one["faster_than_gigabit"] else "no",
        )
        for name, one in figures.items()
    ]
    columns = (stream, "bits", "float32/x", "NMSE", "dB", "R(D)", "KLT", "enc. GB/s", "dec. GB/s", "ms", "< 1 Gbit/s")
    link = 1e3 * next(iter(figures.values()))["gigabit_seconds"]
    console.print(table(f"{stream}; at 1 Gbit/s a tensor takes {link:.1f} ms as float32", columns, rows))


def show_all(streams: dict[str, dict[str, Figures]], fast: Sequence[str]) -> None:
    """Bits and dB on each stream, and the best speed, the median over the streams."""
    rows = []
    for name in next(iter(streams.values())):
        ones = [figures[name] for figures in streams.values()]
        bits = [f"{one['bits_a_value']:.2f} / {_number(one['nmse_db'], '.1f')}" for one in ones]
        speeds = [f"{median(one[f'{way}_gb_per_second_best'] for one in ones):.2f}" for way in ("encode", "decode")]
        rows.append((name, *bits, *speeds, "yes" if name in fast else "no"))
    columns = ("codec", *(stream.replace("_", " ") for stream in streams), "best enc. GB/s", "best dec.", "< 1 Gbit/s")
    console.print(table("bits a value / error in dB", columns, rows))


def _number(value: float | None, form: str) -> str:
    return "-" if not value else format(value, form)


def main(
    model: Annotated[str, typer.Option(help="A folder in hub format, a hub id, or default.")] = "default",
    data: Annotated[
        Path | None, typer.Option(help="A .txt, .jsonl or .csv; left out: source text of the standard library.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Of a .jsonl or .csv.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="With --completion-column: the loss is on that.")] = None,
    completion_column: Annotated[str | None, typer.Option()] = None,
    codecs: Annotated[str, typer.Option(help="CODEC;CODEC;... Left out: 20 and all that `auto` chooses from.")] = "",
    cut: Annotated[int, typer.Option(help="Blocks that the device holds.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Of training; the last ones are measured.", min=2)] = 64,
    measured: Annotated[int, typer.Option(help="Tensors of each stream that count.", min=1)] = 8,
    sequences: Annotated[int, typer.Option(help="To train on: after as many, samples come again.", min=1)] = 192,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    sequence_length: Annotated[int, typer.Option(min=2)] = 128,
    threads: Annotated[int, typer.Option(help="Of torch.", min=1)] = 2,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw bits against error, over steps and shares, to this PNG.", dir_okay=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="8 small steps, few codecs: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """Bits a value, error and speed of codecs on the hidden states and gradients of split LoRA training.

    Beside them hivemind's and bitsandbytes' eight bits, and what Gaussian sources take at the same error: R(D) with
    independent values, KLT with the stream's second moments.

    Example: python -m benchmarks.codecs --json codecs.json --plot codecs.png
    """
    names = codec_names(codecs, quick)
    if plot is not None:
        plot.touch()  # a place that cannot be written to is known now
    if quick:
        steps, measured, batch_size, sequence_length = 8, 2, 2, 64
    torch.set_num_threads(threads)
    training = TrainingConfig.of(
        cut_layer=cut,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        precision="float32",
        codec="none",
        micro_batches=1,
        text_column=text_column,
        prompt_column=prompt_column,
        completion_column=completion_column,
        validation_fraction=0,
    )
    measured = min(measured, steps - 1)
    result = begin(model=model)
    result["machine"]["threads"] = threads
    with console.status("training"):
        passed = capture(model, data, training, sequences)
    spectra = {stream: spectrum([each.tensor for each in tensors]) for stream, tensors in passed.items()}
    streams: dict[str, dict[str, Figures]] = {}
    for stream, tensors in passed.items():
        streams[stream] = {}
        for method in [*(Ours(parse(name)) for name in names), *others()]:
            with console.status(f"{stream}: {method.name}"):
                streams[stream][method.name] = measure(method, tensors, measured, spectra[stream])
        show_stream(stream, streams[stream])
    fast = faster_everywhere(streams)
    show_all(streams, fast)
    result |= {
        "data": data.name if data else f"standard library: {PRIVATE_MODULES[0]}",
        "training": asdict(training),
        "sequences": sequences,
        "measured_tensors": measured,
        "values_a_tensor": {stream: tensors[-1].tensor.numel() for stream, tensors in passed.items()},
        "streams": streams,
        "encode_decode_faster_than_gigabit": fast,
        "encode_decode_faster_than_gigabit_at_best": faster_everywhere(streams, "faster_than_gigabit_at_best"),
    }
    if plot is not None or json_file is not None:
        with console.status("sweep"):
            lines = {stream: sweep(tensors, min(_SWEPT, measured), quick) for stream, tensors in passed.items()}
        limits = {stream: bounds(eigenvalues) for stream, eigenvalues in spectra.items()}
        result |= {"sweep": lines, "bounds": limits}
        if plot is not None:
            draw(plot, lines, limits, f"{Path(model).name}, cut after block {cut}, {result['data']}")
            console.print(f"drawn to {plot}")
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
