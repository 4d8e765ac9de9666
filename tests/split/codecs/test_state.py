"""What codecs remember can be written down: whoever reads it back goes on with the very same bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isthmus.protos.v1 import codec_pb2
from isthmus.split.codecs import CodecState, for_matrices, parse
from isthmus.split.errors import CodecError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import TRAINING
from isthmus.split.link.coding import Coder, Plan, Terms
from isthmus.split.resources.ledger import Ledger
from tests.split.codecs.every import EVERY

BATCH, LENGTH, HIDDEN, SAMPLES = 4, 6, 32, 7
ADAPTER = ((8, 32), (32, 8), (4, 16))
CONFIG = TrainingConfig.of(steps=50, batch_size=BATCH, sequence_length=LENGTH)
TERMS = Terms(CONFIG, SAMPLES, ADAPTER, HIDDEN, 50)
MORE = ["ef,klt,int4", "delta,klt:block=16,uniform:step=0.2,range", "ef,powersgd:2", "klt,uniform:step=0.13,zstd"]


def hidden_states(step: int) -> Tensor:
    mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, HIDDEN)
    return torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(step)) @ mixing.T


def adapter(step: int) -> Tensor:
    return torch.randn(TERMS.adapter_values, generator=torch.Generator().manual_seed(step))


def plan_of(codec: str) -> Plan:
    name = parse(codec).name
    return Plan(1, 1, {**dict.fromkeys(TRAINING, name), "adapters_up": name}, seed=3)


def coder(codec: str) -> Coder:
    made = Coder(TERMS, Ledger())
    made.use(plan_of(codec))
    return made


def again(one: Coder) -> Coder:
    """Another coder, with what this one remembers."""
    made = Coder(TERMS, Ledger())
    made.restore(codec_pb2.SessionState.FromString(one.to_proto().SerializeToString()))
    return made


@pytest.mark.parametrize("codec", [*EVERY, *MORE])
def test_a_session_that_is_read_back_goes_on_as_if_nothing_had_been(codec: str) -> None:
    """Both ends are written down and read back after four steps, beside two that are not."""
    ends, others = [coder(codec), coder(codec)], [coder(codec), coder(codec)]
    for step in range(9):
        if step == 4:
            ends = [again(end) for end in ends]
        for stream, make in (("hidden_up", hidden_states), ("gradients_up", hidden_states), ("adapters_up", adapter)):
            tensor = make(step if stream != "gradients_up" else 100 + step)
            crossed = []
            for near, far in (ends, others):
                message = near.encode(stream, tensor, step)
                expected = far.expected(stream, tuple(tensor.shape), tensor.numel())
                crossed.append((message.payload, far.decode(stream, message, expected, step)))
            assert crossed[0][0] == crossed[1][0], (stream, step)
            assert torch.equal(crossed[0][1], crossed[1][1]), (stream, step)
    for mine, theirs in zip(ends, others, strict=True):
        assert mine.to_proto() == theirs.to_proto()
        for stream in ("hidden_up", "adapters_up"):
            state, expected_state = mine.state_of(stream), theirs.state_of(stream)
            assert state is not None
            assert expected_state is not None
            assert state.memory_bytes == expected_state.memory_bytes


def written(codec: str) -> codec_pb2.CodecState:
    one, state = parse(codec), CodecState(5)
    for step in range(3):
        one.encode(hidden_states(step), state)
    return state.to_proto()


def _first_part(state: codec_pb2.CodecState) -> codec_pb2.KeptPart:
    return next(iter(state.parts.values()))


def _another_part(state: codec_pb2.CodecState) -> None:
    state.parts["nonsense"].numbers.append(1.0)


def _short(state: codec_pb2.CodecState) -> None:
    kept = _first_part(state).tensors[0].values
    kept.payload = kept.payload[:-4]


def _large(state: codec_pb2.CodecState) -> None:
    _first_part(state).tensors[0].values.shape[:] = [2**31, 2**31, 2**31]


def _nan(state: codec_pb2.CodecState) -> None:
    kept = _first_part(state).tensors[0].values
    kept.payload = b"\xff" * len(kept.payload)


def _twice(state: codec_pb2.CodecState) -> None:
    _first_part(state).tensors.append(_first_part(state).tensors[0])


def _no_key(state: codec_pb2.CodecState) -> None:
    del _first_part(state).tensors[0].key[:]


def _other_numbers(state: codec_pb2.CodecState) -> None:
    _first_part(state).numbers.append(float("inf"))


def _other_codec(state: codec_pb2.CodecState) -> None:
    _first_part(state).tensors[0].values.codec = "int8"


CHANGES = [_another_part, _short, _large, _nan, _twice, _no_key, _other_numbers, _other_codec]


@pytest.mark.parametrize("codec", ["ef,int2", "delta,int4", "klt,uniform:step=0.13,range", "powersgd:2"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_the_codec_cannot_have_had_is_refused(
    codec: str, change: Callable[[codec_pb2.CodecState], None]
) -> None:
    state = written(codec)
    assert parse(codec).read_state(state).to_proto() == state
    change(state)
    with pytest.raises(CodecError) as refused:
        parse(codec).read_state(state)
    assert len(str(refused.value)) < 300


def test_a_memory_never_comes_back_larger_than_it_may_be() -> None:
    codec = parse("ef:limit=1,int8")
    state = written("ef,int2")
    kept = state.parts["ef"].tensors
    kept[0].values.shape[:] = [2**18 + 1]
    kept[0].values.payload = bytes(4 * (2**18 + 1))
    state.parts["ef:limit=1"].CopyFrom(state.parts.pop("ef"))
    with pytest.raises(CodecError, match="1 MiB can be"):
        codec.read_state(state)


def test_a_state_of_other_matrices_or_of_another_session_is_refused() -> None:
    one = for_matrices(parse("powersgd:2"), ADAPTER)
    state = CodecState(5)
    one.encode(adapter(0), state)
    assert one.read_state(state.to_proto()).to_proto() == state.to_proto()
    with pytest.raises(CodecError, match="of 3 matrices"):
        parse("powersgd:2").read_state(state.to_proto())
    session = coder("ef,int2").to_proto()
    session.streams[0].state.seed += 1
    with pytest.raises(CodecError, match="another session's seed"):
        Coder(TERMS, Ledger()).restore(session)


@pytest.mark.parametrize("codec", ["ef,int2", "klt,uniform:step=0.13,range", "powersgd:2", "int4"])
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_state_or_are_refused(codec: str, data: bytes) -> None:
    message = codec_pb2.CodecState()
    message.parts[parse(codec).name.split(",")[0]].tensors.add(key=[1]).values.payload = data
    with pytest.raises(CodecError):
        parse(codec).read_state(message)
