"""`isthmus codecs`: what `--codec` can be made of, and what one pipeline does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from isthmus.coordinator.cli.common import Json, console, human_bytes, print_json

if TYPE_CHECKING:  # torch comes with them, which help does not need
    from torch import Tensor

    from isthmus.split.codecs import Codec, Family

KEYS = ("up", "down", "hidden", "gradients", "adapters", "evaluation")  # beside these, every stream is a key
_TYPICAL = ("none", "lossless", "bfloat16", "fp8", "int8", "hadamard,int4", "hadamard,int2", "topk:0.05", "lowrank:16")
_KIND_NAMES = {
    "memory": "memory (at most one)",
    "transform": "transform (at most one)",
    "quantiser": "quantiser (exactly one)",
    "entropy": "entropy coder (at most one)",
}
_ROWS = 1024
_TENSORS = 4  # of the synthetic stream: codecs that learn do so from the first half


def codecs(
    codec: Annotated[
        str, typer.Argument(help="Say what this one does, such as hadamard,int4.", show_default=False)
    ] = "",
    width: Annotated[
        int, typer.Option(help="Of the tensor that it is tried on: a model's hidden size.", min=1, max=16384)
    ] = 256,
    json_output: Json = False,
) -> None:
    """List what `--codec` can be made of; or say what one CODEC takes, loses and costs.

    Bits, error and speed are measured on a synthetic tensor on this machine, not on a model's.

    Example: isthmus codecs klt,uniform:step=0.26,range
    """
    if codec:
        _one(codec, width, json_output)
    else:
        _all(width, json_output)


def _one(text: str, width: int, json_output: bool) -> None:
    from isthmus.split.codecs import FAMILIES, parse

    codec = parse(text)
    tried = _tried(codec, width)
    parts = [FAMILIES[part.partition(":")[0]] for part in codec.name.split(",")]
    if json_output:
        described = [
            {"part": part, **_as_dict(family)} for part, family in zip(codec.name.split(","), parts, strict=True)
        ]
        print_json({"name": codec.name, "exact": codec.exact, "parts": described, **tried})
        return
    console.print(codec.name, soft_wrap=True)
    table = Table("part", "kind", "what it does", "costs")
    for part, family in zip(codec.name.split(","), parts, strict=True):
        table.add_row(part, _KIND_NAMES[family.kind].partition(" (")[0], family.what, family.cost)
    console.print(table)
    lines = {
        "biased": "; ".join(f"{family.name}: {_biased(family)}" for family in parts if family.kind == "quantiser"),
        "at most": f"{tried['bits_a_value_at_most']:.3f} bits a value of a tensor ({_ROWS}, {width}): "
        f"{human_bytes(tried['bytes_at_most'])} of {human_bytes(4 * _ROWS * width)}",
        "measured": f"{tried['bits_a_value']:.3f} bits a value; {_error(tried['nmse'])}",
        "encodes": f"{tried['encode_gb_per_second']:.3g} GB of float32 a second",
        "decodes": f"{tried['decode_gb_per_second']:.3g} GB of float32 a second",
        "keeps": f"{human_bytes(tried['sender_bytes'])} at the sender, "
        f"{human_bytes(tried['receiver_bytes'])} at the receiver",
    }
    for name, line in lines.items():
        console.print(f"{name:>9}  {line}", soft_wrap=True)
    console.print(
        "measured on a synthetic tensor (Gaussian, most of it in an eighth of the directions, three large columns) "
        "on this machine;",
        soft_wrap=True,
    )
    console.print("of a model's hidden states and gradients: python -m benchmarks.codecs", soft_wrap=True)


def _all(width: int, json_output: bool) -> None:
    from isthmus.split.codecs import FAMILIES, parse
    from isthmus.split.codecs.grammar import ALIASES
    from isthmus.split.job.config import TrainingConfig
    from isthmus.split.job.streams import ADAPTERS_CODEC, EVALUATION_CODEC, STREAMS, TRAINING
    from isthmus.split.link.ladder import ladder

    budget = TrainingConfig.link.error_budget
    auto = {stream: ladder(stream, budget) for stream in TRAINING}
    names = list(dict.fromkeys(parse(name).name for name in chain(_TYPICAL, *auto.values())))
    typical = {name: _tried(parse(name), width) for name in names}
    if json_output:
        print_json(
            {
                "families": [_as_dict(family) for family in FAMILIES.values()],
                "aliases": ALIASES,
                "typical": typical,
                "keys": [*KEYS, *STREAMS],
                "adapters": ADAPTERS_CODEC,
                "evaluation": EVALUATION_CODEC,
                "auto": {"error_budget": budget, **auto},
            }
        )
        return
    for kind, title in _KIND_NAMES.items():
        console.print(Text("\n".join([title, *_described(kind)])), soft_wrap=True)
    lines = "\n".join(map(_line, typical, typical.values()))
    console.print(Text(f"\nbits a value: at most, measured, and error in dB\n{lines}"))
    below = "\n" + 19 * " "
    told = (
        f"measured on a synthetic tensor ({_ROWS}, {width}); `isthmus codecs CODEC` has its speed, too\n\n"
        "CODEC is PART,PART,... in any order; PART is NAME or NAME:ARGUMENT:ARGUMENT... An ARGUMENT is KEY=VALUE,\n"
        "a flag, or, as the first, the value of the first parameter: hadamard,int4:block=32 or ef,topk:0.05.\n"
        f"{'; '.join(f'{name} stands for {of}' for name, of in ALIASES.items())}.\n\n"
        "--codec takes auto; a CODEC, for hidden states and gradients; or KEY=CODEC;KEY=CODEC, the later one counting\n"
        "where two name a stream, as in up=int4:block=64,hadamard;down=topk:0.05,ef (quote it in a shell).\n"
        f"KEY is {', '.join(KEYS)}, or one stream:\n{', '.join(STREAMS)}.\n\n"
        f"Where nothing is said of them, adapters go by {ADAPTERS_CODEC}\n"
        f"and held-out hidden states by {EVALUATION_CODEC};\n"
        "exactly (none) where all training streams are exact.\n\n"
        f"auto, at the default --error-budget of {budget:g}, chooses by link and processor from\n"
        + "\n".join(f"  {stream + ':':<17}{below.join(found)}" for stream, found in auto.items())
    )
    console.print(Text(told), soft_wrap=True)


def _described(kind: str) -> Iterator[str]:
    """Lines about a kind's families; those that differ only in name and cost share theirs."""
    from isthmus.split.codecs import FAMILIES

    alike: dict[object, list[Family]] = {}
    for family in FAMILIES.values():
        if family.kind == kind:
            alike.setdefault((family.what, family.parameters, family.biased), []).append(family)
    for families in alike.values():
        first = families[0]
        names = ", ".join(family.name for family in families)
        biased = f"; biased: {_biased(first)}" if kind == "quantiser" else ""
        yield f"  {names:<9} {first.what}{biased}"
        costs = (family.cost if len(families) == 1 else f"{family.name}: {family.cost}" for family in families)
        yield f"            costs: {'; '.join(costs)}"
        for one in first.parameters:
            written = one.name if one.type is bool else f"{one.name}={one.default} ({one.range})"
            yield f"            {written}: {one.help}"


