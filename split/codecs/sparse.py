"""Quantisers that send the largest values of each row and where they are; the others come back as 0.

Both are biased: what is not sent is lost unless `ef` (error feedback) sends it later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from isthmus.split.codecs.base import Entropy, Quantiser
from isthmus.split.codecs.floats import BFloat16, Float16
from isthmus.split.codecs.integers import Integer
from isthmus.split.codecs.packing import bits_for, pack, packed_size, unpack
from isthmus.split.codecs.payload import Reader, Writer
from isthmus.split.codecs.plain import Plain
from isthmus.split.codecs.state import CodecState
from isthmus.split.errors import CodecError

# Of the values that are sent; int8 has one scale for a row's values.
VALUES: dict[str, Quantiser] = {"bfloat16": BFloat16(), "float16": Float16(), "int8": Integer(8, row=True)}


@dataclass(frozen=True)
class TopK:
    """The share of each row with the largest absolute values (Aji and Heafield 2017, arXiv 1704.05021).

    Per row k = max(1, round(share * width)) values, and their places in rising order: k numbers of ceil(log2(width))
    bits, or a bitmap of width bits where that is smaller. What is sent has the error of `values`; the rest becomes 0.
    """

    share: float = 0.05
    values: str = "bfloat16"
    exact: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"topk{_share_name(self.share)}{_values_name(self.values)}"

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        k = _count(self.share, x.shape[1])
        return _write(x, _largest(x, k), self.values, entropy, state)

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        return _read(payload, rows, width, _count(self.share, width), self.values, entropy)

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        return _size(rows, width, _count(self.share, width), self.values, entropy)


@dataclass(frozen=True)
class RandTopK:
    """As TopK, but each of the k places is taken with probability alpha by a random value that is not among the largest
    k (Zheng et al. 2023, arXiv 2305.18469): so small values, too, are trained. Still biased.

    Where the others do not suffice, the largest fill up.
    """

    share: float = 0.05
    alpha: float = 0.1
    values: str = "bfloat16"
    exact: ClassVar[bool] = False

    @property
    def name(self) -> str:
        alpha = "" if self.alpha == 0.1 else f":alpha={self.alpha}"
        return f"randtopk{_share_name(self.share)}{alpha}{_values_name(self.values)}"

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        k = _count(self.share, x.shape[1])
        places = _with_others(_largest(x, k), x.shape[1], self.alpha, state.generator(x.device))
        return _write(x, places, self.values, entropy, state)

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        return _read(payload, rows, width, _count(self.share, width), self.values, entropy)

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        return _size(rows, width, _count(self.share, width), self.values, entropy)


def _share_name(share: float) -> str:
    return "" if share == 0.05 else f":share={share}"


def _values_name(values: str) -> str:
    return "" if values == "bfloat16" else f":values={values}"


def _count(share: float, width: int) -> int:
    return max(1, round(share * width))


def _largest(x: Tensor, k: int) -> Tensor:
    """(rows, k) places."""
    return x.abs().topk(k, dim=1, sorted=False).indices


def _with_others(largest: Tensor, width: int, alpha: float, generator: torch.Generator) -> Tensor:
    """A binomial number of slots stays with the largest, a random choice of them; each of the rest goes to a random
    other. That is the same distribution as drawing slot after slot."""
    rows, k = largest.shape
    device = largest.device
    stays = (torch.rand(rows, k, generator=generator, device=device) >= alpha).sum(1, keepdim=True)
    stays.clamp_(min=2 * k - width)
    most = k - int(stays.min())
    if not most:
        return largest
    mixed = largest.gather(1, torch.rand(rows, k, generator=generator, device=device).argsort(1))
    chances = torch.rand(rows, width, generator=generator, device=device).scatter_(1, largest, -1.0)
    others = chances.topk(most, dim=1, sorted=True).indices
    slots = torch.arange(k, device=device).expand(rows, k)
    return torch.where(slots < stays, mixed, others.gather(1, (slots - stays).clamp_(min=0, max=most - 1)))


def _is_bitmap(width: int, k: int) -> bool:
    return width < k * bits_for(width)


def _places_size(rows: int, width: int, k: int) -> int:
    return packed_size(rows * width, 1) if _is_bitmap(width, k) else packed_size(rows * k, bits_for(width))


def _size(rows: int, width: int, k: int, values: str, entropy: Entropy) -> int:
    places = entropy.squeezed_bytes(_places_size(rows, width, k))
    start = places if isinstance(entropy, Plain) else Writer.section_bytes(places)
    return start + VALUES[values].payload_bytes(rows, k, entropy)


def _write(x: Tensor, places: Tensor, values: str, entropy: Entropy, state: CodecState) -> bytes:
    rows, width = x.shape
    k = places.shape[1]
    places = places.sort(1).values
    if _is_bitmap(width, k):
        chosen = torch.zeros(rows, width, dtype=torch.uint8, device=x.device).scatter_(1, places, 1)
        written = pack(chosen.cpu().numpy(), 1)
    else:
        written = pack(places.int().cpu().numpy().view(np.uint32), bits_for(width))
    writer = Writer()
    if isinstance(entropy, Plain):  # which has a length that the other end knows
        writer.rest(written)
    else:
        writer.section(entropy.squeeze(written))
    writer.rest(VALUES[values].quantise(x.gather(1, places), entropy, state))
    return writer.done()


def _read(payload: bytes, rows: int, width: int, k: int, values: str, entropy: Entropy) -> Tensor:
    reader, size = Reader(payload), _places_size(rows, width, k)
    if isinstance(entropy, Plain):
        data = reader.take(size)
    else:
        data = entropy.expand(reader.section(entropy.squeezed_bytes(size)), size)
    sent = VALUES[values].dequantise(reader.rest(), rows, k, entropy)
    x = torch.zeros(rows, width)
    if _is_bitmap(width, k):
        chosen = torch.from_numpy(unpack(data, rows * width, 1).view(np.bool_)).reshape(rows, width)
        if (chosen.sum(1) != k).any():
            raise CodecError(f"a payload with a row that does not have {k} values")
        return x.masked_scatter_(chosen, sent)
    places = torch.from_numpy(unpack(data, rows * k, bits_for(width)).astype(np.int64)).reshape(rows, k)
    if (places[:, -1] >= width).any() or (places[:, 1:] <= places[:, :-1]).any():
        raise CodecError(f"a payload whose places do not rise from 0 to {width - 1}")
    return x.scatter_(1, places, sent)
