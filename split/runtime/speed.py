"""How fast this machine decodes, by runtime and format of the weights: measured with blocks of made-up weights through
the runtimes' own code, once, and kept in a file beside what it depends on.

Two numbers of narrow blocks, whose weights are nothing, give the fixed times; wide ones the bytes a second.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadModelFolder
from isthmus.split.models.precision import pick_device
from isthmus.split.models.stage import StageSpec, skeleton
from isthmus.split.runtime.base import Row, Runtime
from isthmus.split.runtime.choose import ONNX, TORCH, WEIGHTS, RuntimeChoice, make_runtime

BYTES = {"float32": 4, "int8": 1.125, "int4": 0.625}
"""Bytes of a weight by its format, with its share of a block's scale."""

_VERSION = 2  # of this measurement
_NARROW, _FEW, _MANY = 64, 1, 9  # width, and numbers of blocks
_WIDE = 1024
_WIDE_ON_ACCELERATORS = 4096
_CACHES = 8  # times their size is read for a token: a machine's other half may have some of it
_LEAST, _MOST = 2**26, 2**29  # bytes of float32 weights that are read for a token
_PROMPT, _WARM_UP, _TOKENS = 64, 3, 32
_LONG = 3600.0  # seconds: what is told to take longer has not been measured
_SECONDS = 0.5  # of one series of tokens, about


@dataclass(frozen=True)
class Speed:
    """The speed of decoding one sequence. A batch takes batch_seconds, and for each block block_seconds and its
    weights.
    """

    runtime: str
    weights: str
    bytes_per_second: float
    block_seconds: float
    batch_seconds: float

    def seconds(self, block_bytes: float) -> float:
        """Seconds of one block with so many bytes of weights."""
        return self.block_seconds + block_bytes / self.bytes_per_second

    def __str__(self) -> str:
        return f"{self.bytes_per_second / 1e9:.3g} GB/s with {self.weights} in {self.runtime}"


def speed_to_proto(speed: Speed) -> pb.Speed:
    return pb.Speed(**asdict(speed))


_FASTEST = 1e14  # bytes a second: no memory is as fast


def speeds_of(profile: pb.Profile) -> list[Speed]:
    """The speeds that a node tells; those that cannot be true are left out."""
    told = [
        Speed(one.runtime, one.weights, one.bytes_per_second, one.block_seconds, one.batch_seconds)
        for one in profile.speeds
    ]
    return [
        one
        for one in told
        if 0 < one.bytes_per_second < _FASTEST and 0 <= one.block_seconds < _LONG and 0 <= one.batch_seconds < _LONG
    ]


def accelerator_bytes(device: str) -> int:
    """Memory where blocks lie; 0: in the machine's own."""
    where = pick_device(device)
    return int(torch.cuda.get_device_properties(where).total_memory) if where.type == "cuda" else 0


class Stopped(Exception):
    """The measurement was given up: somebody else needs the machine now."""


