"""A device that sends what was not agreed is refused with one line, and the job of the others goes on."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import torch

from isthmus.client.identity import Identity
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.protos.v1.stage_pb2_grpc import StageStub
from isthmus.split.codecs import FAMILIES, CodecState, parse
from isthmus.split.codecs.wire import encode_tensor
from isthmus.split.errors import BadTensor
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.coding import Coder, Plan, Terms
from isthmus.split.link.profile import MAX_PROBE_BYTES
from isthmus.split.models.source import ModelFolder
from isthmus.split.plan.parts import parts_of
from isthmus.split.resources.ledger import Ledger
from isthmus.split.tls import channel
from tests.cluster.house import LIMIT, TINY, House, events_of, refusal, succeeded

pytestmark = pytest.mark.cluster

HIDDEN = 32
_HEARTBEAT = 2.0  # seconds
CONFIG = TINY.but(steps=300, aggregate_every=1, checkpoint_every=100)


@dataclass
class RawDevice:
    """A device made of nothing but its certificate and a gRPC client: it can say whatever it likes."""

    identity: Identity
    outbox: queue.SimpleQueue[pb.DeviceMessage | None] = field(default_factory=queue.SimpleQueue)

    @contextmanager
    def session(self) -> Iterator[Iterator[pb.CoordinatorMessage]]:
        """What the coordinator tells it once it has sent its profile."""
        profile = pb.Profile(datasets=[pb.Dataset(name="notes", bytes=1)], task_kinds=["splitlora"])
        self.outbox.put(pb.DeviceMessage(profile=profile))
        with channel(self.identity.address, self.identity.credentials) as control:
            call = CoordinatorStub(control).Session(self._messages(), timeout=LIMIT)
            assert next(call).WhichOneof("kind") == "welcome"
            yield call
            self.outbox.put(None)
            call.cancel()

    def _messages(self) -> Iterator[pb.DeviceMessage]:
        """With heartbeats in between: however slow the machine is, the coordinator does not give this device up."""
        while True:
            try:
                message = self.outbox.get(timeout=_HEARTBEAT)
            except queue.Empty:
                message = pb.DeviceMessage(heartbeat=pb.Heartbeat())
            if message is None:
                return
            yield message

    def digest(self, job: str) -> str:
        from isthmus.split.models.manifest import Manifest, holder_digest

        with channel(self.identity.address, self.identity.credentials) as control:
            manifest = Manifest.from_proto(
                CoordinatorStub(control).GetManifest(pb.ManifestRequest(job=job), timeout=LIMIT)
            )
        return holder_digest(manifest, manifest.tensors)


@dataclass
class Stream:
    """One stream of Stage.Exchange."""

    call: Any
    outbox: queue.SimpleQueue[stage_pb2.Frame | None]

    def send(self, frame: stage_pb2.Frame) -> None:
        self.outbox.put(frame)

    def receive(self) -> stage_pb2.Frame:
        return next(self.call)


@contextmanager
def exchange(stage: grpc.Channel) -> Iterator[Stream]:
    outbox: queue.SimpleQueue[stage_pb2.Frame | None] = queue.SimpleQueue()
    call = StageStub(stage).Exchange(iter(outbox.get, None), timeout=LIMIT)
    yield Stream(call, outbox)
    outbox.put(None)
    call.cancel()


def tensor(*shape: int, fill: float = 0.5) -> stage_pb2.Tensor:
    return encode_tensor(torch.full(shape, fill))


def frame(job: str, **changes: Any) -> stage_pb2.Frame:
    """The FORWARD that is due, but for the changes."""
    right: Mapping[str, Any] = {
        "job": job,
        "session": "raw",
        "phase": stage_pb2.FORWARD,
        "tensor": tensor(CONFIG.batch_size, CONFIG.text.sequence_length, HIDDEN),
    }
    return stage_pb2.Frame(**{**right, **changes})


def lying_shape(*shape: int) -> stage_pb2.Tensor:
    """A few bytes that say they are a tensor of this shape."""
    return stage_pb2.Tensor(codec="none", dtype="float32", shape=shape, payload=b"\0" * 16)


def by_codec(name: str, tensor: stage_pb2.Tensor) -> stage_pb2.Tensor:
    """The same shape, by a codec."""
    codec = parse(name)
    payload = codec.encode(torch.full(tuple(tensor.shape), 0.5), CodecState(0))
    return stage_pb2.Tensor(codec=codec.name, dtype="float32", shape=tensor.shape, payload=payload)


def probe(job: str, filling: bytes, answer_bytes: int) -> stage_pb2.Frame:
    contents = stage_pb2.Probe(filling=filling, answer_bytes=answer_bytes)
    return frame(job, phase=stage_pb2.PROBE, tensor=None, probe=contents)


def bad_frames(job: str, step: int) -> dict[str, tuple[stage_pb2.Frame, str]]:
    """By what is wrong with it: a frame in place of FORWARD of `step`, and a part of the line that answers it."""
    rows, length = CONFIG.batch_size, CONFIG.text.sequence_length
    whole = tensor(rows, length, HIDDEN)
    short, long = stage_pb2.Tensor(), stage_pb2.Tensor()
    short.CopyFrom(whole)
    short.payload = whole.payload[:-4]
    long.CopyFrom(whole)
    long.payload = whole.payload + b"\0\0\0\0"
    norms = {"tokens": 1.0, "nll": 1.0, "norm_squared": 1.0}
    here = {"step": step}
    return {
        "another job": (frame("other", **here), "a frame for job 'other'"),
        "another session": (frame(job, session="else", **here), "another session"),
        "a later step": (frame(job, step=step + 1), f"due from d2 is FORWARD of step {step}"),
        "a step behind the end": (frame(job, step=CONFIG.steps + 1), f"of a job of {CONFIG.steps}"),
        "another phase": (
            frame(job, phase=stage_pb2.STEP, values=norms, tensor=None, **here),
            "due from d2 is FORWARD",
        ),
        "a phase that nobody knows": (frame(job, phase=77, **here), "phase 77 is not one that a device sends"),
        "opened twice": (frame(job, phase=stage_pb2.OPEN, tensor=None, **here), "another session"),
        "a micro-batch": (frame(job, micro_batch=1, **here), "micro_batch 1"),
        "no tensor": (frame(job, tensor=None, **here), "FORWARD without its tensor"),
        "another shape": (
            frame(job, tensor=tensor(rows, length + 1, HIDDEN), **here),
            "shape (2, 17, 32) was not agreed",
        ),
        "fewer dimensions": (frame(job, tensor=tensor(rows, length * HIDDEN), **here), "2 dimensions; 3 were"),
        "another dtype": (
            frame(job, tensor=encode_tensor(torch.zeros(rows, length, HIDDEN).half()), **here),
            "'float16'",
        ),
        "another codec": (frame(job, tensor=stage_pb2.Tensor(codec="zip", dtype="float32"), **here), "codec 'zip'"),
        "a short payload": (frame(job, tensor=short, **here), "bytes of payload"),
        "a long payload": (frame(job, tensor=long, **here), "bytes of payload"),
        "a huge shape": (frame(job, tensor=lying_shape(2**31, 2**31, 2**31), **here), "was not agreed"),
        "a huge evaluation": (
            frame(job, phase=stage_pb2.EVALUATE, tensor=lying_shape(2**31, length, HIDDEN), **here),
            "values are more than",
        ),
        "an empty evaluation": (
            frame(job, phase=stage_pb2.EVALUATE, tensor=lying_shape(0, length, HIDDEN), **here),
            "was not agreed",
        ),
        "a codec that was not agreed": (
            frame(job, tensor=by_codec("int8", whole), **here),
            "codec 'int8' was not agreed",
        ),
        "a huge payload": (
            frame(
                job,
                tensor=stage_pb2.Tensor(dtype="float32", shape=whole.shape, codec="none", payload=bytes(2**23)),
                **here,
            ),
            "8388608 bytes of payload",
        ),
        "a PROBE that is too large": (probe(job, bytes(MAX_PROBE_BYTES + 1), 0), "a PROBE of more than"),
        "a PROBE that asks for too much": (probe(job, b"", 2**32 - 1), "a PROBE of more than"),
        "a PROBE without its contents": (
            frame(job, phase=stage_pb2.PROBE, tensor=None, **here),
            "PROBE without its contents",
        ),
        "a PROBE with a tensor": (frame(job, phase=stage_pb2.PROBE, probe=stage_pb2.Probe()), "PROBE with a tensor"),
        "positions of another batch": (frame(job, wanted=b"\0", **here), "1 bytes of flags"),
        "NaN": (frame(job, tensor=tensor(rows, length, HIDDEN, fill=float("nan")), **here), "NaN or infinity"),
        "infinity": (frame(job, tensor=tensor(rows, length, HIDDEN, fill=float("inf")), **here), "NaN or infinity"),
        "labels that nobody agreed on": (
            frame(job, labels=encode_tensor(torch.zeros(rows, length, dtype=torch.int64)), **here),
            "FORWARD with labels",
        ),
        "too many values": (frame(job, values={str(i): 1.0 for i in range(257)}, **here), "more than 64 values"),
        "a value that is no number": (
            frame(job, values={"tokens": float("nan")}, **here),
            "a value that is not finite",
        ),
        "half of an evaluation": (
            frame(job, phase=stage_pb2.REPORT, tensor=None, values={"evaluation_tokens": 3.0}, **here),
            "go together",
        ),
    }


def test_a_bad_frame_ends_its_senders_stream_and_nothing_else(house: House) -> None:
    house.cluster.kill("d2", 15)
    raw = RawDevice(house.identity("d2"))
    with raw.session() as told, house.connect() as connection:
        job = house.submit(connection, CONFIG, ["d0", "d1", "d2"])
        task = next(message.task for message in told if message.WhichOneof("kind") == "task")
        good_open = frame(job, phase=stage_pb2.OPEN, tensor=None, open=agreeable_open(house, CONFIG, raw.digest(job)))
        address = f"127.0.0.1{task.stage_address}"
        with channel(address, raw.identity.credentials) as stage:
            for wrong, line in bad_openings(good_open).items():
                with exchange(stage) as stream:
                    stream.send(wrong_opening(good_open, wrong))
                    refused(stream, wrong, line)
            with exchange(stage) as stream:
                stream.send(frame(job))
                refused(stream, "no OPEN at first", "the first frame has to be OPEN")

            with exchange(stage) as stream:
                for size in (0, 1, MAX_PROBE_BYTES):  # as large as may be, before OPEN and after it
                    stream.send(probe(job, bytes(size), size))
                    assert len(stream.receive().probe.filling) == size
                stream.send(probe(job, b"", MAX_PROBE_BYTES + 1))
                refused(stream, "a PROBE before OPEN", "a PROBE of more than")

            for wrong in bad_frames(job, 0):
                with exchange(stage) as stream:
                    stream.send(good_open)
                    step = stream.receive().agreement.start_step
                    bad, line = bad_frames(job, step)[wrong]
                    stream.send(bad)
                    refused(stream, wrong, line)
        report = succeeded(connection, job)
        left = [event.left for event in events_of(connection, job, "left") if event.device == "d2"]
        together = [event.step for event in events_of(connection, job, "step") if event.step.devices == ["d0", "d1"]]
    assert len(left) == len(bad_frames(job, 0))  # it was let in again each time, and not one step more
    assert len(together) == len(report["losses"]) == CONFIG.steps
    assert report["perplexity_after"] < report["perplexity_before"]


CODECS = [
    "hadamard,int4",
    "klt,uniform:step=0.2:per=tensor,range",
    "hadamard,uniform:step=0.35:per=tensor:stochastic,zstd",
    "delta,fp8",
    "topk:0.1",
]


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_codec_of_the_plan_cannot_have_made_is_refused(house: House, codec: str) -> None:
    """In hidden states and in gradients, of a micro-batch; a frame that is right goes through before and after."""
    config = CONFIG.but(codec=f"hidden={codec};gradients={codec}", micro_batches=2)
    name, shape = parse(codec).name, (1, CONFIG.text.sequence_length, HIDDEN)
    house.cluster.kill("d2", 15)
    raw = RawDevice(house.identity("d2"))
    with raw.session() as told, house.connect() as connection:
        job = house.submit(connection, config, ["d2"])
        task = next(message.task for message in told if message.WhichOneof("kind") == "task")
        opened = agreeable_open(house, config, raw.digest(job), sorted(FAMILIES))
        with channel(f"127.0.0.1{task.stage_address}", raw.identity.credentials) as stage:
            few = set(parse(codec).families) | {"none"}
            with exchange(stage) as stream:
                lacking = agreeable_open(
                    house, config, raw.digest(job), sorted(few - {codec.split(",")[-1].split(":")[0]})
                )
                stream.send(frame(job, phase=stage_pb2.OPEN, tensor=None, open=lacking))
                refused(stream, "a family that it lacks", "the device lacks codecs of this job")
            for phase, stream_name in ((stage_pb2.FORWARD, "hidden_up"), (stage_pb2.BACKWARD, "gradients_up")):
                for wrong, (bad, line) in bad_payloads(name, shape).items():
                    with exchange(stage) as stream:
                        stream.send(frame(job, phase=stage_pb2.OPEN, tensor=None, open=opened))
                        answer = stream.receive()
                        plan = Plan.from_proto(answer.plan, config.batch_size)
                        assert plan.codec_of(stream_name) == name
                        coder = Coder(Terms(config, opened.samples), Ledger())
                        coder.use(plan)
                        values = {"tokens": 4.0} if phase == stage_pb2.BACKWARD else {}
                        step = answer.agreement.start_step
                        if phase == stage_pb2.BACKWARD:
                            right = coder.encode("hidden_up", torch.randn(shape), step, 0)
                            stream.send(frame(job, tensor=right, step=step))
                            assert stream.receive().tensor.codec == name
                        stream.send(frame(job, phase=phase, tensor=bad, step=step, values=values))
                        refused(stream, f"{wrong} in {stream_name}", line)
        connection.stub.CancelJob(pb.JobRequest(id=job))


def bad_payloads(name: str, shape: tuple[int, ...]) -> dict[str, tuple[stage_pb2.Tensor, str]]:
    """By what is wrong with it: a tensor, and a part of the line that answers it."""
    codec = parse(name)
    good = codec.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)), CodecState(0))
    most = codec.wire_bytes(shape)
    payloads = {
        "garbage": (b"\xff" * (len(good) // 2), ""),
        "nothing": (b"", ""),
        "the end missing": (good[:-1], ""),
        "more than there can be": (bytes(most + 1), f"{most + 1} bytes of payload"),
    }
    tensors = {}
    for wrong, (payload, line) in payloads.items():
        with pytest.raises(BadTensor):
            codec.decode(payload, shape, CodecState(0))
        tensors[wrong] = stage_pb2.Tensor(codec=name, dtype="float32", shape=shape, payload=payload), line
    plain = encode_tensor(torch.zeros(shape))
    tensors["no codec"] = plain, f"codec 'none' was not agreed on; agreed: {name}"
    whole = stage_pb2.Tensor(codec=name, dtype="float32", shape=(2, *shape[1:]), payload=good)
    tensors["the shape of the whole batch"] = whole, f"shape {(2, *shape[1:])} was not agreed on; agreed: {shape}"
    return tensors


def refused(stream: Stream, wrong: str, line: str) -> None:
    error = refusal(stream.receive)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, f"{wrong}: {error}"
    assert line in error.details(), f"{wrong}: {error.details()}"
    assert "\n" not in error.details()


def agreeable_open(
    house: House, config: TrainingConfig, digest: str, families: Sequence[str] = ("none",)
) -> stage_pb2.Open:
    adapter = parts_of(ModelFolder(house.model).config, config).adapter
    values = sum(value.numel() for value in adapter.values())
    return stage_pb2.Open(codecs=families, samples=3, stage_digest=digest, adapter_values=values)


def bad_openings(good: stage_pb2.Frame) -> dict[str, str]:
    """What is wrong with an OPEN, and a part of the line that answers it."""
    return {
        "codecs": "the device lacks codecs of this job: none",
        "samples": "at least one is needed",
        "stage_digest": "differ from the coordinator's",
        "adapter_values": f"this job's devices have {good.open.adapter_values}",
        "session": "is not a session's id",
        "job": "a frame for job ''",
        "open": "OPEN without its contents",
    }


def wrong_opening(good: stage_pb2.Frame, field_name: str) -> stage_pb2.Frame:
    """The OPEN without the field, or without its contents."""
    wrong = stage_pb2.Frame()
    wrong.CopyFrom(good)
    if field_name in stage_pb2.Open.DESCRIPTOR.fields_by_name:
        wrong.open.ClearField(field_name)
    else:
        wrong.ClearField(field_name)
    return wrong
