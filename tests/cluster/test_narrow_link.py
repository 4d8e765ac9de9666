"""A device on a narrow link, with real processes: few bytes, all of them counted, and no fault of it ends a job."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pytest

from isthmus.client.identity import enrol
from isthmus.coordinator.emulation import Cut, LinkSpec, LinkThread
from isthmus.coordinator.emulation.line import PACKET
from isthmus.coordinator.emulation.local_cluster import LocalCluster
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import stage_pb2
from isthmus.split.link.profile import MAX_PROBE_BYTES
from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER
from isthmus.split.models.source import ModelFolder
from isthmus.split.tls import channel
from tests.cluster.house import (
    TINY,
    House,
    events_of,
    events_until,
    step_reached,
    succeeded,
    wait_for,
    write_text,
)
from tests.cluster.in_process import InProcessCluster
from tests.cluster.test_bad_frames import RawDevice, agreeable_open, exchange
from tests.split.tiny_models import make_model

pytestmark = pytest.mark.cluster

HOST = "127.0.0.2"  # under which the device knows the coordinator
NARROW = LinkSpec.parse_short("20mbit,40ms")
NARROWER = LinkSpec.parse_short("4mbit,40ms")  # on which fewer bytes are quicker, however slow the machine
HEADERS = 66  # bytes: Ethernet, IP, TCP
HIDDEN = 64
CONFIG = TINY.but(
    batch_size=8, sequence_length=64, codec="auto", micro_batches=0, aggregate_every=2, checkpoint_every=10
)


@dataclass(frozen=True)
class FarHouse(House):
    """With one device, `far`, whose streams to stages have a link that tests may change."""

    link: LinkThread


@pytest.fixture(scope="module")
def far_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarHouse]:
    """In this process."""
    with InProcessCluster(tmp_path_factory.mktemp("narrow"), coordinator_threads=1) as cluster:
        cluster.start_coordinator(stage_ports=4)
        yield from _with_a_far_device(cluster)


@pytest.fixture(scope="module")
def far_house_of_processes(house_of_processes: House) -> Iterator[FarHouse]:
    yield from _with_a_far_device(house_of_processes.cluster)


def _with_a_far_device(cluster: LocalCluster) -> Iterator[FarHouse]:
    folder = cluster.folder / "narrow"
    model = make_model(folder / "model", "llama", layers=3, hidden=HIDDEN)
    text = write_text(folder / "far.txt", 0, 300)
    control, stages = cluster.link_pairs(HOST)[:2], cluster.link_pairs(HOST)[2:]
    with LinkThread(LinkSpec(), control), LinkThread(NARROW, stages) as link:
        house = FarHouse(cluster, model, {"far": text}, link)
        house.start("far", host=HOST, arguments=["--threads", "1", "--allow", "splitlora"])
        yield house
        cluster.kill("far", signal.SIGTERM)


@pytest.fixture
def house(request: pytest.FixtureRequest) -> Iterator[FarHouse]:
    real = request.node.get_closest_marker("processes") is not None
    shared: FarHouse = request.getfixturevalue("far_house_of_processes" if real else "far_house")
    shared.link.set(NARROW)
    yield shared
    shared.cancel_all()


def rows_of(device: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    """Of the stage's counts: what the device sent was received there."""
    return [row for row in device["traffic"] if row["kind"] in kinds]


def test_on_a_narrow_link_training_takes_an_eighth_of_the_bytes(house: FarHouse) -> None:
    house.link.set(NARROWER)
    config = CONFIG.but(cut_layer=2, steps=12, sequence_length=128, aggregate_every=4, learning_rate=4e-3)
    with house.connect() as connection:
        job = house.submit(connection, config, ["far"], model=DEFAULT_MODEL_FOLDER)
        report = succeeded(connection, job)
        said = [event.log.message for event in events_of(connection, job, "log")]
    (device,) = report["devices"]

    values = (
        4 * config.steps * config.batch_size * config.text.sequence_length
    )  # up and down, of hidden states and gradients
    as_float32 = 4 * values * ModelFolder(DEFAULT_MODEL_FOLDER).config.hidden_size
    of_training = rows_of(device, "forward", "backward")
    assert sum(row["payload_bytes"] + row["overhead_bytes"] for row in of_training) * 8 <= as_float32
    assert all("uniform" in row["codec"] for row in of_training)
    assert report["perplexity_after"] < 0.9 * report["perplexity_before"]

    sentence = said[0]
    assert sentence.startswith("far: hidden states by ")
    assert "micro-batches a step" in sentence
    assert rate_in(sentence) < 5  # less than the link's 4 where the machine was busy with other things


@pytest.mark.processes  # of each end the kernel counts its own
def test_every_byte_is_counted(house: FarHouse) -> None:
    config = CONFIG.but(cut_layer=2, steps=4, sequence_length=128, aggregate_every=4)
    before = house.link.bytes_up, house.link.bytes_down
    with house.connect() as connection:
        job = house.submit(connection, config, ["far"], model=DEFAULT_MODEL_FOLDER)
        report = succeeded(connection, job)
    (device,) = report["devices"]

    crossed = house.link.bytes_up - before[0], house.link.bytes_down - before[1]  # of TCP: with TLS and HTTP/2 in it
    for direction, by_device, on_link in (
        ("received", device["wire_bytes_sent"], crossed[0]),
        ("sent", device["wire_bytes_received"], crossed[1]),
    ):
        by_stage = sum(row["payload_bytes"] + row["overhead_bytes"] for row in device["traffic"]
                       if row["direction"] == direction)  # fmt: skip
        # The kernel counts headers too, which the link does not: at most about as many as if each packet were full and
        # acknowledged by itself. On a busy machine it comes near to that.
        most = on_link + HEADERS * sum(crossed) / PACKET
        assert on_link * 0.995 < by_device < most
        assert on_link * 0.995 < by_stage < most
    assert 0 < device["link_seconds"] <= device["wait_seconds"]


