"""Quantiser `uniform`: equal steps in proportion to the RMS, for symbols that an entropy coder makes short."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from isthmus.split.codecs.base import Entropy
from isthmus.split.codecs.packing import pack_bits, packed_size, unpack_bits
from isthmus.split.codecs.payload import Reader, Writer
from isthmus.split.codecs.state import CodecState
from isthmus.split.errors import CodecError

_REACH = 16  # RMS that the symbols reach at least
_SMALLEST_LIMIT, _LARGEST_LIMIT = 127, 2**15 - 1
_STEPS = (0.001, 16)
_TINY = 2.0**-100  # below, values are zero
_HUGE = torch.finfo(torch.float32).max
_SCALE_CUT = 19  # bits of a float32 that the RMS of a row is sent without; 4 of the mantissa are left
_SCALE_CODES = 1 << (31 - _SCALE_CUT)
_ROUNDING = 2.0**-4  # at most, by the bits cut off
_COUNT, _SCALE, _SCALE_RANGE = struct.Struct("<I"), struct.Struct("<f"), struct.Struct("<HH")
_SEED = struct.Struct("<I")
_LOUD = 0.4  # RMS of the tensor: rows above it may have their dither taken off
_CROSSING = 0.7  # steps: columns above it likewise; below, not to take it off makes less error
_ALL, _SOME, _NONE = range(3)  # rows that have symbols


@dataclass(frozen=True)
class Uniform:
    """Symbols round(x / delta), delta = step * RMS of the row, or of the tensor.

    |x - decoded| <= (1/2 + deadzone) * delta always (for the row, delta is up to 1/17 smaller than said above): values
    that are too large for the symbols go apart, as float32. Only what is below 2^-100 becomes zero in any case. Rows
    without a symbol other than 0 take one bit. `tensor` is for gradients, of which small rows matter less.

    stochastic rounds up or down with the chances that make the mean of what is decoded the value; then |x - decoded| <
    delta. Gradients need it: what is always rounded to 0, as whole directions are after klt, is never learnt, and
    optimisers that rescale, like Adam, hear of small gradients too. The dither is drawn from a seed in the payload, and
    where values are mostly larger than delta (by rows and columns) the decoder takes it off again, which halves the
    squared error (subtractive dither: Roberts 1962; Schuchman 1964).

    deadzone, below 1/2, rounds that much towards 0. Symbols are then read as the mean of what was rounded to them
    (one correction for -1 and 1, one for all larger ones), within the bound.
    """

    step: float = 0.13
    per: Literal["row", "tensor"] = "row"
    deadzone: float = 0.0
    stochastic: bool = False
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not _STEPS[0] <= self.step <= _STEPS[1]:
            raise CodecError(f"uniform with a step of {self.step} RMS: choose {_STEPS[0]:g} to {_STEPS[1]:g}")
        if self.per not in ("row", "tensor"):
            raise CodecError(f"uniform with a step per {self.per}: choose row or tensor")
        if not 0 <= self.deadzone < 0.5:
            raise CodecError(f"uniform with a deadzone of {self.deadzone}: choose 0 or more, below 0.5")
        if self.stochastic and self.deadzone:
            raise CodecError("uniform is stochastic, or has a deadzone: choose one of them")

    @property
    def name(self) -> str:
        per = "" if self.per == "row" else f":per={self.per}"
        step = "" if self.step == Uniform.step else f":step={_short(self.step)}"
        deadzone = f":deadzone={_short(self.deadzone)}" if self.deadzone else ""
        stochastic = ":stochastic" if self.stochastic else ""
        return f"uniform{step}{per}{deadzone}{stochastic}"

    @property
    def limit(self) -> int:
        """The largest |symbol|."""
        return min(max(math.ceil(_REACH / self.step), _SMALLEST_LIMIT), _LARGEST_LIMIT)

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        delta, codes = self._deltas(x)
        steps = x / delta
        writer = Writer()
        dither = self._write_dither(steps, state, writer) if self.stochastic else None
        symbols = self._rounded(steps) if dither is None else (steps + dither.noise.to(x.device)).floor_()
        self._write_escapes(x, symbols, writer)
        kept = (symbols != 0).any(1)
        if dither is not None:
            kept |= dither.rows.to(kept.device)
        rows = int(kept.sum())
        writer.rest(bytes([_ALL if rows == len(x) else _SOME if rows else _NONE]))
        if rows and rows < len(x):
            writer.rest(pack_bits(kept))
            symbols = symbols[kept]
            steps = steps[kept] if self.deadzone else steps
        if rows:
            if self.per == "tensor":
                writer.rest(_SCALE.pack(float(codes)))
            else:
                _write_scales(codes[kept].cpu(), entropy, writer)
            if self.deadzone:
                writer.rest(self._corrections(steps.abs(), symbols.abs()))
            writer.rest(entropy.pack(symbols.to(torch.int16).cpu(), -self.limit, self.limit))
        return writer.done()

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        reader = Reader(payload)
        dither = _read_dither(reader, rows, width) if self.stochastic else None
        where, escaped = self._read_escapes(reader, rows * width)
        (kind,) = reader.take(1)
        if kind > _NONE:
            raise CodecError(f"rows of a kind that is not known: {kind}")
        kept = torch.ones(rows, dtype=torch.bool) if kind == _ALL else torch.zeros(rows, dtype=torch.bool)
        if kind == _SOME:
            kept = unpack_bits(reader.take(packed_size(rows, 1)), (rows,))
        count = int(kept.sum())
        if not count:
            reader.done()
            values = torch.zeros(rows, width)
        else:
            scales = self._read_scales(reader, count, entropy)
            corrections = reader.take(2) if self.deadzone else b"\0\0"
            symbols = entropy.unpack(reader.rest(), count, width, -self.limit, self.limit)
            steps = self._steps(symbols, corrections)
            if dither is not None:
                steps -= dither.taken_off()[kept]
            coded = steps.mul_(scales * self.step).clamp_(-_HUGE, _HUGE)
            values = coded if kind == _ALL else torch.zeros(rows, width).index_put_((kept,), coded)
        values.view(-1)[where] = escaped
        return values

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        escapes = _COUNT.size + 8 * self._most_escapes(rows * width)
        dither = _SEED.size + packed_size(rows, 1) + packed_size(width, 1) if self.stochastic else 0
        kept = 1 + packed_size(rows, 1)
        if self.per == "tensor":
            scales = _SCALE.size
        else:
            scales = _SCALE_RANGE.size + Writer.section_bytes(entropy.packed_bytes(rows, 1, 0, _SCALE_CODES - 1))
        corrections = 2 if self.deadzone else 0
        symbols = entropy.packed_bytes(rows, width, -self.limit, self.limit)
        return dither + escapes + kept + scales + corrections + symbols

    def _deltas(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Delta, and the RMS that is sent: as float32 for the tensor, as (rows,) codes for rows."""
        if self.per == "tensor":
            scale = _rms(x.view(1, -1))[0, 0]
            return self._usable(scale), scale
        codes = _rms(x).view(torch.int32) >> _SCALE_CUT
        return self._usable((codes << _SCALE_CUT).view(torch.float32)), codes[:, 0]

    def _usable(self, scales: Tensor) -> Tensor:
        """Deltas: infinity where the scale is 0, so that all symbols are 0."""
        deltas = scales * self.step
        if not torch.isfinite(deltas.max()):
            raise CodecError(f"values near 3e38 cannot be coded by {self.name}: has training diverged?")
        return deltas.where(scales > 0, torch.inf)

    def _read_scales(self, reader: Reader, rows: int, entropy: Entropy) -> Tensor:
        """() or (rows, 1)."""
        if self.per == "tensor":
            scales = torch.tensor(_SCALE.unpack(reader.take(_SCALE.size))[0])
        else:
            scales = _scales_from(reader, rows, entropy)
        if not (scales.min() >= 0 and torch.isfinite(scales.max() * self.step)):
            raise CodecError("a payload with a scale that is negative, infinite or NaN")
        return scales

    def _write_dither(self, steps: Tensor, state: CodecState, writer: Writer) -> _Dither:
        (seed,) = torch.randint(0, 2**31, (1,), generator=state.generator(torch.device("cpu"))).tolist()
        power = steps.square().clamp_(max=_REACH**2 / self.step**2)
        in_rows, in_columns = power.mean(1).cpu(), power.mean(0).cpu()
        rows = in_rows > (_LOUD / self.step) ** 2
        columns = in_columns > _CROSSING**2
        writer.rest(_SEED.pack(seed))
        for flags in (rows, columns):
            writer.rest(pack_bits(flags))
        return _Dither(_noise(seed, *steps.shape), rows, columns)

    def _rounded(self, steps: Tensor) -> Tensor:
        if not self.deadzone:
            return steps.round()
        return (steps.abs() + (0.5 - self.deadzone)).trunc_().mul_(steps.sign())

    def _corrections(self, steps: Tensor, symbols: Tensor) -> bytes:
        """Means of steps - symbols, from 0 to 2 * deadzone, as a byte each: of the symbols 1, and of larger ones."""
        rest = steps - symbols
        beyond = (symbols - 1).clamp_(0, 1)
        masks = symbols.clamp(max=1) - beyond, beyond
        means = [float((rest * mask).sum() / mask.sum().clamp(min=1)) for mask in masks]
        return bytes(round(min(max(mean / (2 * self.deadzone), 0), 1) * 255) for mean in means)

    def _steps(self, symbols: Tensor, corrections: bytes) -> Tensor:
        """Symbols as float32, corrected."""
        steps = symbols.float()
        if not self.deadzone:
            return steps
        ones, larger = (2 * self.deadzone * code / 255 for code in corrections)
        beyond = (steps.abs() - 1).clamp_(0, 1)  # 1 for the larger ones
        return steps + steps.sign() * (ones + (larger - ones) * beyond)

    def _most_escapes(self, count: int) -> int:
        """By Chebyshev's inequality; 2 % of slack for rounding."""
        reach = self.limit * self.step * (1 - _ROUNDING)
        return int(1.02 * count / reach**2) + 1

    def _write_escapes(self, x: Tensor, symbols: Tensor, writer: Writer) -> None:
        """And sets their symbols to 0."""
        least, greatest = symbols.aminmax()
        if max(-least, greatest) <= self.limit:
            writer.rest(_COUNT.pack(0))
            return
        where = torch.nonzero(symbols.view(-1).abs() > self.limit)[:, 0]
        symbols.view(-1)[where] = 0
        writer.rest(_COUNT.pack(len(where)))
        writer.rest(where.cpu().numpy().astype("<u4").tobytes())
        writer.rest(x.view(-1)[where].cpu().numpy().astype("<f4").tobytes())

    def _read_escapes(self, reader: Reader, count: int) -> tuple[Tensor, Tensor]:
        (escapes,) = _COUNT.unpack(reader.take(_COUNT.size))
        if escapes > self._most_escapes(count):
            raise CodecError(f"{escapes} values sent apart of {count}; {self._most_escapes(count)} can be")
        where = np.frombuffer(reader.take(4 * escapes), dtype="<u4").astype(np.int64)
        values = np.frombuffer(reader.take(4 * escapes), dtype="<f4").astype(np.float32)
        if escapes and (where.max() >= count or not np.isfinite(values).all()):
            raise CodecError("values sent apart that are outside of the tensor, infinite or NaN")
        return torch.from_numpy(where), torch.from_numpy(values)


