"""What the database keeps, over restarts too, and what it never keeps."""

from __future__ import annotations

import secrets
import sqlite3
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from isthmus.coordinator.control.database import Database
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1.events_pb2 import Event, StateChanged, StepDone
from isthmus.split.errors import BadRequest, NotEnrolled, NotFound, WrongState
from isthmus.split.job.events import log_line
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
def database(tmp_path: Path, clock: Clock) -> Iterator[Database]:
    opened = Database(tmp_path / "db.sqlite", clock)
    yield opened
    opened.close()


def enrolled(database: Database, name: str, serial: str) -> None:
    assert database.devices.redeem_token(database.devices.create_token(name)[0], serial) == name


# ---- Tokens ----


def test_a_token_enrols_its_device_once(database: Database, clock: Clock) -> None:
    secret, expires = database.devices.create_token("edge")
    assert expires == clock.now + 3600
    assert database.devices.token_name(secret) == "edge"
    assert database.devices.redeem_token(secret, "aa") == "edge"
    database.devices.check_certificate("edge", "aa")
    with pytest.raises(NotEnrolled, match=r"used already.*isthmus enroll edge"):
        database.devices.redeem_token(secret, "bb")
    database.devices.check_certificate("edge", "aa")


def test_a_token_expires(database: Database, clock: Clock) -> None:
    secret, _ = database.devices.create_token("edge", 60)
    clock.now += 60
    with pytest.raises(NotEnrolled, match="expired"):
        database.devices.token_name(secret)
    with pytest.raises(NotEnrolled, match="expired"):
        database.devices.redeem_token(secret, "aa")
    assert database.devices.all() == []


def test_an_unknown_token_is_refused(database: Database) -> None:
    secret, _ = database.devices.create_token("edge")
    with pytest.raises(NotEnrolled, match="not known"):
        database.devices.redeem_token(secret[:-1] + ("A" if secret[-1] != "A" else "B"), "aa")


@pytest.mark.parametrize("lifetime", [-1.0, 31 * 86400.0, float("nan"), float("inf")])
def test_lifetimes_without_sense_are_refused(database: Database, lifetime: float) -> None:
    with pytest.raises(BadRequest, match="a token lives"):
        database.devices.create_token("edge", lifetime)


def test_a_token_is_for_a_name(database: Database) -> None:
    with pytest.raises(BadRequest, match="not a name"):
        database.devices.create_token("Edge One")


def test_of_racing_enrolments_with_one_token_exactly_one_wins(tmp_path: Path) -> None:
    stores = [Database(tmp_path / "db.sqlite") for _ in range(8)]  # as eight processes would
    secret, _ = stores[0].devices.create_token("edge")

    def redeem(number: int) -> str:
        try:
            stores[number].devices.redeem_token(secret, f"{number:x}")
        except NotEnrolled as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(redeem, range(8)))
    assert answers.count("won") == 1
    assert all(answer == "won" or "used already" in answer for answer in answers)
    stores[0].devices.check_certificate("edge", f"{answers.index('won'):x}")
    for opened in stores:
        opened.close()


def test_a_secret_is_nowhere_in_the_files(tmp_path: Path) -> None:
    database = Database(tmp_path / "db.sqlite")
    secret, _ = database.devices.create_token("edge")
    database.devices.redeem_token(secret, "aa")
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}  # with the write-ahead log
    database.close()
    files["after closing"] = (tmp_path / "db.sqlite").read_bytes()
    assert b"edge" in b"".join(files.values())
    assert [name for name, content in files.items() if secret.encode() in content] == []


# ---- Devices ----


def test_enrolling_again_replaces_the_certificate(database: Database) -> None:
    enrolled(database, "edge", "aa")
    enrolled(database, "edge", "bb")
    database.devices.check_certificate("edge", "bb")
    with pytest.raises(NotEnrolled, match="enrolled again since"):
        database.devices.check_certificate("edge", "aa")
    assert len(database.devices.all()) == 1


def test_revoking_puts_out_the_device_and_its_unused_tokens_until_a_fresh_one(database: Database) -> None:
    enrolled(database, "edge", "aa")
    leaked, _ = database.devices.create_token("edge")
    other, _ = database.devices.create_token("other")
    database.devices.revoke("edge")
    assert database.devices.get("edge").revoked
    with pytest.raises(NotEnrolled, match="device edge is revoked"):
        database.devices.check_certificate("edge", "aa")
    with pytest.raises(NotEnrolled, match="not known"):
        database.devices.redeem_token(leaked, "bb")
    assert database.devices.redeem_token(other, "cc") == "other"
    enrolled(database, "edge", "dd")
    database.devices.check_certificate("edge", "dd")
    assert not database.devices.get("edge").revoked


def test_unknown_devices(database: Database) -> None:
    with pytest.raises(NotEnrolled, match="device edge is not known"):
        database.devices.check_certificate("edge", "aa")
    for call in (database.devices.get, database.devices.revoke, database.devices.seen):
        with pytest.raises(NotFound, match="isthmus devices"):
            call("edge")
    with pytest.raises(NotFound, match="isthmus devices"):
        database.devices.record("edge", pb.Profile())


def test_what_a_device_says_of_itself_is_kept(database: Database, clock: Clock) -> None:
    enrolled(database, "edge", "aa")
    assert database.devices.get("edge") == pb.Device(name="edge", profile=pb.Profile())
    profile = pb.Profile(
        version="0.1.0",
        cores=4,
        memory_bytes=2**40,
        datasets=[pb.Dataset(name="notes", bytes=2**33)],
        task_kinds=["train"],
    )
    database.devices.record("edge", profile)
    assert database.devices.get("edge") == pb.Device(name="edge", last_seen=clock.now, profile=profile)
    database.devices.seen("edge", clock.now + 5)
    assert database.devices.get("edge").last_seen == clock.now + 5