def settled_memory(process: psutil.Process) -> int:
    """Resident bytes, once they do not grow any more."""
    readings = [process.memory_info().rss]

    def settled() -> bool:
        readings.append(process.memory_info().rss)
        return len(readings) > 25 and max(readings[-25:]) - min(readings[-25:]) < 2**20

    wait_for(settled, "the stage's memory comes to rest")
    return readings[-1]


@pytest.mark.processes
def test_a_device_that_is_stopped_costs_the_stage_no_memory_and_goes_on_when_it_is_let(house: FarHouse) -> None:
    config = CONFIG.but(steps=60, micro_batches=8)
    with house.connect() as connection:
        job = house.submit(connection, config, ["far"])
        step_reached(connection, job, 10)
        stage = house.stage()
        usual = stage.memory_info().rss
        with house.stopped("far"):
            assert settled_memory(stage) < usual + 2**25
        report = succeeded(connection, job)
        assert not [event.left for event in events_of(connection, job, "left") if not event.left.done]
    assert len(report["losses"]) == config.steps


@pytest.mark.processes
def test_a_device_that_takes_no_answers_gets_no_more_of_them(house: FarHouse) -> None:
    """It asks for 400 MiB and reads nothing. It holds the others up, and when it has gone they go on."""
    raw = RawDevice(enrol(house.cluster.folder / "deaf", house.address, house.cluster.token("deaf")))
    config = CONFIG.but(steps=20, codec="none", micro_batches=1)
    with raw.session() as told, house.connect() as connection:
        job = house.submit(connection, config, ["far", "deaf"])
        task = next(message.task for message in told if message.WhichOneof("kind") == "task")
        address = f"127.0.0.1{task.stage_address}"
        with channel(address, raw.identity.credentials) as opened_channel, exchange(opened_channel) as stream:
            opened = agreeable_open(house, config, raw.digest(job))
            stream.send(stage_pb2.Frame(job=job, session="deaf", phase=stage_pb2.OPEN, open=opened))
            assert stream.receive().phase == stage_pb2.OPEN
            stage = house.stage()
            before = settled_memory(stage)
            probe = stage_pb2.Probe(answer_bytes=MAX_PROBE_BYTES)
            for _ in range(1600):
                stream.send(stage_pb2.Frame(job=job, session="deaf", phase=stage_pb2.PROBE, probe=probe))
            assert settled_memory(stage) < before + 2**25
            assert stream.receive().phase == stage_pb2.PROBE  # and it could have them still
        report = succeeded(connection, job)
        left = [event.left.done for event in events_of(connection, job, "left") if event.device == "deaf"]
    assert left == [False]
    assert len(report["losses"]) == config.steps


def test_a_link_that_breaks_in_the_middle_is_dialled_again_and_the_job_ends(house: FarHouse) -> None:
    config = CONFIG.but(steps=40)
    with house.connect() as connection:
        job = house.submit(connection, config, ["far"])
        step_reached(connection, job, 8)
        house.link.set(replace(NARROW, cuts=(Cut(house.link.elapsed, 1.0, reset=True),)))
        left = events_until(connection, job, lambda event: event.HasField("left"))
        assert left.left.done is False
        report = succeeded(connection, job)
        joined = events_of(connection, job, "joined")
        steps = [event.step.step for event in events_of(connection, job, "step")]
    assert len(joined) == 2
    assert steps[-1] == config.steps
    assert len(report["losses"]) == config.steps
    assert report["perplexity_after"] < report["perplexity_before"]


def test_a_link_that_hangs_for_a_while_delays_the_job_and_nothing_else(house: FarHouse) -> None:
    config = CONFIG.but(steps=40)
    with house.connect() as connection:
        job = house.submit(connection, config, ["far"])
        step_reached(connection, job, 8)
        house.link.set(replace(NARROW, cuts=(Cut(house.link.elapsed, 3.0),)))
        report = succeeded(connection, job)
        assert len(events_of(connection, job, "joined")) == 1
    assert len(report["losses"]) == config.steps
    assert report["devices"][0]["link_seconds"] > 2


def test_a_link_that_becomes_slow_gets_another_plan_and_watchers_are_told(house: FarHouse) -> None:
    house.link.set(LinkSpec())
    config = CONFIG.but(steps=400)
    with house.connect() as connection:
        job = house.submit(connection, config, ["far"])
        fast = step_reached(connection, job, 12)
        house.link.set(LinkSpec.parse_short("2mbit,60ms"))

        def told(event: pb.Event) -> bool:
            return event.HasField("log") and rate_in(event.log.message) < 3

        change = events_until(connection, job, told, after=fast.number)
        message = change.log.message
        assert "as it was" in message
        assert "uniform" in message
        connection.stub.CancelJob(pb.JobRequest(id=job))


def rate_in(message: str) -> float:
    """Mbit/s up, in the sentence of a plan; infinite elsewhere."""
    rate = message.partition(", on ")[2].partition(" Mbit/s up")[0]
    return float(rate) if rate and rate[0].isdigit() else float("inf")
