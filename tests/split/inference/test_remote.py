"""A holder across the network, both sides of it, without the network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.split.errors import BadFrame, BadRequest, IsthmusError, LinkLost
from isthmus.split.inference.remote import RemoteHolder
from isthmus.split.inference.wire import MAX_TOKENS, HiddenCoder, codec_for_hidden_states, rows_of, rows_to_proto
from isthmus.split.runtime.base import BadPosition, Row
from tests.examples import examples

HIDDEN = 16
ROWS = [Row(0, 0, 3), Row(5, 7, 1, adapter=2, long=True)]


def states(tokens: int = 4) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0))


def holder(codec: str = "none", timeout: float = 5.0) -> RemoteHolder:
    return RemoteHolder("device", codec, 1, HIDDEN, timeout=timeout)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


async def sent(remote: RemoteHolder) -> pb.Batch:
    """The next batch that it sends; the agreement before it is passed over."""
    async for message in remote.messages():
        if message.HasField("batch"):
            return message.batch
    raise AssertionError("the stream has ended")


@pytest.mark.parametrize("codec", ["none", "float16", "hadamard,int8"])
def test_what_a_holder_computes_comes_back(codec: str) -> None:
    async def work() -> None:
        remote, far = holder(codec), HiddenCoder(codec, 1, HIDDEN)
        answer = asyncio.create_task(remote.compute(ROWS, states()))
        batch = await sent(remote)
        assert rows_of(batch) == ROWS
        got = far.decode(batch.hidden, 4)
        torch.testing.assert_close(got, states(), atol=0.05 if codec != "none" else 0.0, rtol=0.0)
        remote.heard(pb.FromHolder(result=pb.Result(id=batch.id, hidden=far.encode(-got), computing_seconds=0.001)))
        torch.testing.assert_close(await answer, -states(), atol=0.1 if codec != "none" else 0.0, rtol=0.0)
        assert remote.cost.batches == 1
        assert remote.cost.tokens == 4
        assert remote.cost.sent > 0
        assert remote.cost.received > 0

    run(work)


def test_errors_of_a_batch_are_that_batchs_alone() -> None:
    async def work() -> None:
        remote, far = holder(), HiddenCoder("none", 1, HIDDEN)
        answers = [asyncio.create_task(remote.compute(ROWS, states())) for _ in range(3)]
        first = (await sent(remote)).id
        remote.heard(pb.FromHolder(result=pb.Result(id=first, error="go back", bad_position=True)))
        remote.heard(pb.FromHolder(result=pb.Result(id=first + 1, error="no room")))
        remote.heard(pb.FromHolder(result=pb.Result(id=first + 2, hidden=far.encode(states()))))
        with pytest.raises(BadPosition, match="device: go back"):
            await answers[0]
        with pytest.raises(IsthmusError, match="device: no room"):
            await answers[1]
        assert torch.equal(await answers[2], states())
        assert not remote.gone

    run(work)


def test_a_stream_that_ends_loses_what_is_under_way() -> None:
    async def work() -> None:
        remote = holder()
        answers = [asyncio.create_task(remote.compute(ROWS, states())) for _ in range(2)]
        await sent(remote)
        remote.end(LinkLost("reset"))
        for answer in answers:
            with pytest.raises(LinkLost, match="device: reset"):
                await answer
        with pytest.raises(LinkLost, match="has gone"):
            await remote.compute(ROWS, states())
        assert remote.gone

    run(work)


def test_a_holder_that_leaves_answers_what_is_under_way() -> None:
    async def work() -> None:
        remote, far = holder(), HiddenCoder("none", 1, HIDDEN)
        answer = asyncio.create_task(remote.compute(ROWS, states()))
        batch = await sent(remote)
        remote.heard(pb.FromHolder(leaving=pb.Leaving()))
        assert remote.gone
        with pytest.raises(LinkLost, match="has gone"):
            await remote.compute(ROWS, states())
        remote.heard(pb.FromHolder(result=pb.Result(id=batch.id, hidden=far.encode(states()))))
        assert torch.equal(await answer, states())
        assert [message async for message in remote.messages()] == []  # the stream is closed

    run(work)


def test_a_holder_that_does_not_answer_counts_as_gone() -> None:
    async def work() -> None:
        remote = holder(timeout=0.05)
        with pytest.raises(LinkLost, match="device: it did not answer for 0 s"):
            await remote.compute(ROWS, states())
        assert remote.gone

    run(work)


@pytest.mark.parametrize(
    "message",
    [
        pb.FromHolder(),
        pb.FromHolder(hello=pb.Hello()),
        pb.FromHolder(result=pb.Result(id=99)),
        pb.FromHolder(result=pb.Result(id=1, hidden=HiddenCoder("none", 1, HIDDEN).encode(states(3)))),
        pb.FromHolder(result=pb.Result(id=1, hidden=HiddenCoder("none", 1, HIDDEN).encode(states() * torch.nan))),
        pb.FromHolder(result=pb.Result(id=1, hidden=HiddenCoder("float16", 1, HIDDEN).encode(states()))),
    ],
)
def test_what_was_not_agreed_is_refused(message: pb.FromHolder) -> None:
    async def work() -> None:
        remote = holder()
        answer = asyncio.create_task(remote.compute(ROWS, states()))
        await sent(remote)
        with pytest.raises(BadRequest):
            remote.heard(message)
        remote.end(LinkLost("it sent nonsense"))
        with pytest.raises(LinkLost):
            await answer

    run(work)


@given(st.binary(max_size=60))
@settings(max_examples=examples(200))
def test_arbitrary_results_are_refused_and_cost_no_memory(payload: bytes) -> None:
    async def work() -> None:
        remote = holder()
        answer = asyncio.create_task(remote.compute(ROWS, states()))
        await sent(remote)
        message = pb.FromHolder(result=pb.Result(id=1))
        message.result.hidden.codec, message.result.hidden.dtype = "none", "float32"
        message.result.hidden.shape[:] = [4, HIDDEN]
        message.result.hidden.payload = payload
        with pytest.raises(BadRequest, match="bytes of payload"):
            remote.heard(message)
        remote.end(LinkLost("over"))
        with pytest.raises(LinkLost):
            await answer

    run(work)


def test_batches_are_bounded() -> None:
    assert rows_of(pb.Batch(rows=rows_to_proto(ROWS))) == ROWS
    for rows in ([], [Row(0, 0, MAX_TOKENS + 1)], [Row(0, 0, 2**31), Row(1, 0, 2**31)]):
        with pytest.raises(BadFrame, match="a batch of"):
            rows_of(pb.Batch(rows=rows_to_proto(rows)))


def test_codecs_that_remember_samples_are_refused() -> None:
    assert codec_for_hidden_states("zstd,shuffle") == codec_for_hidden_states("shuffle,zstd")
    with pytest.raises(BadFrame, match="without ef and delta"):
        codec_for_hidden_states("ef,topk")
