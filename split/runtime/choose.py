"""Which runtime a stage gets: the one that was asked for, or the faster one here, by a measurement."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isthmus.split.errors import BadRequest, UnsupportedModel
from isthmus.split.lora.served import Lora, LoraAdapter
from isthmus.split.models.precision import pick_device
from isthmus.split.models.source import TensorSource
from isthmus.split.models.stage import StageSpec, build_stages
from isthmus.split.runtime.base import Row, Runtime
from isthmus.split.runtime.torch_runtime import TorchRuntime

AUTO, TORCH, ONNX = "auto", "torch", "onnxruntime"
RUNTIMES = (AUTO, TORCH, ONNX)
WEIGHTS = ("float32", "int8", "int4")
_TOKENS = 12  # number of tokens that are decoded to compare runtimes


@dataclass(frozen=True)
class RuntimeChoice:
    """How stages are computed.

    weights: format of the linear modules' weights; less than float32 only in onnxruntime. device: torch's name, or
    auto. cache: the folder of graphs; None: in the user's cache folder. threads: 0 for as many as torch has.
    """

    runtime: str = AUTO
    weights: str = "float32"
    device: str = "auto"
    cache: Path | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        check_runtime(self.runtime, self.weights)


def check_runtime(runtime: str, weights: str) -> None:
    """Raises BadRequest for a runtime or a format of weights that does not exist, and for what does not go together."""
    if runtime not in RUNTIMES:
        raise BadRequest(f"runtime {runtime!r} is not one of {', '.join(RUNTIMES)}")
    if weights not in WEIGHTS:
        raise BadRequest(f"weights {weights!r} are not one of {', '.join(WEIGHTS)}")
    if runtime == TORCH and weights != "float32":
        raise BadRequest(f"runtime torch has float32 weights; choose onnxruntime for {weights}")


def make_runtime(
    source: TensorSource,
    first: int,
    last: int,
    choice: RuntimeChoice,
    *,
    sequences: int,
    tokens: int,
    adapters: Sequence[LoraAdapter] = (),
) -> Runtime:
    """Load blocks first..last-1 into a runtime.

    sequences: how many there is room for. tokens: the most of a sequence. Raises BadRequest, UnsupportedModel
    (onnxruntime was asked for), BadModelFolder.
    """
    loras = [adapter.load(first, last) for adapter in adapters]
    make = _torch if pick_runtime(source, first, choice) == TORCH else _onnx
    return make(source, first, last, choice, sequences, tokens, loras)


def make_head(source: TensorSource, choice: RuntimeChoice) -> Callable[[Tensor], Tensor] | None:
    """Load the final norm and the head into onnxruntime: (tokens, hidden) -> (tokens, vocabulary).

    Returns None where torch computes them. int4 of the head costs many tokens: it has int8 at least.
    """
    if pick_runtime(source, 0, choice) == TORCH:
        return None
    from isthmus.split.runtime.onnx_head import OnnxHead
    from isthmus.split.runtime.onnx_session import OnnxOptions

    weights = "int8" if choice.weights == "int4" else choice.weights
    return OnnxHead(source, OnnxOptions(weights, choice.threads, cache=choice.cache))


def pick_runtime(source: TensorSource, block: int, choice: RuntimeChoice) -> str:
    """Pick torch or onnxruntime. block: the one that `auto` measures with.

    `auto` is torch on accelerators and for models that onnxruntime cannot compute; else the one that is faster with one
    sequence.
    """
    if choice.runtime != AUTO:
        return choice.runtime
    if pick_device(choice.device).type != "cpu":
        return TORCH
    if choice.weights != "float32":
        return ONNX
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        trial = RuntimeChoice(device="cpu", cache=Path(folder), threads=choice.threads)
        try:
            onnx = _seconds(_onnx(source, block, block + 1, trial, 1, _TOKENS), source.config.hidden_size)
        except UnsupportedModel:
            return TORCH
    in_torch = _seconds(_torch(source, block, block + 1, trial, 1, _TOKENS), source.config.hidden_size)
    return TORCH if in_torch < onnx else ONNX


def _seconds(runtime: Runtime, hidden_size: int) -> float:
    """Seconds of a token, the best of some."""
    hidden, times = torch.zeros(1, hidden_size), []
    for position in range(_TOKENS):
        start = time.perf_counter()
        runtime.compute([Row(0, position, 1)], hidden)
        times.append(time.perf_counter() - start)
    return min(times)


def _torch(
    source: TensorSource,
    first: int,
    last: int,
    choice: RuntimeChoice,
    sequences: int,
    tokens: int,
    adapters: Sequence[Mapping[str, Lora]] = (),
) -> TorchRuntime:
    spec = StageSpec(first, last, embeds=False, head=False)
    stage = build_stages(source, [spec], device=pick_device(choice.device))[0]
    return TorchRuntime(stage, sequences=sequences, tokens=tokens, adapters=adapters)


def _onnx(
    source: TensorSource,
    first: int,
    last: int,
    choice: RuntimeChoice,
    sequences: int,
    tokens: int,
    adapters: Sequence[Mapping[str, Lora]] = (),
) -> Runtime:
    from isthmus.split.runtime.onnx_runtime import OnnxRuntime
    from isthmus.split.runtime.onnx_session import OnnxOptions

    options = OnnxOptions(choice.weights, choice.threads, cache=choice.cache)
    return OnnxRuntime(source, first, last, sequences=sequences, tokens=tokens, options=options, adapters=adapters)
