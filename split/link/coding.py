"""How the tensors of one session cross: the plan that its stage has made, and each end's codecs with their memory.

Both ends switch to a new plan at the same frame: the stage's answer to OPEN or AGGREGATE, when nothing else of this
device is under way. A codec that stays keeps its state, on both ends.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import AnyCodec, CodecState, for_matrices, parse
from isthmus.split.codecs.wire import AS_IT_IS, Expected, decode_tensor, encode_tensor
from isthmus.split.data.sequences import batch_indices, micro_batch_slices
from isthmus.split.errors import BadFrame
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import ADAPTERS, STREAMS
from isthmus.split.resources.ledger import Ledger


@dataclass(frozen=True)
class Terms:
    """What both ends of a session know before its first plan, and code by.

    samples: training sequences of the device, from which follows which are in a batch. adapter: the shapes of the
    matrices that make up the device's adapter. widest: the most values a row that cross for a site (DLoRA).
    """

    config: TrainingConfig
    samples: int
    adapter: tuple[tuple[int, ...], ...] = ()
    widest: int = 0


@dataclass(frozen=True)
class Plan:
    """How things cross from a frame on. codecs: by stream, canonical names; other streams cross as they are.

    micro_batches: that a step's batch is cut into; depth: that a device may have under way, from 1 to micro_batches.
    """

    micro_batches: int = 1
    depth: int = 1
    codecs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        codecs = ", ".join(f"{stream} by {name}" for stream, name in sorted(self.codecs.items()))
        return f"{self.micro_batches} micro-batches a step, {self.depth} under way; {codecs or 'all as float32'}"

    def codec_of(self, stream: str) -> str:
        return self.codecs.get(stream, "none")

    def to_proto(self) -> stage_pb2.Plan:
        return stage_pb2.Plan(
            micro_batches=self.micro_batches, depth=self.depth, codecs=dict(self.codecs), seed=self.seed
        )

    @classmethod
    def from_proto(cls, message: stage_pb2.Plan, batch_size: int) -> Plan:
        """Raises BadFrame or CodecError for what this side cannot follow."""
        if not 1 <= message.depth <= message.micro_batches <= batch_size:
            raise BadFrame(f"a plan of {message.micro_batches} micro-batches, {message.depth} under way")
        unknown = sorted(set(message.codecs) - set(STREAMS))
        if unknown:
            raise BadFrame(f"a plan for a stream that there is not: {unknown[0][:32]!r}")
        codecs = {stream: parse(name).name for stream, name in sorted(message.codecs.items())}
        return cls(message.micro_batches, message.depth, codecs, message.seed)


def stream_seed(seed: int, stream: str) -> int:
    """Of what a stream's codec draws: the same on both ends."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:6], "big")


