"""A link is measured by real messages on a real stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from isthmus.protos.v1 import coordinator_pb2_grpc, stage_pb2
from isthmus.split.errors import BadFrame, IsthmusError, LinkLost
from isthmus.split.link.profile import MAX_PROBE_BYTES
from isthmus.split.plan.link_probe import answer, measure_link
from isthmus.split.runtime.speed import Stopped


class Coordinator(coordinator_pb2_grpc.CoordinatorServicer):
    async def MeasureLink(self, requests: AsyncIterator[stage_pb2.Probe], context: Any) -> AsyncIterator[Any]:
        async for message in requests:
            await asyncio.sleep(0.02 + len(message.filling) / 5e6)
            yield answer(message)


class Older(coordinator_pb2_grpc.CoordinatorServicer):
    pass


@pytest.fixture(params=[Coordinator])
def channel(request: Any) -> Iterator[grpc.Channel]:
    ready, ports, loop = threading.Event(), list[int](), asyncio.new_event_loop()

    async def serve(ended: asyncio.Event) -> None:
        server = grpc.aio.server()
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(request.param(), server)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        ready.set()
        await ended.wait()
        await server.stop(None)

    ended = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(ended),))
    thread.start()
    assert ready.wait(30)
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as opened:
        yield opened
    loop.call_soon_threadsafe(ended.set)
    thread.join(30)
    loop.close()


def test_round_trip_and_rates_are_those_of_the_messages(channel: grpc.Channel) -> None:
    link = measure_link(channel)
    assert 0.015 < link.round_trip < 1
    assert 1e5 < link.up < 6e6  # as many bytes a second as the other side takes
    assert link.down > link.up


def test_measuring_is_given_up_when_it_has_to_stop(channel: grpc.Channel) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(Stopped):
        measure_link(channel, stop=stop)
    assert len(asked) == 4


@pytest.mark.parametrize("channel", [Older], indirect=True)
def test_a_coordinator_that_cannot_is_one_line(channel: grpc.Channel) -> None:
    with pytest.raises(IsthmusError) as refused:
        measure_link(channel)
    assert "\n" not in str(refused.value)


def test_nobody_there_is_a_lost_link() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as nowhere, pytest.raises(LinkLost, match="cannot be reached"):
        measure_link(nowhere)


def test_a_probe_has_a_largest_size() -> None:
    assert len(answer(stage_pb2.Probe(answer_bytes=MAX_PROBE_BYTES)).filling) == MAX_PROBE_BYTES
    for message in (
        stage_pb2.Probe(answer_bytes=MAX_PROBE_BYTES + 1),
        stage_pb2.Probe(filling=bytes(MAX_PROBE_BYTES + 1)),
    ):
        with pytest.raises(BadFrame):
            answer(message)
