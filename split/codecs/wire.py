"""Tensors to messages and back. Every size is checked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import AnyCodec, CodecState, parse
from isthmus.split.errors import BadTensor

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
}
AS_IT_IS = parse("none")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Expected:
    """What was agreed of a tensor on the wire.

    shape: a None in it leaves that size open. at_most: the most values in all.
    """

    dtype: str
    shape: tuple[int | None, ...]
    at_most: int
    codec: AnyCodec = AS_IT_IS


def encode_tensor(tensor: Tensor) -> stage_pb2.Tensor:
    """Encode a tensor as it is, little-endian and row-major; any shape and device, one of DTYPES."""
    if tensor.dtype not in _NAMES:
        raise BadTensor(f"a tensor of {tensor.dtype} cannot be sent; choose one of {', '.join(DTYPES)}")
    values = tensor.detach().cpu()
    if values.dtype == torch.bfloat16:  # which NumPy has not
        values = values.view(torch.int16)
    return stage_pb2.Tensor(
        codec="none", dtype=_NAMES[tensor.dtype], shape=tensor.shape, payload=values.numpy().tobytes()
    )


def check_tensor(message: stage_pb2.Tensor, expected: Expected) -> None:
    """Raises BadTensor unless codec, dtype, shape and payload size are what was agreed. Allocates nothing."""
    if message.codec != expected.codec.name:
        raise BadTensor(f"codec {message.codec[:32]!r} was not agreed on; agreed: {expected.codec.name}")
    if message.dtype != expected.dtype:
        raise BadTensor(f"dtype {message.dtype[:32]!r} was not agreed on; agreed: {expected.dtype}")
    if len(message.shape) != len(expected.shape):
        raise BadTensor(f"{len(message.shape)} dimensions; {len(expected.shape)} were agreed on")
    shape = tuple(message.shape)
    if not _matches(shape, expected.shape):
        agreed = ", ".join("any" if size is None else str(size) for size in expected.shape)
        raise BadTensor(f"shape {shape[:8]} was not agreed on; agreed: ({agreed})")
    values = math.prod(shape)
    if values > expected.at_most:
        raise BadTensor(f"{values} values are more than the {expected.at_most} agreed on")
    size = values * DTYPES[message.dtype].itemsize
    if message.codec != "none":
        most = expected.codec.wire_bytes(shape)
        if len(message.payload) > most:
            raise BadTensor(
                f"{len(message.payload)} bytes of payload; {message.codec} takes at most {most} for shape {shape}"
            )
    elif len(message.payload) != size:
        raise BadTensor(f"{len(message.payload)} bytes of payload; shape {shape} of {message.dtype} takes {size}")


def decode_tensor(
    message: stage_pb2.Tensor,
    expected: Expected,
    state: CodecState | None = None,
    keys: Sequence[int] | None = None,
) -> Tensor:
    """Decode a message to a tensor on the CPU. Raises BadTensor when it is not what was agreed.

    state, keys: as for `Codec.decode`, of a codec other than none.
    """
    check_tensor(message, expected)
    if expected.codec.name != "none":
        return expected.codec.decode(message.payload, tuple(message.shape), state or CodecState(0), keys)
    dtype, shape = DTYPES[message.dtype], tuple(message.shape)
    if not message.payload:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(message.payload), dtype=dtype).reshape(shape)


def _matches(shape: Sequence[int], agreed: Sequence[int | None]) -> bool:
    return len(shape) == len(agreed) and all(
        got > 0 if want is None else got == want for got, want in zip(shape, agreed, strict=True)
    )
