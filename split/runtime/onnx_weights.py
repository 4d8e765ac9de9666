"""The weights of an ONNX graph: a data file beside it, written tensor by tensor, and their quantisation to few bits."""

from __future__ import annotations

from pathlib import Path

import torch
from onnx import TensorProto
from torch import Tensor

BLOCK = 32
BITS = {"int8": 8, "int4": 4}
WEIGHTS = ("float32", *BITS)
"""Formats of weights: float32, or integers with one float32 scale for each 32 values of a row."""

_ALIGNMENT = 4096  # a page, so that a tensor can be mapped
_TYPES = {torch.float32: TensorProto.FLOAT, torch.uint8: TensorProto.UINT8}


class WeightsFile:
    """A file of tensors that an ONNX graph names as its external data."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self.initializers: list[TensorProto] = []

    def add(self, name: str, tensor: Tensor) -> str:
        """Append a tensor (float32 or uint8); returns its name."""
        data = tensor.contiguous().numpy().data.cast("B")
        offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(offset)
        self._file.write(data)
        proto = TensorProto(name=name, data_type=_TYPES[tensor.dtype], dims=tensor.shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._path.name), ("offset", offset), ("length", data.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        self.initializers.append(proto)
        return name

    def close(self) -> None:
        self._file.close()


def quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise a weight, (outputs, inputs) float32, to (values, scales) as MatMulNBits takes them.

    values: (outputs, blocks, 32 * bits / 8) uint8, of 4 bits the lower half first; a value v stands for (v - 2 ** (bits
    - 1)) * scale. scales: (outputs, blocks) float32. A block's largest value in magnitude gets the one end of the range
    that has no opposite, so that all 2 ** bits steps are in use.
    """
    zero = 1 << (bits - 1)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK))
    blocks = padded.reshape(len(weight), -1, BLOCK)
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scales = extreme / -zero
    steps = torch.where(scales == 0, 0, blocks / scales).round_().add_(zero).clamp_(0, 2 * zero - 1)
    values = steps.to(torch.uint8)
    if bits == 4:
        values = values[..., ::2] | (values[..., 1::2] << 4)
    return values, scales.squeeze(2)
