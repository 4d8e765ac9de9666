"""Both ends of a session are equally strict, and what moves the messages makes no difference."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.protos.v1 import stage_pb2, stage_pb2_grpc
from isthmus.split.codecs import parse
from isthmus.split.codecs.wire import encode_tensor
from isthmus.split.errors import BadFrame, BadRequest, BadTensor
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import choices
from isthmus.split.link.coding import Plan, Terms
from isthmus.split.link.device import GrpcLink, LocalLink
from isthmus.split.link.frames import HELD, UNDER_WAY, Frame, Phase
from isthmus.split.link.profile import LinkProfile
from isthmus.split.link.session import SessionEnd
from isthmus.split.link.stage import Host
from isthmus.split.link.transport import MemoryTransport
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.host import JobHost
from tests.split.jobs import device_trainer, job_host, random_text
from tests.split.tiny_models import VOCABULARY, make_model

HIDDEN, VALUES = 4, 6
CONFIG = TrainingConfig.of(steps=5, batch_size=2, sequence_length=3, codec="none")
TERMS = Terms(CONFIG, 20, ((VALUES,),), HIDDEN, 50)
PLAN = Plan(2, 2, choices("none"))


def session(terms: Terms = TERMS) -> SessionEnd:
    """A device's end, after a plan of two micro-batches."""
    made = SessionEnd("job", "s", terms, Ledger(), Ledger().traffic, device=True)
    made.coder.use(PLAN)
    return made


def asked(terms: Terms = TERMS) -> SessionEnd:
    """One that has sent the first micro-batch of step 1."""
    made, labels = session(terms), terms.config.devices.labels == "server"
    frame = Frame(Phase.FORWARD, 1, tensor=torch.zeros(1, 3, HIDDEN))
    if labels:
        frame = replace(frame, labels=torch.zeros(1, 3, dtype=torch.int64), values={"tokens": 2.0})
    made.encode(frame)
    return made


def answer(phase: stage_pb2.Phase = Phase.FORWARD, **changes: Any) -> stage_pb2.Frame:
    right = {"job": "job", "session": "s", "phase": phase, "step": 1, "tensor": encode_tensor(torch.ones(1, 3, HIDDEN))}
    return stage_pb2.Frame(**{**right, **changes})


