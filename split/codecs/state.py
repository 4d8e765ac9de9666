"""What one end of a link remembers of a stream of tensors, and how that is written and read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from isthmus.protos.v1 import codec_pb2, stage_pb2
from isthmus.split.errors import CodecError

_MOST_DIMENSIONS = 8
_MOST_COUNT = 2**62


@dataclass(frozen=True)
class Written:
    """What a part keeps, as plain numbers and float32 tensors with keys."""

    numbers: tuple[float, ...] = ()
    tensors: tuple[tuple[tuple[int, ...], Tensor], ...] = ()


class Kept(Protocol):
    """What a part of a codec keeps between tensors; each such part has a class of its own for it."""

    @property
    def bytes(self) -> int:
        """The size of its tensors, in bytes."""

    def written(self) -> Written: ...


Read = Callable[[Written], Kept]
"""Function of a part that reverses `written`. Raises CodecError for what the part cannot have written."""


@dataclass
class CodecState:
    """One end's memory of one stream of tensors. Equal seeds and equal tensors give equal bytes.

    count: number of tensors that have passed.
    parts: what each part of the pipeline keeps, by the part's name.
    matrices: the state of each matrix, for a codec that codes several.
    bits_a_value: bits a value of recent tensors, for `Codec.estimate`.
    """

    seed: int
    count: int = 0
    parts: dict[str, Kept] = field(default_factory=dict)
    matrices: list[CodecState] = field(default_factory=list)
    bits_a_value: float | None = None

    def generator(self, device: torch.device, salt: int = 0) -> torch.Generator:
        """Generator of the present tensor's random numbers, made from the seed and the number of tensors before it.

        salt: tells apart several generators for one tensor.
        """
        mixed = (self.seed * 1_000_003 + self.count) * 1_000_003 + salt
        return torch.Generator(device=device).manual_seed(mixed % 2**63)

    @property
    def memory_bytes(self) -> int:
        """Size of the tensors that the parts keep, in bytes."""
        return sum(part.bytes for part in self.parts.values()) + sum(one.memory_bytes for one in self.matrices)

    def to_proto(self) -> codec_pb2.CodecState:
        return codec_pb2.CodecState(
            seed=self.seed,
            count=self.count,
            bits_a_value=self.bits_a_value,
            parts={name: _to_proto(part.written()) for name, part in self.parts.items()},
            matrices=[one.to_proto() for one in self.matrices],
        )

    @classmethod
    def from_proto(cls, message: codec_pb2.CodecState, readers: Mapping[str, Read], matrices: int = 0) -> CodecState:
        """Reads a state, in no more memory than a small multiple of the message.

        readers: the readers of the codec's parts that keep something, by name.
        matrices: number of matrices that the codec codes each by itself.

        Raises CodecError for a state that a codec of these parts cannot have had.
        """
        if message.count > _MOST_COUNT or len(message.matrices) not in (0, matrices):
            raise CodecError(f"a codec's state after {message.count} tensors, of {len(message.matrices)} matrices")
        strange = sorted(set(message.parts) - set(readers))
        if strange:
            raise CodecError(f"a codec's state with a part {strange[0][:32]!r}, which the codec has not")
        bits = message.bits_a_value if message.HasField("bits_a_value") else None
        if bits is not None and not 0 <= bits < math.inf:
            raise CodecError(f"a codec's state with {bits} bits a value")
        parts = {name: readers[name](_from_proto(message.parts[name])) for name in sorted(message.parts)}
        states = [cls.from_proto(one, readers) for one in message.matrices]
        return cls(message.seed, message.count, parts, states, bits)


def tensor_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _to_proto(written: Written) -> codec_pb2.KeptPart:
    return codec_pb2.KeptPart(
        numbers=written.numbers,
        tensors=[
            codec_pb2.KeptTensor(
                key=key,
                values=stage_pb2.Tensor(
                    codec="none",
                    dtype="float32",
                    shape=tensor.shape,
                    payload=tensor.detach().cpu().contiguous().numpy().astype("<f4").tobytes(),
                ),
            )
            for key, tensor in written.tensors
        ],
    )


def _from_proto(message: codec_pb2.KeptPart) -> Written:
    tensors = []
    for kept in message.tensors:
        values, shape = kept.values, tuple(kept.values.shape)
        if (values.codec, values.dtype) != ("none", "float32") or len(shape) > _MOST_DIMENSIONS:
            raise CodecError("a codec's state with a tensor that is not float32 values as they are")
        if len(values.payload) != 4 * math.prod(shape):
            raise CodecError(f"{len(values.payload)} bytes of a codec's state for a tensor of {shape}")
        tensor = torch.from_numpy(np.frombuffer(values.payload, dtype="<f4").reshape(shape).copy())
        if not bool(torch.isfinite(tensor).all()):
            raise CodecError("a codec's state that holds NaN or infinity")
        tensors.append((tuple(kept.key), tensor))
    if not all(math.isfinite(number) for number in message.numbers):
        raise CodecError("a codec's state with a number that is not finite")
    return Written(tuple(message.numbers), tuple(tensors))
