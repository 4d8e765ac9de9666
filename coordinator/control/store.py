"""What the coordinator must not forget: tokens, devices, jobs and their events, in one SQLite file.

Write-ahead logging with a full sync: what was answered to anybody is on the disk. Every transaction begins with
`BEGIN IMMEDIATE`, so what it read still holds when it writes, also with two processes on the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import string
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from google.protobuf.json_format import MessageToDict, ParseDict
from sqlalchemy.exc import DatabaseError, IntegrityError

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest, NotEnrolled, NotFound, WrongState
from isthmus.split.tls import check_name

SCHEMA = 1
"""In the file's `user_version`. A change of the tables below raises it and says here how to get there."""

DEFAULT_TOKEN_LIFETIME = 3600.0
MAX_TOKEN_LIFETIME = 30 * 86400.0

_metadata = sa.MetaData()
_tokens = sa.Table(
    "tokens",
    _metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),  # SHA-256 of the secret, which is nowhere
    sa.Column("name", sa.String, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("serial", sa.String),  # of the certificate it was used for; NULL: not used
)
_devices = sa.Table(
    "devices",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("serial", sa.String, nullable=False),  # of the one certificate that is valid
    sa.Column("revoked", sa.Boolean, nullable=False, default=False),
    sa.Column("last_seen", sa.Float, nullable=False, default=0.0),
    sa.Column("profile", sa.JSON, nullable=False, default=dict),
)
_jobs = sa.Table(
    "jobs",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("spec", sa.LargeBinary, nullable=False),  # serialised JobSpec
    sa.Column("state", sa.Integer, nullable=False, default=int(pb.WAITING)),
    sa.Column("message", sa.String, nullable=False, default=""),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("step", sa.Integer, nullable=False, default=0),
    sa.Column("steps", sa.Integer, nullable=False, default=0),
    sa.Column("checkpoint_step", sa.Integer, nullable=False, default=0),
    sa.Column("report", sa.String, nullable=False, default=""),
    sa.Column("devices", sa.JSON, nullable=False, default=list),
)
_events = sa.Table(
    "events",
    _metadata,
    sa.Column("job", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # from 1, without gaps
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("device", sa.String, nullable=False),
    sa.Column("data", sa.String, nullable=False),
)
_JOB_COLUMNS = {"state", "message", "step", "steps", "checkpoint_step", "report", "devices"}
_ALIVE = (int(pb.WAITING), int(pb.PREPARING), int(pb.RUNNING))


class Store:
    """The file at `path`, made if it is not there. clock: seconds since the epoch.

    Raises WrongState if the file is damaged, not the coordinator's, or of a newer version.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # the log files beside it get the same mode
        except OSError as error:
            raise WrongState(f"{path} cannot be used as the coordinator's database: {error.strerror}") from error
        # hide_parameters: an exception's text, and so the log, never has a value from a statement in it.
        self._engine = sa.create_engine(f"sqlite:///{path}", hide_parameters=True)
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        try:
            self._create_tables(path)
        except DatabaseError as error:
            self.close()
            raise WrongState(
                f"{path} cannot be read as the coordinator's database ({error.orig}): restore it from a backup, or "
                "move it away to start without its devices and jobs"
            ) from error

    def _create_tables(self, path: Path) -> None:
        with self._write() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
            if version > SCHEMA:
                raise WrongState(
                    f"{path} was written by a newer isthmus (schema {version}; this one knows {SCHEMA}): upgrade it"
                )
            if version == 0 and tables:
                raise WrongState(f"{path} is the database of another program: choose another state folder")
            if connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one() != "ok":
                raise WrongState(f"{path} is damaged: restore it from a backup, or move it away")
            _metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self._engine.begin() as connection:
            yield connection

    def _rows(self, query: sa.Select[Any]) -> list[sa.Row[Any]]:
        with self._engine.connect() as connection:
            return list(connection.execute(query))

    # ---- Tokens ----

    def create_token(self, name: str, lifetime: float = 0.0) -> tuple[str, float]:
        """A new secret (32 characters, kept nowhere) that enrols `name` once, and when it expires (epoch seconds).

        lifetime: seconds; 0 means an hour. The device may exist already: it is then enrolled anew.
        """
        check_name(name)
        lifetime = lifetime or DEFAULT_TOKEN_LIFETIME
        if not 0 < lifetime <= MAX_TOKEN_LIFETIME:
            raise BadRequest(
                f"a token lives for more than 0 and at most {MAX_TOKEN_LIFETIME:.0f} s, not {lifetime:g} s"
            )
        secret, now = secrets.token_urlsafe(24), self._clock()
        with self._write() as connection:
            # Old ones are kept for a while, to tell "used" and "expired" from "never existed".
            connection.execute(_tokens.delete().where(_tokens.c.expires < now - MAX_TOKEN_LIFETIME))
            connection.execute(_tokens.insert().values(digest=_digest(secret), name=name, expires=now + lifetime))
        return secret, now + lifetime

    def token_name(self, secret: str) -> str:
        """For whom a token is, without using it. Raises NotEnrolled saying what is wrong with it."""
        with self._engine.connect() as connection:
            return self._valid_token(connection, secret)

    def redeem_token(self, secret: str, serial: str) -> str:
        """Use a token for the certificate with this serial; returns the device's name.

        In one transaction, so of two that race with one token exactly one gets a certificate that is valid.
        From here on only that certificate is, and a revocation is over. Raises NotEnrolled.
        """
        with self._write() as connection:
            name = self._valid_token(connection, secret)
            connection.execute(_tokens.update().where(_tokens.c.digest == _digest(secret)).values(serial=serial))
            known = _devices.update().where(_devices.c.name == name).values(serial=serial, revoked=False)
            if not connection.execute(known).rowcount:
                connection.execute(_devices.insert().values(name=name, serial=serial))
        return name

    def _valid_token(self, connection: sa.Connection, secret: str) -> str:
        # The look-up compares SHA-256 digests of 192 random bits: what its timing tells about a digest is of no use
        # to someone who would have to find a secret with that digest.
        query = sa.select(_tokens).where(_tokens.c.digest == _digest(secret))
        token = connection.execute(query).one_or_none()
        if token is None:
            raise NotEnrolled("this token is not known here: get a new one with `isthmus enroll NAME`")
        if token.serial is not None:
            raise NotEnrolled(
                f"this token was used already: get a new one for {token.name} with `isthmus enroll {token.name}`"
            )
        if token.expires <= self._clock():
            raise NotEnrolled(
                f"this token has expired: get a new one for {token.name} with `isthmus enroll {token.name}`"
            )
        return str(token.name)

    # ---- Devices ----

    def device(self, name: str) -> pb.Device:
        """Raises NotFound, BadRequest. `connected` and `job` are left empty: they are not the file's to know."""
        return _device_to_proto(self._device(name))

    def devices(self) -> list[pb.Device]:
        """All that were ever enrolled, by name."""
        return [_device_to_proto(row) for row in self._rows(sa.select(_devices).order_by(_devices.c.name))]

    def _device(self, name: str) -> sa.Row[Any]:
        check_name(name)
        rows = self._rows(sa.select(_devices).where(_devices.c.name == name))
        if not rows:
            raise NotFound(f"no device {name!r}: `isthmus devices` lists them")
        return rows[0]

    def record_device(self, name: str, profile: pb.Profile) -> None:
        """Keep what an enrolled device said about itself, and that it was seen now."""
        values = {"profile": MessageToDict(profile), "last_seen": self._clock()}
        self._update_device(name, values)

    def seen(self, name: str, when: float | None = None) -> None:
        """when: seconds since the epoch; None: now."""
        self._update_device(name, {"last_seen": self._clock() if when is None else when})

    def revoke(self, name: str) -> None:
        """Put a device out, and with it the tokens for its name that are not used yet. Raises NotFound, BadRequest."""
        check_name(name)
        with self._write() as connection:
            unused = (_tokens.c.name == name) & _tokens.c.serial.is_(None)
            withdrawn = connection.execute(_tokens.delete().where(unused)).rowcount
            known = connection.execute(_devices.update().where(_devices.c.name == name).values(revoked=True)).rowcount
        if not known and not withdrawn:
            raise NotFound(f"no device {name!r}: `isthmus devices` lists them")

    def check_certificate(self, name: str, serial: str) -> None:
        """Raises NotEnrolled unless this is the present certificate of a device that is not revoked."""
        rows = self._rows(sa.select(_devices.c.serial, _devices.c.revoked).where(_devices.c.name == name))
        anew = f"enrol it again with a token from `isthmus enroll {name}`"
        if not rows:
            raise NotEnrolled(f"device {name} is not known to this coordinator: {anew}")
        if rows[0].revoked:
            raise NotEnrolled(f"device {name} is revoked: to let it in again, {anew}")
        if rows[0].serial != serial:
            raise NotEnrolled(f"device {name} was enrolled again since this certificate was made: {anew}")

    def _update_device(self, name: str, values: Mapping[str, Any]) -> None:
        with self._write() as connection:
            if not connection.execute(_devices.update().where(_devices.c.name == name).values(**values)).rowcount:
                raise NotFound(f"no device {name!r}: `isthmus devices` lists them")

    # ---- Jobs ----

    def create_job(self, spec: pb.JobSpec) -> str:
        """A new job in state WAITING; returns its id, 8 lower-case letters and digits."""
        values = {"spec": spec.SerializeToString(), "created": self._clock()}
        while True:
            job = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
            try:
                with self._write() as connection:
                    connection.execute(_jobs.insert().values(id=job, **values))
            except IntegrityError:  # the id is taken
                continue
            return job

    def job(self, job: str) -> pb.Job:
        """Raises NotFound; BadRequest for what is no job's id."""
        check_name(job, "a job's id")
        rows = self._rows(sa.select(_jobs).where(_jobs.c.id == job))
        if not rows:
            raise _no_job(job)
        return _job_to_proto(rows[0])

    def jobs(self) -> list[pb.Job]:
        """All, oldest first."""
        return [_job_to_proto(row) for row in self._rows(sa.select(_jobs).order_by(_jobs.c.created, _jobs.c.id))]

    def update_job(self, job: str, **columns: Any) -> None:
        """Set any of state, message, step, steps, checkpoint_step, report (JSON text), devices (list of names)."""
        if not columns or not columns.keys() <= _JOB_COLUMNS:
            raise TypeError(f"not columns of a job: {sorted(columns.keys() - _JOB_COLUMNS)}")
        with self._write() as connection:
            if not connection.execute(_jobs.update().where(_jobs.c.id == job).values(**columns)).rowcount:
                raise _no_job(job)

    def interrupt_running_jobs(self) -> list[str]:
        """At start: what an earlier coordinator left WAITING, PREPARING or RUNNING is INTERRUPTED; returns the ids."""
        message = "the coordinator stopped; go on with `isthmus finetune --resume`"
        alive = _jobs.c.state.in_(_ALIVE)
        update = _jobs.update().where(alive).values(state=int(pb.INTERRUPTED), message=message)
        with self._write() as connection:
            jobs = [str(job) for job in connection.execute(sa.select(_jobs.c.id).where(alive)).scalars()]
            connection.execute(update)
        return jobs

    # ---- Events ----

    def append_event(self, job: str, kind: str, device: str = "", data: Mapping[str, Any] | None = None) -> int:
        """Returns the event's number in its job, from 1. data: what JSON can hold. Raises NotFound."""
        text = json.dumps(dict(data or {}), allow_nan=False)
        last = sa.select(sa.func.coalesce(sa.func.max(_events.c.number), 0)).where(_events.c.job == job)
        with self._write() as connection:
            number = int(connection.execute(last).scalar_one()) + 1
            values = {"job": job, "number": number, "time": self._clock(), "kind": kind, "device": device, "data": text}
            try:
                connection.execute(_events.insert().values(**values))
            except IntegrityError as error:
                raise _no_job(job) from error
        return number

    def events(self, job: str, after: int = 0) -> list[pb.JobEvent]:
        """Those with a number above `after`, in order."""
        query = sa.select(_events).where(_events.c.job == job, _events.c.number > after).order_by(_events.c.number)
        return [_event_to_proto(row) for row in self._rows(query)]


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver starts no transaction on its own: the "begin" event does
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 10000"):
        connection.execute(f"PRAGMA {pragma}")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _no_job(job: str) -> NotFound:
    return NotFound(f"no job {job!r}: `isthmus jobs` lists them")


def _device_to_proto(row: sa.Row[Any]) -> pb.Device:
    # Unknown fields are those of a version before this one.
    profile = ParseDict(row.profile, pb.Profile(), ignore_unknown_fields=True)
    return pb.Device(name=row.name, revoked=row.revoked, last_seen=row.last_seen, profile=profile)


def _job_to_proto(row: sa.Row[Any]) -> pb.Job:
    return pb.Job(
        id=row.id,
        spec=pb.JobSpec.FromString(row.spec),
        state=row.state,
        message=row.message,
        created=row.created,
        step=row.step,
        steps=row.steps,
        checkpoint_step=row.checkpoint_step,
        report=row.report,
        devices=row.devices,
    )


def _event_to_proto(row: sa.Row[Any]) -> pb.JobEvent:
    return pb.JobEvent(number=row.number, time=row.time, kind=row.kind, device=row.device, data=row.data)
