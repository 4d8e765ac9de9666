"""Tensors on the wire: exact both ways, and nothing allocated for what was not agreed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import CodecState, parse
from isthmus.split.codecs.packing import pack_bits, unpack_bits
from isthmus.split.codecs.wire import DTYPES, Expected, check_tensor, decode_tensor, encode_tensor
from isthmus.split.errors import BadTensor


@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**31),
)
def test_a_tensor_comes_back_bit_for_bit(shape: list[int], dtype: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(-1000, 1000, shape, generator=generator).to(DTYPES[dtype])
    message = encode_tensor(tensor)
    back = decode_tensor(message, Expected(dtype, tuple(shape), tensor.numel()))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_infinity_nan_and_views_survive() -> None:
    tensor = torch.tensor([[1.0, float("inf")], [float("nan"), -0.0]]).t()
    assert not tensor.is_contiguous()
    back = decode_tensor(encode_tensor(tensor), Expected("float32", (2, 2), 4))
    torch.testing.assert_close(back, tensor, equal_nan=True, rtol=0, atol=0)


def test_the_received_tensor_can_be_written_to() -> None:
    back = decode_tensor(encode_tensor(torch.zeros(3)), Expected("float32", (3,), 3))
    back += 1
    assert back.tolist() == [1, 1, 1]


def test_a_dtype_that_has_no_name_on_the_wire_is_refused() -> None:
    with pytest.raises(BadTensor, match="float64"):
        encode_tensor(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codec": "zip"}, "codec 'zip' was not agreed"),
        ({"dtype": "float16"}, "dtype 'float16' was not agreed"),
        ({"shape": [2, 4]}, "shape"),
        ({"shape": [2, 3, 1]}, "3 dimensions; 2 were agreed on"),
        ({"shape": [2**31, 3]}, "values are more than"),
        ({"payload": b"\0" * 23}, "23 bytes of payload"),
        ({"payload": b"\0" * 25}, "25 bytes of payload"),
        ({"payload": b""}, "0 bytes of payload"),
    ],
)
def test_what_was_not_agreed_is_refused(change: dict, reason: str) -> None:
    message = encode_tensor(torch.zeros(2, 3))
    for field, value in change.items():
        message.ClearField(field)
        if field == "shape":
            message.shape.extend(value)
        else:
            setattr(message, field, value)
    with pytest.raises(BadTensor, match=reason):
        check_tensor(message, Expected("float32", (None, 3), 6))


CODEC = parse("hadamard,int4").name


def encoded(shape: tuple[int, ...] = (2, 3, 16)) -> stage_pb2.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    payload = parse(CODEC).encode(values, CodecState(1))
    return stage_pb2.Tensor(codec=CODEC, dtype="float32", shape=shape, payload=payload)


def test_an_encoded_tensor_comes_back_as_its_codec_has_it() -> None:
    values = torch.randn((2, 3, 16), generator=torch.Generator().manual_seed(0))
    back = decode_tensor(encoded(), Expected("float32", (2, 3, 16), 96, parse(CODEC)), CodecState(1))
    assert back.dtype == torch.float32
    assert (back - values).square().mean() < 0.02


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codec": "none"}, "codec 'none' was not agreed on; agreed: hadamard,int4"),
        ({"codec": "int4,hadamard"}, "was not agreed"),  # not the canonical name
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' was not agreed"),
        ({"shape": [2, 3, 17]}, "shape"),
        ({"payload": bytes(10_000)}, "10000 bytes of payload; hadamard,int4.* takes at most"),
    ],
)
def test_an_encoded_tensor_that_was_not_agreed_is_refused_before_it_is_decoded(change: dict, reason: str) -> None:
    message = encoded()
    for field, value in change.items():
        message.ClearField(field)
        if field == "shape":
            message.shape.extend(value)
        else:
            setattr(message, field, value)
    with pytest.raises(BadTensor, match=reason):
        check_tensor(message, Expected("float32", (2, 3, 16), 96, parse(CODEC)))


@given(payload=st.binary(max_size=80))
def test_any_payload_of_a_codec_is_refused_or_gives_finite_values(payload: bytes) -> None:
    message = encoded()
    message.payload = payload
    try:
        back = decode_tensor(message, Expected("float32", (2, 3, 16), 96, parse(CODEC)), CodecState(1))
    except BadTensor:
        return
    assert back.shape == (2, 3, 16)
    assert torch.isfinite(back).all()


@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 2**31))
def test_flags_take_a_bit_each_and_come_back(shape: list[int], seed: int) -> None:
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(flags)
    assert len(packed) == -(-flags.numel() // 8)
    assert torch.equal(unpack_bits(packed, shape), flags)
    with pytest.raises(BadTensor, match="bytes of flags"):
        unpack_bits(packed + b"\0", shape)
