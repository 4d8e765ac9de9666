"""How other libraries put tensors into eight bits, written here from their published descriptions, to compare with.

Their arithmetic, so their bits and errors are these; their speed is that of their own kernels, not of this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from isthmus.split.codecs import Codec, CodecState

_CODES = 256
_SIGMAS = 6  # that the evenly spaced buckets span: three to each side of the mean
_BLOCK = 4096
_CHUNK = 100_000  # values whose quantiles are taken at once


class Method(Protocol):
    """What is measured: a codec of Isthmus with the state of both ends, or another library's way."""

    @property
    def name(self) -> str: ...
    def encode(self, x: Tensor, keys: Sequence[int]) -> bytes: ...
    def decode(self, payload: bytes, shape: Sequence[int], keys: Sequence[int]) -> Tensor: ...


@dataclass
class Ours:
    """A codec, with what both ends remember of one stream. keys: of the samples, for memories."""

    codec: Codec
    near: CodecState = field(default_factory=lambda: CodecState(0))
    far: CodecState = field(default_factory=lambda: CodecState(0))

    @property
    def name(self) -> str:
        return self.codec.name

    def encode(self, x: Tensor, keys: Sequence[int]) -> bytes:
        return self.codec.encode(x, self.near, keys)

    def decode(self, payload: bytes, shape: Sequence[int], keys: Sequence[int]) -> Tensor:
        return self.codec.decode(payload, shape, self.far, keys)


@dataclass(frozen=True)
class Buckets:
    """hivemind 1.1, `compression/quantization.py`: 256 buckets, a byte a value, and the table of the buckets' means.

    uniform8: evenly spaced over 6 standard deviations around the mean of the tensor (Uniform8BitQuantization).
    quantile8: at the tensor's quantiles, approximated by the quantiles of those of chunks (Quantile8BitQuantization).
    """

    kind: str = "uniform8"

    @property
    def name(self) -> str:
        return f"hivemind:{self.kind}"

    def encode(self, x: Tensor, keys: Sequence[int]) -> bytes:
        flat = x.detach().float().reshape(-1)
        codes = _even_codes(flat) if self.kind == "uniform8" else _quantile_codes(flat)
        sums = torch.zeros(_CODES).scatter_add_(0, codes.long(), flat)
        means = sums / torch.bincount(codes, minlength=_CODES).clamp_(min=1)
        return b"".join((len(means).to_bytes(8, "little"), means.numpy().tobytes(), codes.numpy().tobytes()))

    def decode(self, payload: bytes, shape: Sequence[int], keys: Sequence[int]) -> Tensor:
        means = np.frombuffer(payload, "<f4", _CODES, offset=8)
        codes = np.frombuffer(payload, np.uint8, offset=8 + means.nbytes)
        return torch.from_numpy(means.take(codes)).reshape(tuple(shape))


@dataclass(frozen=True)
class DynamicBlocks:
    """bitsandbytes: the dynamic 8-bit map, times the largest absolute value of each block of 4096 as float32.

    Dettmers et al. 2021, arXiv 2110.02861, sections 1.3 and 2.1; the map is `dynamic_map`.
    """

    @property
    def name(self) -> str:
        return "bitsandbytes:dynamic8"

    def encode(self, x: Tensor, keys: Sequence[int]) -> bytes:
        flat = x.detach().float().reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
        largest = blocks.abs().amax(1, keepdim=True)
        places = blocks / largest.where(largest > 0, 1.0)
        codes = torch.bucketize(places, _BORDERS, out_int32=True).to(torch.uint8).view(-1)[: len(flat)]
        return largest.numpy().tobytes() + codes.numpy().tobytes()

    def decode(self, payload: bytes, shape: Sequence[int], keys: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        largest = np.frombuffer(payload, "<f4", -(-count // _BLOCK))
        codes = np.frombuffer(payload, np.uint8, offset=largest.nbytes)
        flat = torch.from_numpy(_MAP.take(codes))
        blocks = torch.nn.functional.pad(flat, (0, -count % _BLOCK)).view(-1, _BLOCK)
        return (blocks * torch.from_numpy(largest.copy()).unsqueeze(1)).view(-1)[:count].reshape(tuple(shape))


def dynamic_map() -> Tensor:
    """(256,) float32, rising from about -0.993 to 1.

    A sign; up to seven places that say the power of ten, 10^-6 to 1; and what is left of the seven bits, 0 to 6, as
    evenly spaced fractions: the middles of equal parts of 0.1 to 1. Beside them 0 and 1.
    """
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float64)
        positive.append(10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2)
    halves = torch.cat(positive)
    return torch.cat([-halves, halves, torch.tensor([0.0, 1.0])]).sort().values.float()


def _even_codes(flat: Tensor) -> Tensor:
    """uint8."""
    mean = flat.mean()
    width = _SIGMAS * flat.std() / _CODES
    steps = ((flat - mean) / width.clamp(min=torch.finfo(torch.float32).tiny)).round_()
    return steps.add_(_CODES // 2).clamp_(0, _CODES - 1).to(torch.uint8)


def _quantile_codes(flat: Tensor) -> Tensor:
    """uint8."""
    shares = np.linspace(0, 1, _CODES + 1)
    chunks = np.array_split(flat.numpy(), max(1, len(flat) // _CHUNK))
    borders = np.quantile(np.stack([np.quantile(chunk, shares) for chunk in chunks]), shares)[1:-1]
    return torch.bucketize(flat, torch.from_numpy(borders).float(), out_int32=True).to(torch.uint8)


_MAP = dynamic_map().numpy()
_BORDERS = (dynamic_map()[1:] + dynamic_map()[:-1]) / 2


def others() -> list[Method]:
    return [Buckets("uniform8"), Buckets("quantile8"), DynamicBlocks()]
