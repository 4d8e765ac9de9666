"""The tables of the coordinator's database, and its file's connections.

Write-ahead logging with a full sync: what was answered to anybody is on the disk. Every transaction begins with
`BEGIN IMMEDIATE`, so what it read still holds when it writes, also with two processes on the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from isthmus.protos.v1 import coordinator_pb2 as pb

SCHEMA = 2
"""In the file's `user_version`. A change of the tables below raises it, and `migration.py` says how to get there."""

metadata = sa.MetaData()
tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),  # SHA-256 of the secret, which is nowhere
    sa.Column("name", sa.String, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("serial", sa.String),  # of the certificate it was used for; NULL: not used
)
devices = sa.Table(
    "devices",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("serial", sa.String, nullable=False),  # of the one certificate that is valid
    sa.Column("revoked", sa.Boolean, nullable=False, default=False),
    sa.Column("last_seen", sa.Float, nullable=False, default=0.0),
    sa.Column("profile", sa.JSON, nullable=False, default=dict),
)
jobs = sa.Table(
    "jobs",
    metadata,
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
events = sa.Table(
    "events",
    metadata,
    sa.Column("job", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # from 1, without gaps
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("kind", sa.String, nullable=False),  # as in Event's oneof
    sa.Column("device", sa.String, nullable=False),
    sa.Column("event", sa.LargeBinary, nullable=False),  # serialised Event; the columns before it are for queries
)


class DatabaseFile:
    """Transactions on one SQLite file."""

    def __init__(self, path: Path) -> None:
        # hide_parameters: an exception's text, and so the log, never has a value from a statement in it.
        self._engine = sa.create_engine(f"sqlite:///{path}", hide_parameters=True)
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction."""
        with self._engine.begin() as connection:
            yield connection

    def rows(self, query: sa.Select[Any]) -> list[sa.Row[Any]]:
        with self._engine.connect() as connection:
            return list(connection.execute(query))

    def close(self) -> None:
        self._engine.dispose()


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver starts no transaction on its own: the "begin" event does
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 10000"):
        connection.execute(f"PRAGMA {pragma}")