class Coder:
    """One end of one session."""

    def __init__(self, terms: Terms, ledger: Ledger) -> None:
        self.plan = Plan()
        self._terms, self._ledger = terms, ledger
        self._codecs: dict[tuple[str, int], tuple[AnyCodec, CodecState]] = {}  # by stream and site
        self._memory: dict[tuple[str, int], int] = {}  # bytes that each one's codec remembers

    def use(self, plan: Plan) -> None:
        """From the next frame on."""
        for stream in STREAMS:
            name = plan.codec_of(stream)
            known = self._codecs.get((stream, 0))
            if known is None or known[0].name != name or plan.seed != self.plan.seed:
                self._codecs = {key: codec for key, codec in self._codecs.items() if key[0] != stream}
                self._codecs[stream, 0] = self._codec(stream, name), CodecState(stream_seed(plan.seed, stream))
        self.plan = plan

    def reshape(self, adapter: tuple[tuple[int, ...], ...]) -> None:
        """The device's cut has moved and its adapter has matrices of these shapes from now on: what codecs remember is
        of other tensors, so they begin anew, on both ends."""
        self._terms = replace(self._terms, adapter=adapter)
        for stream in STREAMS:
            if (stream, 0) in self._codecs:
                name = self.plan.codec_of(stream)
                self._codecs[stream, 0] = self._codec(stream, name), CodecState(stream_seed(self.plan.seed, stream))

    def adapters_differ(self, stream: str) -> bool:
        """Whether an adapter crosses as its difference from the last average: where its codec is not exact."""
        assert stream in ADAPTERS
        return not parse(self.plan.codec_of(stream)).exact

    @property
    def batch_size(self) -> int:
        return self._terms.config.batch_size

    def expected_at_site(self, stream: str, rows: int) -> Expected:
        """What comes for a site: (rows, width), as many rows as are of use of `rows` sequences."""
        most = rows * self._terms.config.text.sequence_length * self._terms.widest
        return self.expected(stream, (None, None), most)

    def rows(self, micro_batch: int) -> int:
        """Sequences in a micro-batch of a step."""
        part = micro_batch_slices(self._terms.config.batch_size, self.plan.micro_batches)[micro_batch]
        return int(part.stop - part.start)

    def encode(
        self, stream: str, tensor: Tensor, step: int = 0, micro_batch: int = 0, site: int = 0
    ) -> stage_pb2.Tensor:
        """site: of the modules whose tensor this is, (rows, width); each has a state of its own; 0: of none.

        Raises CodecError for NaN and infinity, where the codec is not exact."""
        name = self.plan.codec_of(stream)
        if name == "none":
            return encode_tensor(tensor)
        codec, state = self._at(stream, site)
        started, own = time.perf_counter(), time.thread_time()
        payload = codec.encode(tensor, state, None if site else self._keys(stream, step, micro_batch))
        self._note("encode", (stream, site), name, tensor.numel(), self._took(started, own), state)
        return stage_pb2.Tensor(codec=name, dtype="float32", shape=list(tensor.shape), payload=payload)

    def expected(self, stream: str, shape: tuple[int | None, ...], at_most: int) -> Expected:
        known = self._codecs.get((stream, 0))
        return Expected("float32", shape, at_most, known[0] if known else AS_IT_IS)

    def decode(
        self,
        stream: str,
        message: stage_pb2.Tensor,
        expected: Expected,
        step: int = 0,
        micro_batch: int = 0,
        site: int = 0,
    ) -> Tensor:
        """float32 on the CPU. Raises BadTensor or CodecError when it is not what was agreed."""
        name = expected.codec.name
        if name == "none":
            return decode_tensor(message, expected)
        _, state = self._at(stream, site)
        started, own = time.perf_counter(), time.thread_time()
        decoded = decode_tensor(message, expected, state, None if site else self._keys(stream, step, micro_batch))
        self._note("decode", (stream, site), name, decoded.numel(), self._took(started, own), state)
        return decoded

    def state_of(self, stream: str) -> CodecState | None:
        """What this end remembers of a stream; None before the first plan."""
        known = self._codecs.get((stream, 0))
        return None if known is None else known[1]

    def _at(self, stream: str, site: int) -> tuple[AnyCodec, CodecState]:
        known = self._codecs.get((stream, site))
        if known is None:
            state = CodecState(stream_seed(self.plan.seed, f"{stream}/{site}"))
            known = self._codecs[stream, site] = self._codecs[stream, 0][0], state
        return known

    def _note(
        self, what: str, place: tuple[str, int], name: str, values: int, seconds: float, state: CodecState
    ) -> None:
        # Each stream is coded by one thread at a time, so only its own state may be looked at.
        self._memory[place] = state.memory_bytes
        self._ledger.coded(name, what, values, seconds, sum(list(self._memory.values())))

    def _took(self, started: float, own: float) -> float:
        """Seconds since then; waits where the ledger emulates a slower machine."""
        return self._ledger.slowed(time.perf_counter() - started, time.thread_time() - own)

    def _codec(self, stream: str, name: str) -> AnyCodec:
        return for_matrices(parse(name), self._terms.adapter) if stream in ADAPTERS else parse(name)

    def _keys(self, stream: str, step: int, micro_batch: int) -> Sequence[int] | None:
        if stream in ADAPTERS or parse(self.plan.codec_of(stream)).memory is None:
            return None
        config = self._terms.config
        indices = batch_indices(self._terms.samples, config.batch_size, step, config.seed)
        return indices[micro_batch_slices(config.batch_size, self.plan.micro_batches)[micro_batch]]