def kept_speeds(path: Path, device: str, threads: int) -> list[Speed]:
    """The speeds that were measured before under the same conditions; maybe not of all `kinds`."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["of"] == _conditions(device, threads):
            return [Speed(**speed) for speed in stored["speeds"]]
    except (OSError, ValueError, TypeError, KeyError):
        pass  # made again
    return []


def measure_speeds(
    path: Path, device: str, threads: int, *, keep: bool = True, stop: Callable[[], bool] = lambda: False
) -> list[Speed]:
    """Measures what is not kept at `path` yet, and keeps it. Takes some seconds, of which two decode.

    device: torch's name; threads: 0: as many as torch has. stop: asked between tokens; raises Stopped where it is true,
    and what was complete by then is kept.
    """
    speeds = kept_speeds(path, device, threads)
    for runtime, weights in kinds(device):
        if any((one.runtime, one.weights) == (runtime, weights) for one in speeds):
            continue
        with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
            speeds.append(_measure(RuntimeChoice(runtime, weights, device, Path(folder), threads), stop))
        if keep:
            _write(path, {"of": _conditions(device, threads), "speeds": [asdict(speed) for speed in speeds]})
    return speeds


def kinds(device: str) -> list[tuple[str, str]]:
    """Runtimes and weights that there are for a device."""
    on_processor = [(ONNX, weights) for weights in WEIGHTS] if pick_device(device).type == "cpu" else []
    return [(TORCH, "float32"), *on_processor]


def _measure(choice: RuntimeChoice, stop: Callable[[], bool]) -> Speed:
    few, many = (_seconds(Blocks(_NARROW, count), choice, stop) for count in (_FEW, _MANY))
    block = max(0.0, (many - few) / (_MANY - _FEW))
    batch = max(0.0, few - _FEW * block)
    wide = _wide_blocks(choice)
    seconds = _seconds(wide, choice, stop)
    reading = max(seconds - batch - wide.count * block, 0.1 * seconds)
    return Speed(choice.runtime, choice.weights, BYTES[choice.weights] * wide.values / reading, block, batch)


def _wide_blocks(choice: RuntimeChoice) -> Blocks:
    """So many that their weights are not in the processor's caches, but for few bits, where computing takes longer
    than reading."""
    if pick_device(choice.device).type != "cpu":
        return Blocks(_WIDE_ON_ACCELERATORS, 1)
    one = Blocks(_WIDE, 1)
    size = min(max(_LEAST, _CACHES * _cache_bytes()), _MOST, psutil.virtual_memory().total // 16)
    return Blocks(_WIDE, max(2, math.ceil(size / (4 * one.values))) if choice.weights == "float32" else 3)


def _seconds(blocks: Blocks, choice: RuntimeChoice, stop: Callable[[], bool]) -> float:
    """Seconds of a token after a prompt: the median of some, since an answer has slow ones, too."""
    if stop():
        raise Stopped
    room = _PROMPT + _WARM_UP + _TOKENS
    runtime: Runtime = make_runtime(blocks, 0, blocks.count, choice, sequences=1, tokens=room)
    runtime.compute([Row(0, 0, _PROMPT)], torch.ones(_PROMPT, blocks.config.hidden_size))
    hidden, times = torch.ones(1, blocks.config.hidden_size), list[float]()
    for position in range(_PROMPT, room):
        if stop():
            raise Stopped
        start = time.perf_counter()
        runtime.compute([Row(0, position, 1)], hidden)
        times.append(time.perf_counter() - start)
        if sum(times) > _SECONDS and len(times) >= 2 * _WARM_UP:
            break
    return median(times[_WARM_UP:])


class Blocks:
    """Blocks of a Llama as a TensorSource, all of one shape."""

    def __init__(self, width: int, count: int) -> None:
        self.count = count
        self.config = LlamaConfig(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=count,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=_PROMPT + _WARM_UP + _TOKENS,
        )
        spec = StageSpec(0, count, embeds=False, head=False)
        shapes = [tuple(tensor.shape) for tensor in skeleton(self.config, spec).state_dict().values()]
        self._shapes = dict(zip(spec.tensor_names(self.config), shapes, strict=True))
        self.values = sum(math.prod(shape) for shape in shapes)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        raise BadModelFolder("blocks for measuring have no tokenizer")

    def file(self, name: str) -> Path | None:
        return None

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def read(self, name: str) -> Tensor:
        """No two alike: ONNX Runtime keeps equal tensors once, which are then in the caches whatever their number."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(self._shapes[name]).uniform_(-0.02, 0.02, generator=generator)


def _cache_bytes() -> int:
    """Bytes of the processor's last cache, as Linux knows it; 0 where it does not."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 0)
        sizes.append(int(text[:-1]) * unit if text[:-1].isdecimal() else 0)
    return max(sizes)


def _conditions(device: str, threads: int) -> dict[str, object]:
    where = pick_device(device)
    return {
        "measurement": _VERSION,
        "versions": {name: version(name) for name in ("isthmus", "torch", "onnxruntime", "transformers")},
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


def processor() -> str:
    """Its model, as Linux knows it; elsewhere its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(value), encoding="utf-8")
    os.replace(partial, path)
