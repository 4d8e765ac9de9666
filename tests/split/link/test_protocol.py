"""What a device may send: any bytes are refused with BadFrame or BadTensor, or are a frame that fits the job."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import CodecState, parse
from isthmus.split.codecs.finite import LARGEST
from isthmus.split.codecs.packing import pack_bits
from isthmus.split.codecs.wire import DTYPES, Expected, check_tensor, decode_tensor, encode_tensor
from isthmus.split.data.sequences import micro_batch_slices
from isthmus.split.errors import BadFrame, BadTensor
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import TRAINING
from isthmus.split.link.checks import Envelope, check, decode
from isthmus.split.link.coding import Coder, Plan, Terms
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.profile import MAX_PROBE_BYTES
from isthmus.split.resources.ledger import Ledger

HIDDEN, VOCABULARY, ADAPTER = 4, 50, 6
CONFIG = TrainingConfig.of(steps=5, batch_size=2, sequence_length=3)
AT_DEVICE = Terms(CONFIG, 20, ((ADAPTER,),), HIDDEN, VOCABULARY)
AT_SERVER = replace(AT_DEVICE, config=TrainingConfig.of(steps=5, batch_size=2, sequence_length=3, labels="server"))

CODECS = [
    "none",
    "bfloat16",
    "shuffle,zstd",
    "hadamard,int8",
    "hadamard,uniform:step=0.13:per=tensor,zstd",
    "klt,uniform:step=0.13:per=tensor,range",
    "klt,uniform,zstd",
    "ef,topk:0.1",
    "delta,hadamard,int4",
]


def decoded(message: stage_pb2.Frame, terms: Terms = AT_DEVICE, plan: Plan | None = None, session: str = "s") -> Frame:
    """A message from a device, as the stage decodes it in a session (empty: in none yet)."""
    coder = Coder(terms, Ledger())
    if plan is not None:
        coder.use(plan)
    rule = check(message, Envelope("job", session, bool(session), upward=True), coder)
    return decode(message, rule, coder)


def plan_of(codec: str, micro_batches: int = 1) -> Plan:
    return Plan(micro_batches, micro_batches, dict.fromkeys(TRAINING, parse(codec).name))


# Numbers and words that are right about as often as they are wrong, so that every check is reached.
sizes = st.sampled_from([0, 1, 2, 3, 4, ADAPTER, 7, 2**31, 2**32 - 1])
numbers = st.floats() | st.sampled_from([0.0, 1.0, 3.0, -1.0, 1e308])
names = st.sampled_from(["tokens", "nll", "norm_squared", "evaluation_nll", "evaluation_tokens", "x"])
probes = st.builds(
    lambda filling, size: stage_pb2.Probe(filling=filling, answer_bytes=size),
    st.binary(max_size=10),
    st.sampled_from([0, 1, MAX_PROBE_BYTES, MAX_PROBE_BYTES + 1, 2**32 - 1]),
)


@st.composite
def tensors(draw: st.DrawFn) -> stage_pb2.Tensor:
    whole = [
        torch.zeros(2, 3, HIDDEN),
        torch.full((2, 3, HIDDEN), math.nan),
        torch.zeros(1, 3, HIDDEN),
        torch.zeros(ADAPTER),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(1, 3, dtype=torch.int32),
        torch.full((2, 3), VOCABULARY, dtype=torch.int32),
        torch.zeros(2, 3, dtype=torch.int64),
    ]
    if draw(st.booleans()):
        return encode_tensor(draw(st.sampled_from(whole)))
    return stage_pb2.Tensor(
        codec=draw(st.sampled_from(["none", "none", "", "pickle", *(parse(codec).name for codec in CODECS)])),
        dtype=draw(st.sampled_from([*DTYPES, "", "object"])),
        shape=draw(st.lists(sizes, max_size=5)),
        payload=draw(st.binary(max_size=200)),
    )


@st.composite
def frames(draw: st.DrawFn) -> stage_pb2.Frame:
    return stage_pb2.Frame(
        job=draw(st.sampled_from(["job", "job", "job", "", "other"])),
        session=draw(st.sampled_from(["s", "s", "s", "", "t" * 65])),
        step=draw(st.sampled_from([0, 1, 5, 6, 2**64 - 1])),
        micro_batch=draw(st.sampled_from([0, 0, 0, 1, 2, 2**32 - 1])),
        phase=draw(st.integers(0, 11)),
        tensor=draw(st.none() | tensors()),
        labels=draw(st.none() | tensors()),
        values=draw(st.dictionaries(names, numbers, max_size=5)),
        probe=draw(st.none() | probes),
        wanted=draw(st.sampled_from([b"", b"", b"\x3f", b"\x07", b"\0\0"])),
    )


@pytest.mark.parametrize("terms", [AT_DEVICE, AT_SERVER], ids=["labels at the device", "labels at the server"])
@given(
    message=frames(),
    session=st.sampled_from(["s", "s", "s", ""]),
    codec=st.sampled_from(["none", "none", *CODECS]),
    micro_batches=st.sampled_from([1, 2]),
)
def test_any_frame_is_refused_or_fits_the_job(
    terms: Terms, message: stage_pb2.Frame, session: str, codec: str, micro_batches: int
) -> None:
    try:
        frame = decoded(message, terms, plan_of(codec, micro_batches), session)
    except (BadFrame, BadTensor):
        return
    assert 0 <= frame.step <= CONFIG.steps
    assert all(abs(value) <= LARGEST for value in frame.values.values())
    rows = 2 // micro_batches
    shapes = {Phase.FORWARD: (rows, 3, HIDDEN), Phase.BACKWARD: (rows, 3, HIDDEN), Phase.AGGREGATE: (ADAPTER,)}
    if frame.phase in shapes:
        assert frame.tensor is not None
        assert frame.tensor.shape == shapes[frame.phase]
    if frame.phase not in (Phase.FORWARD, Phase.BACKWARD):
        assert frame.micro_batch == 0
    assert frame.micro_batch < micro_batches
    if frame.tensor is not None:
        assert frame.tensor.dtype == torch.float32
        assert 0 < frame.tensor.numel() <= 2 * 3 * HIDDEN
        assert torch.isfinite(frame.tensor).all()
    if frame.labels is not None:
        assert terms is AT_SERVER
        assert frame.tensor is not None
        assert frame.labels.dtype == torch.int64
        assert frame.labels.shape == frame.tensor.shape[:2]
        assert ((frame.labels == -100) | ((frame.labels >= 0) & (frame.labels < VOCABULARY))).all()
    if frame.wanted is not None:
        assert terms is AT_DEVICE
        assert frame.tensor is not None
        assert frame.wanted.shape == frame.tensor.shape[:2]
    assert (frame.probe is not None) == (frame.phase == Phase.PROBE)
    if frame.probe is not None:
        assert frame.probe.answer_bytes <= MAX_PROBE_BYTES


@given(data=st.binary(max_size=300))
def test_any_bytes_that_parse_are_refused_or_fit_the_job(data: bytes) -> None:
    message = stage_pb2.Frame()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return
    with pytest.raises((BadFrame, BadTensor)):  # nothing random says the job's name
        decoded(message)


@pytest.mark.parametrize(
    "shape", [(2**31, 2**31, 2**31), (2**32 - 1, 3, HIDDEN), (2, 3, 2**20), (0, 3, HIDDEN), (2,) * 100_000]
)
@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.EVALUATE, Phase.AGGREGATE])
def test_a_shape_that_was_not_agreed_on_is_refused_before_anything_is_allocated(
    shape: tuple[int, ...], phase: stage_pb2.Phase
) -> None:
    tensor = stage_pb2.Tensor(codec="none", dtype="float32", shape=shape, payload=b"\0" * 64)
    message = stage_pb2.Frame(job="job", session="s", phase=phase, tensor=tensor)
    with pytest.raises(BadTensor):  # what is imported or cached at the first time is not counted
        decoded(message)
    tracemalloc.start()
    try:
        with pytest.raises(BadTensor) as refused:
            decoded(message)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * len(shape) + 50_000  # the tuple of the shape and the message, whatever it says
    assert len(str(refused.value)) < 300


def test_a_payload_of_another_size_is_refused() -> None:
    payload = bytes(50 * 2**20)
    tensor = stage_pb2.Tensor(codec="none", dtype="float32", shape=(2, 3, HIDDEN), payload=payload)
    for refuse in (check_tensor, decode_tensor):
        with pytest.raises(BadTensor, match="52428800 bytes of payload; shape"):
            refuse(tensor, Expected("float32", (2, 3, HIDDEN), 24))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_what_was_agreed_on_comes_back_as_it_was(dtype: str) -> None:
    values = torch.arange(24).reshape(2, 3, HIDDEN).to(DTYPES[dtype])
    decoded = decode_tensor(encode_tensor(values), Expected(dtype, (2, None, HIDDEN), 24))
    assert decoded.dtype == DTYPES[dtype]
    assert torch.equal(decoded, values)


def message(phase: stage_pb2.Phase = Phase.FORWARD, **changes: Any) -> stage_pb2.Frame:
    return stage_pb2.Frame(**{"job": "job", "session": "s", "phase": phase, **changes})


def hidden_states(rows: int = 2, codec: str = "none", seed: int = 0) -> stage_pb2.Tensor:
    values = torch.randn((rows, 3, HIDDEN), generator=torch.Generator().manual_seed(seed))
    if codec == "none":
        return encode_tensor(values)
    known = parse(codec)
    payload = known.encode(values, CodecState(0))
    return stage_pb2.Tensor(codec=known.name, dtype="float32", shape=values.shape, payload=payload)


@pytest.mark.parametrize("agreed", CODECS)
def test_a_tensor_by_a_codec_that_was_not_agreed_is_refused(agreed: str) -> None:
    agreed = parse(agreed).name
    for other in ("none", "int4", "hadamard,int8", "nonsense"):
        if other != agreed and parse("int8" if other == "nonsense" else other).name != agreed:
            tensor = hidden_states()
            tensor.codec = other
            with pytest.raises(BadTensor, match="was not agreed on; agreed: " + agreed.split(":")[0]):
                decoded(message(tensor=tensor), plan=plan_of(agreed))


@pytest.mark.parametrize("codec", CODECS)
def test_a_payload_longer_than_its_codec_makes_is_refused_before_it_is_decoded(codec: str) -> None:
    most = parse(codec).wire_bytes((2, 3, HIDDEN))
    tensor = hidden_states(codec=codec)
    tensor.payload = bytes(most + 1)
    with pytest.raises(BadTensor, match=f"{most + 1} bytes of payload"):
        decoded(message(tensor=tensor), plan=plan_of(codec))
    tensor.payload = bytes(50 * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(BadTensor, match="52428800 bytes of payload"):
            decoded(message(tensor=tensor), plan=plan_of(codec))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 120 * 2**20  # the message itself, and one copy of it that its own length costs


@pytest.mark.parametrize("codec", CODECS)
@given(payload=st.binary(max_size=120), micro_batch=st.sampled_from([0, 1]))
def test_garbage_by_an_agreed_codec_is_refused_or_finite(codec: str, payload: bytes, micro_batch: int) -> None:
    tensor = stage_pb2.Tensor(codec=parse(codec).name, dtype="float32", shape=(1, 3, HIDDEN), payload=payload)
    for phase, values in ((Phase.FORWARD, {}), (Phase.BACKWARD, {"tokens": 2.0})):
        sent = message(phase, tensor=tensor, micro_batch=micro_batch, values=values)
        try:
            frame = decoded(sent, plan=plan_of(codec, 2))
        except BadTensor:
            continue
        assert frame.tensor is not None
        assert frame.tensor.shape == (1, 3, HIDDEN)
        assert torch.isfinite(frame.tensor).all()


@pytest.mark.parametrize("codec", CODECS)
def test_a_frame_whose_last_bytes_are_missing_is_refused(codec: str) -> None:
    tensor = hidden_states(codec=codec)
    tensor.payload = tensor.payload[:-1]
    with pytest.raises(BadTensor):
        decoded(message(tensor=tensor), plan=plan_of(codec))


def test_evaluation_and_adapters_take_codecs_of_their_own() -> None:
    known = parse("hadamard,int8").name
    plan = Plan(1, 1, {"evaluation_up": known, "adapters_up": known})
    values = torch.randn(ADAPTER, generator=torch.Generator().manual_seed(1))
    payload = parse(known).encode(values, CodecState(0))
    adapter = stage_pb2.Tensor(codec=known, dtype="float32", shape=(ADAPTER,), payload=payload)
    frame = decoded(message(Phase.AGGREGATE, tensor=adapter), plan=plan)
    assert frame.tensor is not None
    assert frame.tensor.shape == (ADAPTER,)
    assert decoded(message(Phase.EVALUATE, tensor=hidden_states(1, known)), plan=plan).tensor is not None
    assert decoded(message(tensor=hidden_states()), plan=plan).tensor is not None
    with pytest.raises(BadTensor, match="codec 'none' was not agreed"):
        decoded(message(Phase.EVALUATE, tensor=hidden_states()), plan=plan)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5])
def test_a_micro_batch_has_the_rows_that_both_sides_know_of(micro_batches: int) -> None:
    config = TrainingConfig.of(steps=5, batch_size=5, sequence_length=3)
    terms = replace(AT_DEVICE, config=config)
    plan = plan_of("none", micro_batches)
    for number, part in enumerate(micro_batch_slices(5, micro_batches)):
        rows = part.stop - part.start
        right = message(tensor=hidden_states(rows), micro_batch=number)
        frame = decoded(right, terms, plan)
        assert frame.micro_batch == number
        with pytest.raises(BadTensor, match="was not agreed on"):
            decoded(message(tensor=hidden_states(rows + 1), micro_batch=number), terms, plan)
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.EVALUATE, Phase.STEP):
        beyond = message(phase, tensor=hidden_states(1), micro_batch=micro_batches)
        with pytest.raises(BadFrame, match=f"micro_batch {micro_batches}; this job's steps have"):
            decoded(beyond, terms, plan)


def test_labels_cross_as_int32_and_no_other_type() -> None:
    values = {"tokens": 4.0}
    labels = torch.tensor([[1, -100, 3], [4, 5, VOCABULARY - 1]])
    right = message(tensor=hidden_states(), labels=encode_tensor(labels.int()), values=values)
    frame = decoded(right, AT_SERVER)
    assert frame.labels is not None
    assert torch.equal(frame.labels, labels)
    wrong = message(tensor=hidden_states(), labels=encode_tensor(labels), values=values)
    with pytest.raises(BadTensor, match="dtype 'int64' was not agreed on; agreed: int32"):
        decoded(wrong, AT_SERVER)
    for outside in (VOCABULARY, -1, -101):
        labels[0, 0] = outside
        wrong = message(tensor=hidden_states(), labels=encode_tensor(labels.int()), values=values)
        with pytest.raises(BadTensor, match=f"outside the vocabulary of {VOCABULARY}"):
            decoded(wrong, AT_SERVER)


@pytest.mark.parametrize("session", ["", "s"])
def test_a_probe_is_let_in_before_and_after_open_and_none_that_is_too_large(session: str) -> None:
    for filling, answer in ((0, 0), (MAX_PROBE_BYTES, 0), (0, MAX_PROBE_BYTES)):
        probe = stage_pb2.Probe(filling=bytes(filling), answer_bytes=answer)
        frame = decoded(message(Phase.PROBE, probe=probe), session=session)
        assert frame.probe == probe
    for filling, answer in ((MAX_PROBE_BYTES + 1, 0), (0, MAX_PROBE_BYTES + 1), (0, 2**32 - 1)):
        probe = stage_pb2.Probe(filling=bytes(filling), answer_bytes=answer)
        with pytest.raises(BadFrame, match=f"a PROBE of more than {MAX_PROBE_BYTES} bytes"):
            decoded(message(Phase.PROBE, probe=probe), session=session)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"phase": Phase.PROBE}, "PROBE without its contents"),
        ({"probe": stage_pb2.Probe(answer_bytes=1), "tensor": hidden_states()}, "FORWARD with the contents of PROBE"),
        ({"phase": Phase.PROBE, "probe": stage_pb2.Probe(), "tensor": hidden_states()}, "PROBE with a tensor"),
        ({"phase": Phase.PROBE, "probe": stage_pb2.Probe(), "micro_batch": 1}, "micro_batch 1"),
        (
            {"phase": Phase.STEP, "measured": stage_pb2.Measured(codec_seconds={str(i): 1.0 for i in range(65)})},
            "more than 64 codecs or times",
        ),
        (
            {"phase": Phase.STEP, "measured": stage_pb2.Measured(compute_seconds={str(i): 1.0 for i in range(65)})},
            "more than 64 codecs or times",
        ),
        ({"phase": Phase.BACKWARD, "tensor": hidden_states()}, "BACKWARD without its value tokens"),
        ({"phase": Phase.STEP, "values": {"tokens": 7.0, "nll": 1.0, "norm_squared": 1.0}}, "more predicted tokens"),
        ({"phase": Phase.STEP, "values": {"tokens": 6.0, "nll": 1e308, "norm_squared": 1.0}}, "is not finite"),
        ({"phase": Phase.STEP, "values": {"tokens": 6.0, "nll": 1.0, "norm_squared": 1e308}}, "is not finite"),
        ({"phase": Phase.REPORT, "values": {"evaluation_nll": 1e308, "evaluation_tokens": 1.0}}, "is not finite"),
        (
            {"phase": Phase.REPORT, "values": {"evaluation_tokens": 1e20, "evaluation_nll": 1.0}},
            "more than 9007199254740992 held-out tokens",
        ),
    ],
)
def test_what_is_not_a_frame_of_this_protocol_is_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(BadFrame, match=line):
        decoded(message(**changes))


def test_a_first_frame_is_open_or_probe_and_says_no_more_families_than_there_can_be() -> None:
    with pytest.raises(BadFrame, match="the first frame has to be OPEN"):
        decoded(message(tensor=hidden_states()), session="")
    many = stage_pb2.Open(codecs=[str(i) for i in range(65)])
    with pytest.raises(BadFrame, match="more than 64 codecs or times"):
        decoded(message(Phase.OPEN, open=many), session="")


def test_positions_that_are_wanted_are_as_many_as_the_batch_has() -> None:
    wanted = torch.tensor([[True, False, True], [False, False, True]])
    frame = decoded(message(tensor=hidden_states(), wanted=pack_bits(wanted)))
    assert frame.wanted is not None
    assert torch.equal(frame.wanted, wanted)
    with pytest.raises(BadTensor, match="2 bytes of flags"):
        decoded(message(tensor=hidden_states(), wanted=b"\0\0"))
    values = {"tokens": 1.0, "nll": 1.0, "norm_squared": 1.0}
    with pytest.raises(BadFrame, match="STEP with positions"):
        decoded(message(Phase.STEP, wanted=b"\0", values=values))
    labels = encode_tensor(torch.zeros(2, 3, dtype=torch.int32))
    sent = message(tensor=hidden_states(), labels=labels, wanted=b"\0", values={"tokens": 1.0})
    with pytest.raises(BadFrame, match="FORWARD with positions"):
        decoded(sent, AT_SERVER)
