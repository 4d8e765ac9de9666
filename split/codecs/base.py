"""Codecs: a pipeline of up to four parts, and the state that one end of a link keeps for it.

    memory (ef, delta)  ->  transform (hadamard, klt, ...)  ->  quantiser (int4, uniform, topk, ...)  ->  entropy coder

Only the quantiser has to be there. A part is a small frozen object made from its name and parameters (grammar.py);
what it remembers between tensors lies in the state, one for each end and direction of a link, so a codec itself can be
shared. Backward through a codec is the straight-through estimator: hidden states and gradients each have their own
codec, and nothing is differentiated through either. That is biased: the gradient is of the decoded hidden states, not
of the sent ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from isthmus.protos.v1 import codec_pb2
from isthmus.split.codecs.finite import is_finite
from isthmus.split.codecs.payload import Reader, Writer
from isthmus.split.codecs.state import CodecState, Kept, Written
from isthmus.split.errors import CodecError

Keys = Sequence[int]  # of the samples of a batch: rows of the tensor's first dimension, across epochs


@runtime_checkable
class Keeps(Protocol):
    """A part that keeps something in the state."""

    @property
    def name(self) -> str: ...

    def read(self, written: Written) -> Kept:
        """What it had kept. Raises CodecError for what it cannot have written."""


class Memory(Protocol):
    """Adds what is remembered before coding, and takes note of what the other end will have decoded."""

    @property
    def name(self) -> str: ...

    def before(self, x: Tensor, keys: Keys, state: CodecState) -> Tensor:
        """The tensor to code in the place of x: (batch, ...) in, the same shape out."""

    def coded(self, given: Tensor, decoded: Tensor, keys: Keys, state: CodecState) -> None:
        """At the encoder: `given` was what `before` made, `decoded` is what the other end gets of it."""

    def after(self, decoded: Tensor, keys: Keys, state: CodecState) -> Tensor:
        """At the decoder: the tensor that `decoded` stands for."""


class Transform(Protocol):
    """An invertible change of the last dimension, or to fewer dimensions."""

    @property
    def name(self) -> str: ...

    def forward(self, x: Tensor, state: CodecState) -> tuple[bytes, Tensor]:
        """(rows, width) float32 -> what the other end needs to know (may be empty), and (rows, self.width(width))."""

    def receive(self, side: bytes, width: int, state: CodecState) -> None:
        """At the decoder, before `inverse`: takes in the side information. Raises CodecError if it is not right."""

    def inverse(self, y: Tensor, width: int, state: CodecState) -> Tensor:
        """(rows, self.width(width)) -> (rows, width)."""

    def width(self, width: int) -> int: ...

    def side_bytes(self, width: int) -> int:
        """The most that `forward` gives as side information; 0: it never gives any, and no section is sent for it."""


class Entropy(Protocol):
    """A lossless way to write symbols and bytes."""

    @property
    def name(self) -> str: ...

    @property
    def codes_bytes(self) -> bool:
        """Whether `squeeze` can be used."""

    def pack(self, symbols: Tensor, low: int, high: int) -> bytes:
        """Write symbols, (rows, width) int16 from low to high."""

    def unpack(self, payload: bytes, rows: int, width: int, low: int, high: int) -> Tensor:
        """Undo `pack`: (rows, width) int16 on the CPU. Raises CodecError."""

    def packed_bytes(self, rows: int, width: int, low: int, high: int) -> int:
        """The most that `pack` gives."""

    def squeeze(self, data: bytes) -> bytes: ...

    def expand(self, payload: bytes, size: int) -> bytes:
        """Exactly `size` bytes, or CodecError; never allocates more."""

    def squeezed_bytes(self, size: int) -> int:
        """The most that `squeeze` gives for `size` bytes."""


class Quantiser(Protocol):
    """Values to a payload and back; remembers nothing that the decoder would need."""

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool:
        """Whether float32 comes back bit for bit."""

    def quantise(self, x: Tensor, entropy: Entropy, state: CodecState) -> bytes:
        """(rows, width) float32, finite unless `exact` -> payload."""

    def dequantise(self, payload: bytes, rows: int, width: int, entropy: Entropy) -> Tensor:
        """Undo `quantise`: float32 on the CPU. Raises CodecError for anything that quantise cannot have made."""

    def payload_bytes(self, rows: int, width: int, entropy: Entropy) -> int:
        """The most that `quantise` gives."""


@dataclass(frozen=True)
class Codec:
    """A pipeline by its canonical `name`. Tensors of any float dtype, shape and device in; float32 out."""

    name: str
    quantiser: Quantiser
    entropy: Entropy
    transform: Transform | None = None
    memory: Memory | None = None

    @property
    def families(self) -> frozenset[str]:
        """Names of its parts, without parameters: what the other side has to have."""
        return frozenset(part.partition(":")[0] for part in self.name.split(","))

    @property
    def exact(self) -> bool:
        """Whether float32 comes back bit for bit."""
        return self.quantiser.exact and self.transform is None and self.memory is None

    def encode(self, x: Tensor, state: CodecState, keys: Keys | None = None) -> bytes:
        """Encode a tensor of floats, of any shape and device.

        keys: of the samples in x's first dimension (a vector is one sample), for codecs with a memory; None: each
        sample's place in the batch. Raises CodecError for NaN and infinity, unless the codec is exact.
        """
        if not x.is_floating_point():
            raise CodecError(f"codec {self.name} takes floats, not {x.dtype}")
        given = x.detach().float()
        if not self.exact:
            check_finite(given, self.name)
        if self.memory is not None and x.numel():
            given = _batch(given)
            used = _keys_of(given, keys)
            given = self.memory.before(given, used, state)
        flat, width = _matrix(given.reshape(x.shape))
        writer = Writer()
        if flat.numel():
            coded = flat
            if self.transform is not None:
                side, coded = self.transform.forward(flat, state)
                if self.transform.side_bytes(width):
                    writer.section(side)
            if self.transform is not None or self.memory is not None:
                check_finite(coded, self.name)  # sums can overflow
            payload = self.quantiser.quantise(coded, self.entropy, state)
            writer.rest(payload)
            if self.memory is not None:
                decoded = self._decoded(payload, len(flat), width, state).to(given.device).reshape(given.shape)
                self.memory.coded(given, decoded, used, state)
        written = writer.done()
        state.count += 1
        if x.numel():
            bits = 8 * len(written) / x.numel()
            state.bits_a_value = bits if state.bits_a_value is None else 0.8 * state.bits_a_value + 0.2 * bits
        return written

    def decode(self, payload: bytes, shape: Sequence[int], state: CodecState, keys: Keys | None = None) -> Tensor:
        """Decode to float32 of `shape` on the CPU.

        Any bytes give a tensor or CodecError, and never take more memory than the tensor (a small multiple of it while
        decoding).
        """
        most = self.wire_bytes(shape)
        if len(payload) > most:
            raise CodecError(f"a payload of {len(payload)} bytes; {self.name} makes at most {most} of {tuple(shape)}")
        rows, width = matrix_shape(shape)
        reader = Reader(payload)
        decoded = torch.empty(0)
        if rows * width:
            if self.transform is not None:
                most_side = self.transform.side_bytes(width)
                self.transform.receive(reader.section(most_side) if most_side else b"", width, state)
            decoded = self._decoded(reader.rest(), rows, width, state)
            if not self.exact and not is_finite(decoded):
                raise CodecError(f"a payload of {self.name} that holds NaN or infinity")
        else:
            reader.done()
        decoded = decoded.reshape(tuple(shape))
        if self.memory is not None and decoded.numel():
            batch = _batch(decoded)
            decoded = self.memory.after(batch, _keys_of(batch, keys), state).reshape(tuple(shape))
        state.count += 1
        return decoded

    def wire_bytes(self, shape: Sequence[int]) -> int:
        """The most that `encode` gives for this shape; without klt, uniform and entropy coder, what it gives."""
        rows, width = matrix_shape(shape)
        if not rows * width:
            return 0
        coded = width if self.transform is None else self.transform.width(width)
        most_side = 0 if self.transform is None else self.transform.side_bytes(width)
        side = Writer.section_bytes(most_side) if most_side else 0
        return side + self.quantiser.payload_bytes(rows, coded, self.entropy)

    def estimate(self, shape: Sequence[int], state: CodecState | None = None) -> float:
        """Bytes to expect: from recent tensors if there were any, else the bound."""
        if state is None or state.bits_a_value is None:
            return float(self.wire_bytes(shape))
        return math.prod(shape) * state.bits_a_value / 8

    def read_state(self, message: codec_pb2.CodecState, matrices: int = 0) -> CodecState:
        """A state that was written down. matrices: how many have a state of their own (matrices.py).

        Raises CodecError for one that this codec cannot have had."""
        parts: tuple[object, ...] = (self.memory, self.transform, self.quantiser)
        readers = {part.name: part.read for part in parts if isinstance(part, Keeps)}
        return CodecState.from_proto(message, readers, matrices)

    def _decoded(self, payload: bytes, rows: int, width: int, state: CodecState) -> Tensor:
        coded = width if self.transform is None else self.transform.width(width)
        values = self.quantiser.dequantise(payload, rows, coded, self.entropy)
        return values if self.transform is None else self.transform.inverse(values, width, state)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix, (rows, width), as which a tensor is coded: the last dimension is the width.

    A vector whose length is a multiple of 256 is cut into rows of 256, any other is one row; a scalar is one value.
    """
    if len(shape) == 0:
        return 1, 1
    if len(shape) == 1:
        return (shape[0] // 256, 256) if shape[0] and shape[0] % 256 == 0 else (1, shape[0])
    return math.prod(shape[:-1]), shape[-1]


def check_finite(x: Tensor, name: str) -> None:
    if not is_finite(x):
        raise CodecError(f"NaN or infinity cannot be coded by {name}: if training has diverged, lower learning_rate")


def _matrix(x: Tensor) -> tuple[Tensor, int]:
    rows, width = matrix_shape(x.shape)
    return x.reshape(rows, width).contiguous(), width


def _batch(x: Tensor) -> Tensor:
    """Make a vector, such as an adapter, a batch of one sample."""
    return x if x.dim() > 1 else x.reshape(1, -1)


def _keys_of(x: Tensor, keys: Keys | None) -> Keys:
    batch = x.shape[0]
    if keys is None:
        return range(batch)
    if len(keys) != batch:
        raise CodecError(f"{len(keys)} keys for a batch of {batch}")
    return keys
