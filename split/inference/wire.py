"""Batches to messages and back. Every size is checked before anything is allocated."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import CodecState, parse
from isthmus.split.codecs.wire import Expected, decode_tensor, encode_tensor
from isthmus.split.errors import BadFrame, BadTensor
from isthmus.split.runtime.base import Row

MAX_TOKENS = 8192  # in one batch


class HiddenCoder:
    """One end's coding of hidden states on one stream, with what its codec remembers of each direction."""

    def __init__(self, codec: str, seed: int, hidden_size: int) -> None:
        """codec: canonical name. Raises CodecError for one that there is not."""
        self._codec, self._hidden_size = parse(codec), hidden_size
        self._out, self._in = CodecState(seed), CodecState(seed)
        self.seconds = 0.0  # of encoding and decoding so far

    def encode(self, hidden: Tensor) -> stage_pb2.Tensor:
        if self._codec.name == "none":
            return encode_tensor(hidden)
        started = time.perf_counter()
        payload = self._codec.encode(hidden, self._out)
        self.seconds += time.perf_counter() - started
        return stage_pb2.Tensor(codec=self._codec.name, dtype="float32", shape=list(hidden.shape), payload=payload)

    def decode(self, message: stage_pb2.Tensor, tokens: int) -> Tensor:
        """(tokens, hidden). Raises BadTensor, also for NaN and infinity: they would stay in a cache."""
        shape = (tokens, self._hidden_size)
        expected = Expected("float32", shape, tokens * self._hidden_size, self._codec)
        started = time.perf_counter()
        hidden = decode_tensor(message, expected, self._in)
        self.seconds += time.perf_counter() - started
        # The sum is nearly always finite, and then all are. Each operation takes 0.1 ms on a core that has been idle.
        if not math.isfinite(np.add.reduce(hidden.numpy(), axis=None)) and not torch.isfinite(hidden).all():
            raise BadTensor("hidden states with NaN or infinity")
        return hidden


def rows_to_proto(rows: Sequence[Row]) -> list[pb.Row]:
    return [pb.Row(**vars(row)) for row in rows]


def rows_of(message: pb.Batch) -> list[Row]:
    """Raises BadFrame for none, or for more tokens than a batch may have."""
    rows = [Row(row.sequence, row.position, row.count, row.adapter, row.long) for row in message.rows]
    tokens = sum(row.count for row in rows)
    if not 0 < tokens <= MAX_TOKENS:
        raise BadFrame(f"a batch of {tokens} tokens; 1 to {MAX_TOKENS} can be")
    return rows


def codec_for_hidden_states(name: str) -> str:
    """The canonical name of a codec for hidden states of a chain. Raises CodecError, BadFrame for one with a memory."""
    codec = parse(name)
    if codec.memory is not None:
        raise BadFrame(f"{name}: hidden states of a chain are not remembered; choose a codec without ef and delta")
    return codec.name