# ---- Jobs and events ----


def test_an_id_that_the_database_made_can_be_a_part_of_a_path(database: Database) -> None:
    for _ in range(20):
        job = database.jobs.create(pb.JobSpec())
        assert check_name(job, "a job's id") == job
        assert check_name(f"{job}-{secrets.token_hex(4)}", "a task's id")


@pytest.mark.parametrize("name", ["../state", "/etc", "", "k3v9x2ab/..", "x" * 10_000_000])
def test_what_is_no_id_is_not_looked_up(database: Database, name: str) -> None:
    for call in (database.jobs.get, database.devices.get, database.devices.revoke):
        with pytest.raises(BadRequest, match="is not a ") as refused:
            call(name)
        assert len(str(refused.value)) < 400


def test_a_job_is_kept_as_it_was_submitted_and_updated(database: Database, clock: Clock) -> None:
    spec = pb.JobSpec(method="splitlora", model="default", devices=["b", "a"], training='{"rank": 8}')
    job = database.jobs.create(spec)
    assert len(job) == 8
    assert database.jobs.get(job) == pb.Job(id=job, spec=spec, state=pb.WAITING, created=clock.now)
    database.jobs.update(job, state=pb.RUNNING, step=3, steps=10, devices=["a", "b"], report='{"x": 1}')
    database.jobs.update(job, message="going on", checkpoint_step=2)
    assert database.jobs.get(job) == pb.Job(
        id=job, spec=spec, state=pb.RUNNING, message="going on", created=clock.now,
        step=3, steps=10, checkpoint_step=2, devices=["a", "b"], report='{"x": 1}',
    )  # fmt: skip


def test_unknown_jobs_and_columns(database: Database) -> None:
    calls: list[Callable[[str], object]] = [
        database.jobs.get,
        lambda job: database.jobs.update(job, step=1),
        lambda job: database.events.append(job, log_line("hello")),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="isthmus jobs"):
            call("nojob")
    assert database.events.of("nojob") == []
    with pytest.raises(TypeError, match="spec"):
        database.jobs.update(database.jobs.create(pb.JobSpec()), spec=b"")


def test_jobs_are_listed_oldest_first(database: Database, clock: Clock) -> None:
    made = []
    for _ in range(5):
        made.append(database.jobs.create(pb.JobSpec()))
        clock.now += 1
    assert [job.id for job in database.jobs.all()] == made


def test_events_are_numbered_for_each_job_without_gaps(database: Database, clock: Clock) -> None:
    first, second = database.jobs.create(pb.JobSpec()), database.jobs.create(pb.JobSpec())
    told = Event(device="edge", step=StepDone(step=1, loss=2.5))
    assert [database.events.append(first, told).number for _ in range(3)] == [1, 2, 3]
    assert database.events.append(second, log_line("hello")).number == 1
    assert database.events.of(first, after=1) == [
        Event(number=number, time=clock.now, device="edge", step=told.step) for number in (2, 3)
    ]
    assert not told.number  # what was told is left alone
    assert database.events.of(first, after=3) == []


def test_a_start_interrupts_what_was_under_way_and_nothing_else(database: Database) -> None:
    jobs = {}
    for state in pb.JobState.values()[1:]:
        jobs[state] = database.jobs.create(pb.JobSpec())
        database.jobs.update(jobs[state], state=state, message="as it was")
    under_way = {pb.WAITING, pb.PREPARING, pb.RUNNING}
    assert set(database.jobs.interrupt_running()) == {jobs[state] for state in under_way}
    for state, job in jobs.items():
        assert database.jobs.get(job).state == (pb.INTERRUPTED if state in under_way else state)
        assert ("--resume" in database.jobs.get(job).message) == (state in under_way)


# ---- The file ----


def test_reopening_keeps_everything(tmp_path: Path) -> None:
    database = Database(tmp_path / "db.sqlite")
    enrolled(database, "edge", "aa")
    database.devices.record("edge", pb.Profile(cores=2))
    enrolled(database, "gone", "bb")
    database.devices.revoke("gone")
    unused, _ = database.devices.create_token("new")
    job = database.jobs.create(pb.JobSpec(model="default"))
    database.events.append(job, Event(state=StateChanged(state=pb.WAITING)))
    before = (database.devices.all(), database.jobs.all(), database.events.of(job))
    database.close()
    again = Database(tmp_path / "db.sqlite")
    assert (again.devices.all(), again.jobs.all(), again.events.of(job)) == before
    assert again.devices.redeem_token(unused, "cc") == "new"
    again.devices.check_certificate("edge", "aa")
    again.close()


def test_another_process_on_the_file_sees_what_was_answered(tmp_path: Path) -> None:
    database = Database(tmp_path / "db.sqlite")
    job = database.jobs.create(pb.JobSpec())
    other = Database(tmp_path / "db.sqlite")
    assert other.jobs.get(job).id == job
    database.close()
    other.close()


def test_the_files_are_only_for_the_owner(tmp_path: Path) -> None:
    database = Database(tmp_path / "db.sqlite")
    database.devices.create_token("edge")
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
    database.close()


def test_a_damaged_file_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite"
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(WrongState, match="restore it from a backup") as caught:
        Database(path)
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
            Database(tmp_path / name)


def test_a_folder_that_is_not_there_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(WrongState, match="No such file"):
        Database(tmp_path / "nowhere" / "db.sqlite")
