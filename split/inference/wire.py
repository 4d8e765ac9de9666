"""Turns batches of a chain into messages and back. Every size is checked before anything is allocated."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import CodecState, parse
from isthmus.split.codecs.wire import Expected
from isthmus.split.errors import BadFrame
from isthmus.split.link.coding import StreamCoder
from isthmus.split.runtime.base import BadPosition, Row

MAX_TOKENS = 8192  # most tokens in one batch
_NOT_FINITE = "hidden states with NaN or infinity"  # they would stay in a cache


class HiddenCoder:
    """One end's coding of hidden states on one stream, with what its codec remembers of each direction."""

    def __init__(self, codec: str, seed: int, hidden_size: int) -> None:
        """codec: canonical name. Raises CodecError for an unknown one."""
        self._hidden_size = hidden_size
        self._out, self._in = (StreamCoder(parse(codec), CodecState(seed), _NOT_FINITE) for _ in range(2))
        self.seconds = 0.0  # seconds of encoding and decoding so far

    def encode(self, hidden: Tensor) -> stage_pb2.Tensor:
        started = time.perf_counter()
        message = self._out.encode(hidden)
        self.seconds += time.perf_counter() - started
        return message

    def decode(self, message: stage_pb2.Tensor, tokens: int) -> Tensor:
        """Decodes hidden states, (tokens, hidden). Raises BadTensor or CodecError for others, such as with NaN."""
        shape = (tokens, self._hidden_size)
        expected = Expected("float32", shape, tokens * self._hidden_size, self._in.codec)
        started = time.perf_counter()
        hidden = self._in.decode(message, expected)
        self.seconds += time.perf_counter() - started
        return hidden


@dataclass(frozen=True)
class Limits:
    """What the computing end of a stream takes.

    sequences: number of sequences, which are numbered from 0.
    batch: most tokens of a batch.
    context: most tokens of a sequence.
    adapters: number of adapters, which are numbered from 1.
    codec: canonical name of the only codec allowed; empty for any.
    """

    sequences: int
    batch: int
    context: int
    adapters: int
    codec: str = ""


@dataclass(frozen=True)
class HiddenBatch:
    """The next tokens of some sequences.

    hidden: (tokens of all rows in order, hidden size).
    """

    id: int
    rows: tuple[Row, ...]
    hidden: Tensor


@dataclass(frozen=True)
class Forget:
    """Sequences whose tokens are not needed any more."""

    sequences: tuple[int, ...]


class ComputingEnd:
    """The end of a chain's stream that computes: a holder's, or the gateway's for a guest.

    It checks and decodes what comes, and encodes what goes back.
    """

    def __init__(self, hidden_size: int, limits: Limits) -> None:
        self._hidden_size, self._limits = hidden_size, limits
        self._coder: HiddenCoder | None = None
        self._last = 0  # number of the last batch

    def take(self, message: pb.ToHolder) -> HiddenBatch | Forget | None:
        """Checks and decodes a message; returns None if it only says how hidden states are coded.

        Raises BadFrame, BadTensor or CodecError for what was not agreed.
        """
        kind = message.WhichOneof("kind")
        if kind == "agreed" and self._coder is None:
            self._agree(message.agreed)
            return None
        if kind == "batch" and self._coder is not None:
            return self._batch(message.batch, self._coder)
        if kind == "forget":
            return self._forget(message.forget)
        raise BadFrame(f"{kind} out of turn")

    def result(self, batch: int, output: Tensor, computing: float) -> pb.Result:
        """Encodes a result. Results have to be made in the order in which they are sent.

        batch: number of the batch.
        output: hidden states, (tokens, hidden).
        computing: seconds that it took.
        """
        assert self._coder is not None
        coding = self._coder.seconds
        hidden = self._coder.encode(output)
        return pb.Result(
            id=batch, hidden=hidden, computing_seconds=computing, coding_seconds=self._coder.seconds - coding
        )

    @staticmethod
    def failure(batch: int, error: Exception, line: str = "") -> pb.Result:
        """The result of a batch that failed, which ends no other batch."""
        return pb.Result(id=batch, error=line or str(error), bad_position=isinstance(error, BadPosition))

    def _agree(self, agreed: pb.Agreed) -> None:
        if self._limits.codec not in ("", agreed.codec):
            raise BadFrame(f"codec {agreed.codec[:32]!r}: this model is served with {self._limits.codec}")
        self._coder = HiddenCoder(codec_for_hidden_states(agreed.codec), agreed.seed, self._hidden_size)

    def _batch(self, message: pb.Batch, coder: HiddenCoder) -> HiddenBatch:
        limits = self._limits
        if message.id <= self._last:
            raise BadFrame(f"batch {message.id} after batch {self._last}")
        self._last = message.id
        if len(message.rows) > limits.sequences:
            raise BadFrame(f"{len(message.rows)} rows for {limits.sequences} sequences")
        rows = rows_of(message)
        tokens = sum(row.count for row in rows)
        if tokens > limits.batch:
            raise BadFrame(f"a batch of {tokens} tokens; {limits.batch} can be")
        self._check_sequences([row.sequence for row in rows])
        if len({row.sequence for row in rows}) < len(rows):
            raise BadFrame("a batch has a sequence twice")
        for row in rows:
            if row.adapter > limits.adapters:
                raise BadFrame(f"adapter {row.adapter} of {limits.adapters}")
            if not row.count or row.position + row.count > limits.context:
                raise BadFrame(f"tokens {row.position} to {row.position + row.count}: not in {limits.context}")
        return HiddenBatch(message.id, tuple(rows), coder.decode(message.hidden, tokens))

    def _forget(self, message: pb.Forget) -> Forget:
        if len(message.sequences) > self._limits.sequences:
            raise BadFrame(f"{len(message.sequences)} sequences to forget, of {self._limits.sequences}")
        self._check_sequences(message.sequences)
        return Forget(tuple(message.sequences))

    def _check_sequences(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number >= self._limits.sequences:
                raise BadFrame(f"sequence {number} of {self._limits.sequences}")


def rows_to_proto(rows: Sequence[Row]) -> list[pb.Row]:
    return [pb.Row(**vars(row)) for row in rows]


def rows_of(message: pb.Batch) -> list[Row]:
    """The rows of a batch. Raises BadFrame for none, or for more tokens than a batch may have."""
    rows = [Row(row.sequence, row.position, row.count, row.adapter, row.long) for row in message.rows]
    tokens = sum(row.count for row in rows)
    if not 0 < tokens <= MAX_TOKENS:
        raise BadFrame(f"a batch of {tokens} tokens; 1 to {MAX_TOKENS} can be")
    return rows


def codec_for_hidden_states(name: str) -> str:
    """The canonical name of a codec for a chain's hidden states.

    Raises CodecError for an unknown codec, and BadFrame for one with a memory.
    """
    codec = parse(name)
    if codec.memory is not None:
        raise BadFrame(f"{name}: hidden states of a chain are not remembered; choose a codec without ef and delta")
    return codec.name