@dataclass(frozen=True)
class _Dither:
    """Noise, (rows, width) from 0 to 1, that is added before rounding.

    rows, columns: flags, which cross where the noise is taken off again.
    """

    noise: Tensor
    rows: Tensor
    columns: Tensor

    def taken_off(self) -> Tensor:
        """(rows, width), in steps."""
        return (self.noise - 0.5).mul_(self.rows.unsqueeze(1)).mul_(self.columns)


def _noise(seed: int, rows: int, width: int) -> Tensor:
    """On the CPU, so that both ends draw the same whatever they compute on."""
    return torch.rand((rows, width), generator=torch.Generator().manual_seed(seed))


def _read_dither(reader: Reader, rows: int, width: int) -> _Dither:
    (seed,) = _SEED.unpack(reader.take(_SEED.size))
    flags = [unpack_bits(reader.take(packed_size(count, 1)), (count,)) for count in (rows, width)]
    return _Dither(_noise(seed, rows, width), *flags)


def _rms(x: Tensor) -> Tensor:
    """(rows, width) -> (rows, 1); 0 where there is nothing above 2^-100. Squares neither vanish nor overflow."""
    largest = x.abs().amax(1, keepdim=True)
    there = largest > _TINY
    mean = (x / largest.where(there, 1.0)).square_().mean(1, keepdim=True)
    rms: Tensor = (largest * mean.sqrt_()).where(there, 0.0)
    return rms


def _short(value: float) -> str:
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _write_scales(codes: Tensor, entropy: Entropy, writer: Writer) -> None:
    """Write scales. codes: (rows,) int32."""
    least, greatest = (int(code) for code in codes.aminmax())
    writer.rest(_SCALE_RANGE.pack(least, greatest))
    writer.section(entropy.pack((codes - least).to(torch.int16).unsqueeze(1), 0, greatest - least))


def _scales_from(reader: Reader, rows: int, entropy: Entropy) -> Tensor:
    """(rows, 1)."""
    least, greatest = _SCALE_RANGE.unpack(reader.take(_SCALE_RANGE.size))
    if not least <= greatest < _SCALE_CODES:
        raise CodecError("a payload with scales that cannot be")
    payload = reader.section(entropy.packed_bytes(rows, 1, 0, greatest - least))
    codes: Tensor = entropy.unpack(payload, rows, 1, 0, greatest - least).int() + least
    return (codes << _SCALE_CUT).view(torch.float32)
