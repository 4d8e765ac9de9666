"""Every quantiser by name, alone and in pipelines, and tensors that are hard on codecs."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from isthmus.split.codecs import Codec, CodecState
from isthmus.split.codecs.base import matrix_shape
from isthmus.split.codecs.blocks import blocked
from isthmus.split.errors import CodecError

FLOATS = ["none", "shuffle", "float16", "bfloat16", "fp8", "fp8:block=16"]
INTEGERS = [
    *("int8", "int4", "int3", "int2", "int4:block=16", "int8:row", "int2:row"),
    *("int8:stochastic", "int4:stochastic", "int3:row:stochastic", "int2:stochastic"),
]
SPARSE = [
    "topk:0.1",
    "topk:0.4",
    "topk:0.1:values=int8",
    "topk:0.1:values=float16",
    "randtopk:0.1",
    "randtopk:0.6:alpha=0.5",
]
LOW_RANK = ["powersgd:2", "lowrank:4"]
UNIFORM = ["uniform:step=0.13", "uniform:step=1:deadzone=0.2", "uniform:step=0.5:per=tensor:stochastic"]
QUANTISERS = FLOATS + INTEGERS + SPARSE + LOW_RANK + UNIFORM
PIPELINES = [
    "klt,uniform:step=0.13,range",
    "hadamard,uniform:step=0.26,zstd",
    "hadamard,uniform:step=0.26,range",
    "klt,int4",
    "klt,float16",
    "int4,range",
    "int2:stochastic,range",
    "ef,topk:0.05",
    "ef,int2",
    "ef,powersgd",
    "ef,hadamard,int3,zstd",
    "delta,int4",
    "delta,hadamard,int4:stochastic",
    "delta,klt,uniform:step=0.13,range",
]
EVERY = [
    *QUANTISERS,
    *(f"hadamard,{name}" for name in QUANTISERS),
    *(f"{name},zstd" for name in QUANTISERS if name != "none"),
    *PIPELINES,
]

OFTEN = {*QUANTISERS, *PIPELINES, "hadamard,int4", "shuffle,zstd", "topk:0.1,zstd"}
"""Each part once, and pipelines that are used; the other combinations are for `make test-all`."""

SHAPES: list[tuple[int, ...]] = [
    *((), (1,), (7,), (100,), (256,), (512,)),
    *((1, 1), (5, 1), (2, 7), (3, 63), (4, 65), (3, 100), (2, 256), (40, 16)),
    *((2, 3, 64), (1, 2, 2, 48)),
]
EMPTY: list[tuple[int, ...]] = [(0,), (0, 4), (3, 0), (2, 0, 5)]
KINDS = ["normal", "tiny", "outlier", "zeros", "constant", "heavy", "half zero"]


def tensor(shape: tuple[int, ...], kind: str = "normal", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "tiny":
        return x * 1e-8
    if kind == "outlier" and x.numel():
        x.view(-1)[seed % x.numel()] = 1e6
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "constant":
        return torch.full(shape, -0.37)
    if kind == "heavy":
        return x**5
    if kind == "half zero" and x.dim():
        x[: len(x) // 2] = 0
    return x


def tensors(shapes: list[tuple[int, ...]] = SHAPES, kinds: list[str] = KINDS) -> st.SearchStrategy[Tensor]:
    return st.builds(tensor, st.sampled_from(shapes), st.sampled_from(kinds), st.integers(0, 2**20))


def state(seed: int = 11) -> CodecState:
    return CodecState(seed)


def round_trip(codec: Codec, x: Tensor, seed: int = 11) -> Tensor:
    return codec.decode(codec.encode(x, state(seed)), x.shape, state(seed))


def decoded_or_refused(codec: Codec, payload: bytes, shape: tuple[int, ...]) -> Tensor | None:
    """Fails if decode does anything else than these two."""
    try:
        decoded = codec.decode(payload, shape, state())
    except CodecError:
        return None
    assert decoded.shape == shape
    assert decoded.dtype == torch.float32
    assert codec.exact or bool(torch.isfinite(decoded).all())
    return decoded


def scales(x: Tensor, block: int, steps: int) -> Tensor:
    """(rows, width): the least that the scale of each value's block can be; rounding up adds at most 1 part in 128."""
    rows, width = matrix_shape(x.shape)
    blocks = blocked(x.reshape(rows, width), min(block, width))
    return (blocks.abs().amax(-1, keepdim=True) / steps).expand_as(blocks).reshape(rows, -1)[:, :width]


def stated_bound(name: str, x: Tensor) -> Tensor | None:
    """The greatest |x - decoded| by the docstrings, as (rows, width); none is stated for what keeps only a part."""
    rows, width = matrix_shape(x.shape)
    flat = x.reshape(rows, width).abs()
    part, *arguments = name.split(":")
    if part in ("none", "shuffle"):
        return torch.zeros_like(flat)
    if part == "float16":
        return flat * 2**-11 + flat.max() * 2**-39 + 1e-44
    if part == "bfloat16":
        return flat * 2**-8 + 2**-134
    block = next((int(a.removeprefix("block=")) for a in arguments if a.startswith("block=")), 64)
    if part == "fp8":
        return torch.maximum(flat * 2**-4, scales(x, block, 448) * (1 + 2**-7) * 2**-10) * (1 + 1e-6) + 1e-40
    if part.startswith("int"):
        steps = 2 ** (int(part[3:]) - 1) - 1
        scale = scales(x, width if "row" in arguments else block, steps) * (1 + 2**-7) + 1e-40
        return scale * (1 if "stochastic" in arguments else 0.5) * (1 + 1e-5)
    return None


def relative_error(x: Tensor, decoded: Tensor) -> float:
    """0 for zeros that come back as zeros."""
    error, size = float((x - decoded).double().norm()), float(x.double().norm())
    return error / size if size else (math.inf if error else 0.0)