def test_an_answer_that_was_agreed_comes_through_once() -> None:
    device = asked()
    frame = device.decode(answer(values={HELD: 0.5}))
    assert frame.tensor is not None
    assert torch.equal(frame.tensor, torch.ones(1, 3, HIDDEN))
    assert frame.values[UNDER_WAY] > 0
    with pytest.raises(BadFrame, match="answers nothing"):
        device.decode(answer())


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "another job": ({"job": "other"}, "a frame for job 'other'"),
    "another session": ({"session": "t"}, "a frame of another session"),
    "another step": ({"step": 2}, "FORWARD of step 2, micro-batch 0 is out of turn: that of step 1"),
    "a later micro-batch": ({"micro_batch": 1}, "micro-batch 1 is out of turn: that of step 1, micro-batch 0 was due"),
    "a micro-batch that there is not": ({"micro_batch": 2}, "micro_batch 2"),
    "another phase": ({"phase": Phase.EVALUATE}, "EVALUATE of step 1, micro-batch 0 answers nothing"),
    "a phase that a device sends": ({"phase": Phase.STEP}, "STEP is not one that a coordinator sends"),
    "a phase that nobody knows": ({"phase": 77}, "phase 77"),
    "no tensor": ({"tensor": None}, "FORWARD without its tensor"),
    "another shape": ({"tensor": encode_tensor(torch.ones(2, 3, HIDDEN))}, r"shape \(2, 3, 4\) was not agreed"),
    "a shape that is too large": (
        {"tensor": stage_pb2.Tensor(codec="none", dtype="float32", shape=[2**31] * 3)}, "was not agreed on",
    ),
    "another dtype": ({"tensor": encode_tensor(torch.ones(1, 3, HIDDEN).half())}, "dtype 'float16'"),
    "another codec": ({"tensor": stage_pb2.Tensor(codec="int8", dtype="float32")}, "codec 'int8'"),
    "NaN": ({"tensor": encode_tensor(torch.full((1, 3, HIDDEN), float("nan")))}, "NaN or infinity"),
    "infinity": ({"tensor": encode_tensor(torch.full((1, 3, HIDDEN), float("inf")))}, "NaN or infinity"),
    "a plan in the middle of a step": ({"plan": PLAN.to_proto()}, "FORWARD with a plan"),
    "an agreement": ({"agreement": stage_pb2.Agreement()}, "FORWARD with an agreement"),
    "a cut that moves": ({"shape": stage_pb2.Shape(cut=1)}, "FORWARD with a shape"),
    "labels": ({"labels": encode_tensor(torch.ones(1, 3, dtype=torch.int32))}, "FORWARD with labels"),
    "a site": ({"site": 1}, "FORWARD for site 1 is not one that a coordinator sends"),
    "a value that nobody knows": ({"values": {"x": 1.0}}, "FORWARD with a value 'x'"),
    "a value that is no number": ({"values": {HELD: float("nan")}}, "a value that is not finite"),
    "too many values": ({"values": {str(i): 1.0 for i in range(65)}}, "more than 64 values"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_an_answer_that_was_not_agreed_is_refused(what: str) -> None:
    changes, line = ODD[what]
    with pytest.raises((BadFrame, BadTensor), match=line) as refused:
        asked().decode(answer(**changes))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("missing", ["nll", "tokens", "norm_squared"])
def test_a_gradient_from_the_stage_has_its_numbers(missing: str) -> None:
    terms = replace(TERMS, config=CONFIG.but(labels="server"))
    values = {"nll": 1.0, "tokens": 2.0, "norm_squared": 3.0}
    assert asked(terms).decode(answer(values=values)).tensor is not None
    with pytest.raises(BadFrame, match=f"FORWARD without its value {missing}"):
        asked(terms).decode(answer(values={name: value for name, value in values.items() if name != missing}))
    with pytest.raises(BadFrame, match="more predicted tokens"):
        asked(terms).decode(answer(values={**values, "tokens": 7.0}))


def test_a_device_that_trains_nothing_gets_no_gradient() -> None:
    for adapter, tensor, line in (
        (((VALUES,),), None, "BACKWARD without its tensor"),
        ((), encode_tensor(torch.ones(1, 3, HIDDEN)), "BACKWARD with a tensor"),
    ):
        device = session(replace(TERMS, adapter=adapter))
        device.encode(Frame(Phase.BACKWARD, 1, tensor=torch.zeros(1, 3, HIDDEN), values={"tokens": 2.0}))
        with pytest.raises(BadFrame, match=line):
            device.decode(answer(Phase.BACKWARD, tensor=tensor, values={"norm_squared": 0.0}))


def test_a_plan_that_the_job_has_not_agreed_on_is_refused() -> None:
    device = session()
    device.encode(Frame(Phase.OPEN, open=stage_pb2.Open(adapter_values=VALUES)))
    plan = replace(PLAN, codecs={**choices("none"), "hidden_up": parse("int8").name}).to_proto()
    with pytest.raises(BadTensor, match="which this job has not agreed on"):
        device.decode(answer(Phase.OPEN, tensor=None, agreement=stage_pb2.Agreement(), plan=plan))


@given(data=st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_that_parse_are_refused_by_a_device(data: bytes) -> None:
    message = stage_pb2.Frame()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return
    with pytest.raises((BadFrame, BadTensor)):  # nothing random says the job's name
        asked().decode(message)


# ---- in this process and over gRPC ----

SMALL = TrainingConfig.of(
    steps=4, batch_size=4, sequence_length=8, precision="float32", rank=2, aggregate_every=2, micro_batches=2,
    validation_fraction=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=3, hidden=16)


class Unmeasured(GrpcLink):
    """Sends no PROBE frames, as a link in memory does not."""

    def measure(self) -> LinkProfile:
        return LinkProfile()


class Served(stage_pb2_grpc.StageServicer):
    """A stage behind a gRPC server of this process: the stream's messages go to the stage's end as they come."""

    def __init__(self, host: Host, terms: Terms) -> None:
        self._host, self._terms = host, terms

    def Exchange(self, requests: Iterator[stage_pb2.Frame], context: grpc.ServicerContext) -> Iterator[stage_pb2.Frame]:
        stream = MemoryTransport(self._host, "a", "job", self._terms)
        context.add_callback(stream.close)
        yield from stream.exchange(_until_the_end(requests))


def _until_the_end(requests: Iterator[stage_pb2.Frame]) -> Iterator[stage_pb2.Frame]:
    with contextlib.suppress(grpc.RpcError):  # the device has hung up
        yield from requests


def ended(folder: Path, config: TrainingConfig, *, network: bool) -> tuple[JobHost, Ledger, dict[str, torch.Tensor]]:
    """A job of one device, at its end."""
    trainer = device_trainer(folder, config, random_text(0, 20, 8, VOCABULARY), random_text(90, 3, 8, VOCABULARY))
    finished = threading.Event()
    ends = ("finished", "failed")
    host = job_host(
        folder, config, ["a"], tell=lambda event: finished.set() if event.WhichOneof("kind") in ends else None
    )
    if not network:
        link = LocalLink(host, "a", trainer.terms, trainer.ledger, timeout=60)
        trainer.run(link, cancelled=threading.Event())
        link.close()
    else:
        server = grpc.server(futures.ThreadPoolExecutor(4))
        stage_pb2_grpc.add_StageServicer_to_server(Served(host, trainer.terms), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            dialled = Unmeasured(channel, "job", "a", trainer.terms, trainer.ledger)
            trainer.run(dialled, cancelled=threading.Event())
            dialled.close()
        server.stop(0).wait()
    assert finished.wait(30)
    host.close()
    return host, trainer.ledger, {name: value.detach() for name, value in trainer.parameters.items()}


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("codec", ["none", "delta,hadamard,int4"])
def test_a_job_in_memory_and_over_grpc_is_the_same_to_the_bit_and_to_the_byte(
    llama: Path, codec: str, labels: str
) -> None:
    config = SMALL.but(codec=codec, labels=labels)
    (near, here, adapter), (far, there, theirs) = (ended(llama, config, network=network) for network in (False, True))
    assert near.outcome().losses == far.outcome().losses
    assert near.outcome().perplexities == far.outcome().perplexities
    assert all(torch.equal(adapter[name], theirs[name]) for name in adapter)
    assert here.traffic.messages == there.traffic.messages
    assert here.traffic.payload_bytes == there.traffic.payload_bytes
    for ledger in (here, there):
        assert ledger.wait_seconds > 0
        assert ledger.wait_seconds >= ledger.link_seconds > 0


def test_what_the_stage_refuses_is_the_same_error_in_memory(llama: Path) -> None:
    config = SMALL.but(codec="none")
    trainer = device_trainer(llama, config, random_text(0, 20, 8, VOCABULARY))
    host = job_host(llama, config, ["a"])
    link = LocalLink(host, "a", trainer.terms, trainer.ledger, timeout=60)
    link.send(Frame(Phase.FORWARD, tensor=torch.zeros(2, 8, 16)))
    with pytest.raises(BadRequest, match="the first frame has to be OPEN"):
        link.receive()
    host.close()
