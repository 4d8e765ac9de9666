"""No entropy coder: symbols as packed bits, bytes as they are. What every pipeline has that names no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from isthmus.split.codecs.packing import bits_for, pack, packed_size, unpack
from isthmus.split.errors import CodecError


@dataclass(frozen=True)
class Plain:
    """Every symbol takes as many bits as tell high - low + 1 values apart, 1 to 16."""

    name: ClassVar[str] = "plain"
    codes_bytes: ClassVar[bool] = True

    def pack(self, symbols: Tensor, low: int, high: int) -> bytes:
        bits = bits_for(high - low + 1)
        from_low = (symbols.cpu().numpy().reshape(-1) - np.int16(low)).view(np.uint16)
        return pack(from_low.astype(np.uint8) if bits <= 8 else from_low, bits)

    def unpack(self, payload: bytes, rows: int, width: int, low: int, high: int) -> Tensor:
        from_low = unpack(payload, rows * width, bits_for(high - low + 1))
        if from_low.max(initial=0) > high - low:
            raise CodecError(f"a payload with symbols above {high}")
        return torch.from_numpy(from_low.astype(np.int16) + np.int16(low)).reshape(rows, width)

    def packed_bytes(self, rows: int, width: int, low: int, high: int) -> int:
        return packed_size(rows * width, bits_for(high - low + 1))

    def squeeze(self, data: bytes) -> bytes:
        return data

    def expand(self, payload: bytes, size: int) -> bytes:
        if len(payload) != size:
            raise CodecError(f"{len(payload)} bytes in a payload where {size} have to be")
        return payload

    def squeezed_bytes(self, size: int) -> int:
        return size


PLAIN = Plain()
