"""What a device may send: any bytes are refused with BadFrame or BadTensor, or are a frame that fits the job."""

from __future__ import annotations

import math
import tracemalloc

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos.v1 import stage_pb2
from split.config import TrainingConfig
from split.errors import BadFrame, BadTensor
from split.link import Phase
from split.protocol import Rules
from split.wire import DTYPES, Expected, check_tensor, decode_tensor, encode_tensor

HIDDEN, VOCABULARY, ADAPTER = 4, 50, 6
CONFIG = TrainingConfig(steps=5, batch_size=2, sequence_length=3)
AT_DEVICE = Rules("job", CONFIG, HIDDEN, VOCABULARY, ADAPTER)
AT_SERVER = Rules(
    "job", TrainingConfig(steps=5, batch_size=2, sequence_length=3, labels="server"), HIDDEN, VOCABULARY, ADAPTER
)

# Numbers and words that are right about as often as they are wrong, so that every check is reached.
sizes = st.sampled_from([0, 1, 2, 3, 4, ADAPTER, 7, 2**31, 2**32 - 1])
numbers = st.floats() | st.sampled_from([0.0, 1.0, 3.0, -1.0, 1e308])
names = st.sampled_from(["tokens", "nll", "norm_squared", "evaluation_nll", "evaluation_tokens", "x"])


@st.composite
def tensors(draw: st.DrawFn) -> stage_pb2.Tensor:
    whole = [
        torch.zeros(2, 3, HIDDEN),
        torch.full((2, 3, HIDDEN), math.nan),
        torch.zeros(1, 3, HIDDEN),
        torch.zeros(ADAPTER),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.full((2, 3), VOCABULARY),
    ]
    if draw(st.booleans()):
        return encode_tensor(draw(st.sampled_from(whole)))
    return stage_pb2.Tensor(
        codec=draw(st.sampled_from(["none", "none", "", "pickle"])),
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
        micro_batch=draw(st.sampled_from([0, 0, 0, 1])),
        phase=draw(st.integers(0, 10)),
        tensor=draw(st.none() | tensors()),
        labels=draw(st.none() | tensors()),
        values=draw(st.dictionaries(names, numbers, max_size=5)),
    )


@pytest.mark.parametrize("rules", [AT_DEVICE, AT_SERVER], ids=["labels at the device", "labels at the server"])
@given(message=frames(), session=st.sampled_from(["s", "s", "s", None]))
def test_any_frame_is_refused_or_fits_the_job(rules: Rules, message: stage_pb2.Frame, session: str | None) -> None:
    try:
        frame = rules.decode(message, session)
    except (BadFrame, BadTensor):
        return
    assert 0 <= frame.step <= CONFIG.steps
    assert all(math.isfinite(value) for value in frame.values.values())
    shapes = {Phase.FORWARD: (2, 3, HIDDEN), Phase.BACKWARD: (2, 3, HIDDEN), Phase.AGGREGATE: (ADAPTER,)}
    if frame.phase in shapes:
        assert frame.tensor is not None
        assert frame.tensor.shape == shapes[frame.phase]
    if frame.tensor is not None:
        assert frame.tensor.dtype == torch.float32
        assert 0 < frame.tensor.numel() <= 2 * 3 * HIDDEN
        assert torch.isfinite(frame.tensor).all()
    if frame.labels is not None:
        assert rules is AT_SERVER
        assert frame.tensor is not None
        assert frame.labels.shape == frame.tensor.shape[:2]
        assert ((frame.labels == -100) | ((frame.labels >= 0) & (frame.labels < VOCABULARY))).all()


@given(data=st.binary(max_size=300))
def test_any_bytes_that_parse_are_refused_or_fit_the_job(data: bytes) -> None:
    message = stage_pb2.Frame()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return
    with pytest.raises((BadFrame, BadTensor)):  # nothing random says the job's name
        AT_DEVICE.decode(message, "s")


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
        AT_DEVICE.decode(message, "s")
    tracemalloc.start()
    try:
        with pytest.raises(BadTensor) as refused:
            AT_DEVICE.decode(message, "s")
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
