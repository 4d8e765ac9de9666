"""What the store keeps, over restarts too, and what it never keeps."""

from __future__ import annotations

import json
import secrets
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from isthmus.coordinator.control.store import Store
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest, NotEnrolled, NotFound, WrongState
from isthmus.split.tls import check_name


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    opened = Store(tmp_path / "db.sqlite", clock)
    yield opened
    opened.close()


def enrolled(store: Store, name: str, serial: str) -> None:
    assert store.redeem_token(store.create_token(name)[0], serial) == name


# ---- Tokens ----


def test_a_token_enrols_its_device_once(store: Store, clock: Clock) -> None:
    secret, expires = store.create_token("edge")
    assert expires == clock.now + 3600
    assert store.token_name(secret) == "edge"
    assert store.redeem_token(secret, "aa") == "edge"
    store.check_certificate("edge", "aa")
    with pytest.raises(NotEnrolled, match=r"used already.*isthmus enroll edge"):
        store.redeem_token(secret, "bb")
    store.check_certificate("edge", "aa")


def test_a_token_expires(store: Store, clock: Clock) -> None:
    secret, _ = store.create_token("edge", 60)
    clock.now += 60
    with pytest.raises(NotEnrolled, match="expired"):
        store.token_name(secret)
    with pytest.raises(NotEnrolled, match="expired"):
        store.redeem_token(secret, "aa")
    assert store.devices() == []


def test_an_unknown_token_is_refused(store: Store) -> None:
    secret, _ = store.create_token("edge")
    with pytest.raises(NotEnrolled, match="not known"):
        store.redeem_token(secret[:-1] + ("A" if secret[-1] != "A" else "B"), "aa")


@pytest.mark.parametrize("lifetime", [-1.0, 31 * 86400.0, float("nan"), float("inf")])
def test_lifetimes_without_sense_are_refused(store: Store, lifetime: float) -> None:
    with pytest.raises(BadRequest, match="a token lives"):
        store.create_token("edge", lifetime)


def test_a_token_is_for_a_name(store: Store) -> None:
    with pytest.raises(BadRequest, match="not a name"):
        store.create_token("Edge One")


def test_of_racing_enrolments_with_one_token_exactly_one_wins(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "db.sqlite") for _ in range(8)]  # as eight processes would
    secret, _ = stores[0].create_token("edge")

    def redeem(number: int) -> str:
        try:
            stores[number].redeem_token(secret, f"{number:x}")
        except NotEnrolled as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(redeem, range(8)))
    assert answers.count("won") == 1
    assert all(answer == "won" or "used already" in answer for answer in answers)
    stores[0].check_certificate("edge", f"{answers.index('won'):x}")
    for opened in stores:
        opened.close()


def test_a_secret_is_nowhere_in_the_files(tmp_path: Path) -> None:
    store = Store(tmp_path / "db.sqlite")
    secret, _ = store.create_token("edge")
    store.redeem_token(secret, "aa")
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}  # with the write-ahead log
    store.close()
    files["after closing"] = (tmp_path / "db.sqlite").read_bytes()
    assert b"edge" in b"".join(files.values())
    assert [name for name, content in files.items() if secret.encode() in content] == []


# ---- Devices ----


def test_enrolling_again_replaces_the_certificate(store: Store) -> None:
    enrolled(store, "edge", "aa")
    enrolled(store, "edge", "bb")
    store.check_certificate("edge", "bb")
    with pytest.raises(NotEnrolled, match="enrolled again since"):
        store.check_certificate("edge", "aa")
    assert len(store.devices()) == 1


def test_revoking_puts_out_the_device_and_its_unused_tokens_until_a_fresh_one(store: Store) -> None:
    enrolled(store, "edge", "aa")
    leaked, _ = store.create_token("edge")
    other, _ = store.create_token("other")
    store.revoke("edge")
    assert store.device("edge").revoked
    with pytest.raises(NotEnrolled, match="device edge is revoked"):
        store.check_certificate("edge", "aa")
    with pytest.raises(NotEnrolled, match="not known"):
        store.redeem_token(leaked, "bb")
    assert store.redeem_token(other, "cc") == "other"
    enrolled(store, "edge", "dd")
    store.check_certificate("edge", "dd")
    assert not store.device("edge").revoked


def test_unknown_devices(store: Store) -> None:
    with pytest.raises(NotEnrolled, match="device edge is not known"):
        store.check_certificate("edge", "aa")
    for call in (store.device, store.revoke, store.seen):
        with pytest.raises(NotFound, match="isthmus devices"):
            call("edge")
    with pytest.raises(NotFound, match="isthmus devices"):
        store.record_device("edge", pb.Profile())


def test_what_a_device_says_of_itself_is_kept(store: Store, clock: Clock) -> None:
    enrolled(store, "edge", "aa")
    assert store.device("edge") == pb.Device(name="edge", profile=pb.Profile())
    profile = pb.Profile(
        version="0.1.0",
        cores=4,
        memory_bytes=2**40,
        datasets=[pb.Dataset(name="notes", bytes=2**33)],
        task_kinds=["train"],
    )
    store.record_device("edge", profile)
    assert store.device("edge") == pb.Device(name="edge", last_seen=clock.now, profile=profile)
    store.seen("edge", clock.now + 5)
    assert store.device("edge").last_seen == clock.now + 5


# ---- Jobs and events ----


