"""Coding of a session's tensors: the plan that the stage has made, and each end's codecs with their memory.

Both ends switch to a new plan at the same frame: the stage's answer to OPEN or AGGREGATE, when nothing else of this
device is under way. A codec that the new plan keeps also keeps its state, on both ends.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from isthmus.protos.v1 import codec_pb2, stage_pb2
from isthmus.split.codecs import AnyCodec, CodecState, for_matrices, parse
from isthmus.split.codecs.finite import DIVERGED, is_finite
from isthmus.split.codecs.wire import AS_IT_IS, Expected, decode_tensor, encode_tensor
from isthmus.split.data.sequences import batch_indices, micro_batch_slices
from isthmus.split.errors import BadFrame, BadTensor, CodecError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import ADAPTERS, STREAMS
from isthmus.split.lora.sites import Layout
from isthmus.split.resources.ledger import Ledger

_NOT_FINITE = f"a tensor with NaN or infinity: {DIVERGED}"


@dataclass(frozen=True)
class Terms:
    """What both ends of a session know before its first plan and need for coding.

    samples: training sequences of the device, which determine the ones in each batch.
    adapter: shapes of the matrices that make up the device's adapter.
    layout: where the device's modules are (DLoRA).
    """

    config: TrainingConfig
    samples: int
    adapter: tuple[tuple[int, ...], ...] = ()
    hidden_size: int = 0
    vocabulary_size: int = 0
    layout: Layout | None = None

    @property
    def adapter_values(self) -> int:
        return sum(math.prod(shape) for shape in self.adapter)


@dataclass(frozen=True)
class Plan:
    """How frames cross from one frame on: codecs, micro-batches, and how many of these are under way.

    micro_batches: number of parts that a step's batch is cut into.
    depth: most micro-batches that a device may have under way, from 1 to micro_batches.
    codecs: canonical names by stream; the tensors of all other streams are not encoded.
    seed: seed of all random numbers that the codecs draw.
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
        """Reads a plan; batch_size is the number of sequences in a step.

        Raises BadFrame or CodecError for a plan that this side cannot follow.
        """
        if not 1 <= message.depth <= message.micro_batches <= batch_size:
            raise BadFrame(f"a plan of {message.micro_batches} micro-batches, {message.depth} under way")
        unknown = sorted(set(message.codecs) - set(STREAMS))
        if unknown:
            raise BadFrame(f"a plan for a stream that there is not: {unknown[0][:32]!r}")
        codecs = {stream: parse(name).name for stream, name in sorted(message.codecs.items())}
        return cls(message.micro_batches, message.depth, codecs, message.seed)


