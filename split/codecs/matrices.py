"""A codec for a vector that is several matrices one after another, such as an adapter: each in its own shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from isthmus.protos.v1 import codec_pb2
from isthmus.split.codecs.base import Codec, Keys
from isthmus.split.codecs.lowrank import FactorQuantiser
from isthmus.split.codecs.payload import Reader, Writer
from isthmus.split.codecs.state import CodecState
from isthmus.split.errors import CodecError


@dataclass(frozen=True)
class Matrices:
    """A codec that codes each matrix on its own, with a state of its own.

    shapes: of the matrices, which both ends know.
    """

    codec: Codec
    shapes: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return self.codec.name

    @property
    def exact(self) -> bool:
        return self.codec.exact

    def encode(self, x: Tensor, state: CodecState, keys: Keys | None = None) -> bytes:
        """Encode matrices that lie one after the other in x, (values,). keys: not used.

        Raises CodecError for NaN and infinity, unless the codec is exact.
        """
        self._check(x.shape)
        writer = Writer()
        parts = x.split([math.prod(shape) for shape in self.shapes])
        for part, shape, one in zip(parts, self.shapes, self._states(state), strict=True):
            writer.section(self.codec.encode(part.reshape(shape), one))
        return writer.done()

    def decode(self, payload: bytes, shape: Sequence[int], state: CodecState, keys: Keys | None = None) -> Tensor:
        """Decode to float32 (values,) on the CPU. Any bytes give a tensor or CodecError."""
        self._check(shape)
        reader = Reader(payload)
        parts = [
            self.codec.decode(reader.section(self.codec.wire_bytes(shape)), shape, one).reshape(-1)
            for shape, one in zip(self.shapes, self._states(state), strict=True)
        ]
        reader.done()
        return torch.cat(parts)

    def wire_bytes(self, shape: Sequence[int]) -> int:
        """The most that `encode` gives."""
        self._check(shape)
        return sum(Writer.section_bytes(self.codec.wire_bytes(one)) for one in self.shapes)

    def read_state(self, message: codec_pb2.CodecState) -> CodecState:
        """A state that was written down. Raises CodecError for one that this codec cannot have had."""
        return self.codec.read_state(message, len(self.shapes))

    def _check(self, shape: Sequence[int]) -> None:
        values = sum(math.prod(one) for one in self.shapes)
        if tuple(shape) != (values,):
            raise CodecError(f"a tensor of {tuple(shape)} in the place of matrices with {values} values")

    def _states(self, state: CodecState) -> list[CodecState]:
        if not state.matrices:
            state.matrices += [CodecState(state.seed + index) for index in range(len(self.shapes))]
        return state.matrices


AnyCodec: TypeAlias = Codec | Matrices


def for_matrices(codec: Codec, shapes: Sequence[Sequence[int]]) -> AnyCodec:
    """Adapt a codec to a vector that is matrices of these shapes: one by one, where it sends a matrix as factors.

    Other codecs lose nothing by the vector's being cut into rows of 256, and code it in one go.
    """
    if not isinstance(codec.quantiser, FactorQuantiser) or not shapes:
        return codec
    return Matrices(codec, tuple(tuple(shape) for shape in shapes))