def test_a_job_is_kept_as_it_was_submitted_and_updated(store: Store, clock: Clock) -> None:
    spec = pb.JobSpec(method="splitlora", model="default", devices=["b", "a"], training='{"rank": 8}')
    job = store.create_job(spec)
    assert len(job) == 8
    assert store.job(job) == pb.Job(id=job, spec=spec, state=pb.WAITING, created=clock.now)
    store.update_job(job, state=pb.RUNNING, step=3, steps=10, devices=["a", "b"], report='{"x": 1}')
    store.update_job(job, message="going on", checkpoint_step=2)
    assert store.job(job) == pb.Job(
        id=job, spec=spec, state=pb.RUNNING, message="going on", created=clock.now,
        step=3, steps=10, checkpoint_step=2, devices=["a", "b"], report='{"x": 1}',
    )  # fmt: skip


def test_an_id_that_the_store_made_can_be_a_part_of_a_path(store: Store) -> None:
    for _ in range(20):
        job = store.create_job(pb.JobSpec())
        assert check_name(job, "a job's id") == job
        assert check_name(f"{job}-{secrets.token_hex(4)}", "a task's id")


@pytest.mark.parametrize("name", ["../state", "/etc", "", "k3v9x2ab/..", "x" * 10_000_000])
def test_what_is_no_id_is_not_looked_up(store: Store, name: str) -> None:
    for call in (store.job, store.device, store.revoke):
        with pytest.raises(BadRequest, match="is not a ") as refused:
            call(name)
        assert len(str(refused.value)) < 400


def test_unknown_jobs_and_columns(store: Store) -> None:
    for call in (store.job, lambda job: store.update_job(job, step=1), lambda job: store.append_event(job, "log")):
        with pytest.raises(NotFound, match="isthmus jobs"):
            call("nojob")
    assert store.events("nojob") == []
    with pytest.raises(TypeError, match="spec"):
        store.update_job(store.create_job(pb.JobSpec()), spec=b"")


def test_jobs_are_listed_oldest_first(store: Store, clock: Clock) -> None:
    made = []
    for _ in range(5):
        made.append(store.create_job(pb.JobSpec()))
        clock.now += 1
    assert [job.id for job in store.jobs()] == made


def test_events_are_numbered_for_each_job_without_gaps(store: Store, clock: Clock) -> None:
    first, second = store.create_job(pb.JobSpec()), store.create_job(pb.JobSpec())
    assert [store.append_event(first, "step", "edge", {"loss": 2.5}) for _ in range(3)] == [1, 2, 3]
    assert store.append_event(second, "log") == 1
    events = store.events(first, after=1)
    assert [event.number for event in events] == [2, 3]
    assert events[0].time == clock.now
    assert (events[0].kind, events[0].device, json.loads(events[0].data)) == ("step", "edge", {"loss": 2.5})
    assert store.events(first, after=3) == []


def test_a_start_interrupts_what_was_under_way_and_nothing_else(store: Store) -> None:
    jobs = {}
    for state in pb.JobState.values()[1:]:
        jobs[state] = store.create_job(pb.JobSpec())
        store.update_job(jobs[state], state=state, message="as it was")
    under_way = {pb.WAITING, pb.PREPARING, pb.RUNNING}
    assert set(store.interrupt_running_jobs()) == {jobs[state] for state in under_way}
    for state, job in jobs.items():
        assert store.job(job).state == (pb.INTERRUPTED if state in under_way else state)
        assert ("--resume" in store.job(job).message) == (state in under_way)


# ---- The file ----


def test_reopening_keeps_everything(tmp_path: Path) -> None:
    store = Store(tmp_path / "db.sqlite")
    enrolled(store, "edge", "aa")
    store.record_device("edge", pb.Profile(cores=2))
    enrolled(store, "gone", "bb")
    store.revoke("gone")
    unused, _ = store.create_token("new")
    job = store.create_job(pb.JobSpec(model="default"))
    store.append_event(job, "state", data={"state": "WAITING"})
    before = (store.devices(), store.jobs(), store.events(job))
    store.close()
    again = Store(tmp_path / "db.sqlite")
    assert (again.devices(), again.jobs(), again.events(job)) == before
    assert again.redeem_token(unused, "cc") == "new"
    again.check_certificate("edge", "aa")
    again.close()


def test_another_process_on_the_file_sees_what_was_answered(tmp_path: Path) -> None:
    store = Store(tmp_path / "db.sqlite")
    job = store.create_job(pb.JobSpec())
    other = Store(tmp_path / "db.sqlite")
    assert other.job(job).id == job
    store.close()
    other.close()


def test_the_files_are_only_for_the_owner(tmp_path: Path) -> None:
    store = Store(tmp_path / "db.sqlite")
    store.create_token("edge")
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
    store.close()


def test_a_damaged_file_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite"
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(WrongState, match="restore it from a backup") as caught:
        Store(path)
    assert "\n" not in str(caught.value)


def test_a_newer_file_and_a_strangers_file_are_left_alone(tmp_path: Path) -> None:
    for name, statement, message in [
        ("newer", "PRAGMA user_version = 99", "newer isthmus .schema 99"),
        ("stranger", "CREATE TABLE recipes (cake)", "another program"),
    ]:
        with sqlite3.connect(tmp_path / name) as connection:
            connection.execute(statement)
        connection.close()
        with pytest.raises(WrongState, match=message):
            Store(tmp_path / name)


def test_a_folder_that_is_not_there_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(WrongState, match="No such file"):
        Store(tmp_path / "nowhere" / "db.sqlite")