def stream_seed(seed: int, stream: str) -> int:
    """Seed of the random numbers that a stream's codec draws, which is the same on both ends."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:6], "big")


class StreamCoder:
    """One end of one stream of tensors: a codec, and what it remembers.

    not_finite: the error's text for a tensor from the other end that has NaN or infinity.
    """

    def __init__(self, codec: AnyCodec, state: CodecState, not_finite: str = _NOT_FINITE) -> None:
        self.codec, self.state, self._not_finite = codec, state, not_finite

    def encode(self, tensor: Tensor, keys: Sequence[int] | None = None) -> stage_pb2.Tensor:
        """Encodes a tensor.

        keys: numbers of the samples in the tensor's first dimension, for codecs that remember samples.

        Raises CodecError for NaN and infinity, unless the codec is exact.
        """
        if self.codec.name == "none":
            return encode_tensor(tensor)
        payload = self.codec.encode(tensor, self.state, keys)
        return stage_pb2.Tensor(codec=self.codec.name, dtype="float32", shape=list(tensor.shape), payload=payload)

    def decode(self, message: stage_pb2.Tensor, expected: Expected, keys: Sequence[int] | None = None) -> Tensor:
        """Decodes a tensor to float32 on the CPU.

        Raises BadTensor or CodecError for one that is not what was agreed, NaN and infinity included: what comes from
        the other side goes into gradients and caches, and would stay there.
        """
        tensor = decode_tensor(message, expected, self.state, keys)
        if not is_finite(tensor):
            raise BadTensor(self._not_finite)
        return tensor


class Coder:
    """One end of one training session: a codec with its memory for each stream, and for each site of a stream."""

    def __init__(self, terms: Terms, ledger: Ledger) -> None:
        self.plan = Plan()
        self.terms, self._ledger = terms, ledger
        self._streams: dict[tuple[str, int], StreamCoder] = {}  # by stream and site
        self._memory: dict[tuple[str, int], int] = {}  # bytes that the codec of each one remembers

    def use(self, plan: Plan) -> None:
        """Follows a plan from the next frame on."""
        for stream in STREAMS:
            known = self._streams.get((stream, 0))
            if known is None or known.codec.name != plan.codec_of(stream) or plan.seed != self.plan.seed:
                self._streams = {key: coder for key, coder in self._streams.items() if key[0] != stream}
                self._streams[stream, 0] = self._begun(stream, plan)
        self.plan = plan

    def reshape(self, adapter: tuple[tuple[int, ...], ...]) -> None:
        """Makes all codecs begin anew because the device's cut has moved.

        What the codecs remember belongs to other tensors. Both ends call this at the same frame.

        adapter: shapes of the adapter's matrices from now on.
        """
        self.terms = replace(self.terms, adapter=adapter)
        for stream in STREAMS:
            if (stream, 0) in self._streams:
                self._streams[stream, 0] = self._begun(stream, self.plan)

    def adapters_differ(self, stream: str) -> bool:
        """Whether an adapter crosses as its difference from the last average, as it does unless its codec is exact."""
        assert stream in ADAPTERS
        return not parse(self.plan.codec_of(stream)).exact

    @property
    def batch_size(self) -> int:
        return self.terms.config.batch_size

    def rows(self, micro_batch: int) -> int:
        """Sequences in a micro-batch of a step."""
        part = micro_batch_slices(self.batch_size, self.plan.micro_batches)[micro_batch]
        return int(part.stop - part.start)

    def expected(self, stream: str, shape: tuple[int | None, ...], at_most: int) -> Expected:
        """What a tensor has to be.

        stream: the tensor's stream; empty for a tensor that is not encoded.
        shape: the agreed sizes; None where a size may be any.
        at_most: most values that the tensor may have.
        """
        known = self._streams.get((stream, 0))
        return Expected("float32", shape, at_most, known.codec if known else AS_IT_IS)

    def encode(
        self, stream: str, tensor: Tensor, step: int = 0, micro_batch: int = 0, site: int = 0
    ) -> stage_pb2.Tensor:
        """Encodes a tensor of a stream by the plan's codec.

        site: the site that a tensor of shape (rows, width) belongs to, or 0; each site has its own codec state.

        Raises CodecError for NaN and infinity, unless the codec is exact.
        """
        if self.plan.codec_of(stream) == "none":
            return encode_tensor(tensor)
        coder = self._at(stream, site)
        started, own = time.perf_counter(), time.thread_time()
        message = coder.encode(tensor, self._keys(stream, step, micro_batch, site))
        self._note("encode", (stream, site), tensor.numel(), self._took(started, own), coder)
        return message

    def decode(
        self,
        stream: str,
        message: stage_pb2.Tensor,
        expected: Expected,
        step: int = 0,
        micro_batch: int = 0,
        site: int = 0,
    ) -> Tensor:
        """Decodes a tensor of a stream to float32 on the CPU.

        Raises BadTensor or CodecError for one that is not what was agreed, or not finite.
        """
        if expected.codec.name == "none":
            return StreamCoder(expected.codec, CodecState(0)).decode(message, expected)
        coder = self._at(stream, site)
        started, own = time.perf_counter(), time.thread_time()
        decoded = coder.decode(message, expected, self._keys(stream, step, micro_batch, site))
        self._note("decode", (stream, site), decoded.numel(), self._took(started, own), coder)
        return decoded

    def state_of(self, stream: str) -> CodecState | None:
        """What this end remembers of a stream; None before the first plan."""
        known = self._streams.get((stream, 0))
        return None if known is None else known.state

    def to_proto(self) -> codec_pb2.SessionState:
        """What this end remembers between two steps, as a message that `restore` of another coder reads.

        The other coder needs the same terms.
        """
        streams = [
            codec_pb2.StreamState(stream=stream, site=site, state=coder.state.to_proto())
            for (stream, site), coder in self._streams.items()
        ]
        return codec_pb2.SessionState(plan=self.plan.to_proto(), streams=streams)

    def restore(self, message: codec_pb2.SessionState) -> None:
        """Takes over the plan and the codecs' states from a message that `to_proto` made.

        Raises BadFrame or CodecError for a message that a coder of these terms cannot have written.
        """
        self._streams.clear()
        self._memory.clear()
        self.use(Plan.from_proto(message.plan, self.batch_size))
        for one in message.streams:
            place = one.stream, one.site
            if one.stream not in STREAMS:
                raise BadFrame(f"a state of a stream that there is not: {one.stream[:32]!r}")
            if one.site:
                if self.terms.layout is None:
                    raise BadFrame(f"a state of site {one.site}, where there are none")
                self.terms.layout.site(one.site)
            coder = self._at(*place)
            state = coder.codec.read_state(one.state)
            if state.seed != coder.state.seed:
                raise CodecError(f"a state of {one.stream} of another session's seed")
            self._streams[place] = StreamCoder(coder.codec, state)
            self._memory[place] = state.memory_bytes

    def _at(self, stream: str, site: int) -> StreamCoder:
        known = self._streams.get((stream, site))
        if known is None:
            state = CodecState(stream_seed(self.plan.seed, f"{stream}/{site}"))
            known = self._streams[stream, site] = StreamCoder(self._streams[stream, 0].codec, state)
        return known

    def _begun(self, stream: str, plan: Plan) -> StreamCoder:
        codec = parse(plan.codec_of(stream))
        state = CodecState(stream_seed(plan.seed, stream))
        return StreamCoder(for_matrices(codec, self.terms.adapter) if stream in ADAPTERS else codec, state)

    def _note(self, what: str, place: tuple[str, int], values: int, seconds: float, coder: StreamCoder) -> None:
        # One thread at a time codes each stream, so this looks at no other stream's state.
        self._memory[place] = coder.state.memory_bytes
        self._ledger.coded(coder.codec.name, what, values, seconds, sum(list(self._memory.values())))

    def _took(self, started: float, own: float) -> float:
        """Seconds since the two readings of the clock; waits first if the ledger emulates a slower machine."""
        return self._ledger.slowed(time.perf_counter() - started, time.thread_time() - own)

    def _keys(self, stream: str, step: int, micro_batch: int, site: int) -> Sequence[int] | None:
        """Numbers of the samples in a tensor; None for sites, and for a codec that remembers no samples."""
        if site or stream in ADAPTERS or parse(self.plan.codec_of(stream)).memory is None:
            return None
        config = self.terms.config
        indices = batch_indices(self.terms.samples, config.batch_size, step, config.seed)
        return indices[micro_batch_slices(config.batch_size, self.plan.micro_batches)[micro_batch]]