def _biased(family: Family) -> str:
    return family.biased if isinstance(family.biased, str) else "yes" if family.biased else "no"


def _as_dict(family: Family) -> dict[str, Any]:
    parameters = [
        {"name": one.name, "default": one.default, "range": one.range, "help": one.help} for one in family.parameters
    ]
    return {
        "name": family.name,
        "kind": family.kind,
        "what": family.what,
        "cost": family.cost,
        "biased": family.biased,
        "writes": family.writes,
        "parameters": parameters,
    }


def _tried(codec: Codec, width: int) -> dict[str, float]:
    """Bits, error, speed and memory on the second half of a synthetic stream of tensors (_ROWS, width)."""
    from isthmus.split.codecs import CodecState

    near, far = CodecState(0), CodecState(0)
    encoding, decoding = math.inf, math.inf
    sent, lost, power = 0, 0.0, 0.0
    for index, x in enumerate(_synthetic(width)):
        start = time.perf_counter()
        payload = codec.encode(x, near)
        encoded = time.perf_counter()
        decoded = codec.decode(payload, x.shape, far)
        decoding = min(decoding, time.perf_counter() - encoded)
        encoding = min(encoding, encoded - start)
        if index >= _TENSORS // 2:
            sent += len(payload)
            lost += float((decoded - x).double().square().sum())
            power += float(x.double().square().sum())
    most, values = codec.wire_bytes((_ROWS, width)), _ROWS * width
    return {
        "bits_a_value_at_most": 8 * most / values,
        "bytes_at_most": most,
        "bits_a_value": 8 * sent / (values * (_TENSORS - _TENSORS // 2)),
        "nmse": lost / power,
        "encode_gb_per_second": 4e-9 * values / encoding,
        "decode_gb_per_second": 4e-9 * values / decoding,
        "sender_bytes": near.memory_bytes,
        "receiver_bytes": far.memory_bytes,
    }


def _synthetic(width: int) -> list[Tensor]:
    """Tensors (_ROWS, width) that are something like hidden states: correlated columns, three of them large."""
    import torch

    generator = torch.Generator().manual_seed(0)
    few = max(1, width // 8)
    directions = torch.randn(few, width, generator=generator)
    columns = torch.ones(width)
    columns[torch.randint(width, (3,), generator=generator)] = 10.0
    tensors = []
    for _ in range(_TENSORS):
        mixed = torch.randn(_ROWS, few, generator=generator) @ directions / math.sqrt(few)
        tensors.append((mixed + 0.2 * torch.randn(_ROWS, width, generator=generator)) * columns)
    return tensors


def _line(name: str, tried: dict[str, float]) -> str:
    return f"  {tried['bits_a_value_at_most']:6.2f} {tried['bits_a_value']:6.2f} {_decibels(tried['nmse']):>6}  {name}"


def _decibels(nmse: float) -> str:
    return f"{10 * math.log10(nmse):.1f}" if nmse else "none"


def _error(nmse: float) -> str:
    return f"mean squared error {nmse:.2g} of the mean square ({_decibels(nmse)} dB)" if nmse else "nothing is lost"
