"""What the coordinator must not forget: tokens, devices, jobs and their events, in one SQLite file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import DatabaseError

from isthmus.coordinator.control.devices import DeviceTable
from isthmus.coordinator.control.events import EventTable
from isthmus.coordinator.control.jobs import JobTable
from isthmus.coordinator.control.migration import migrate
from isthmus.coordinator.control.schema import SCHEMA, DatabaseFile, metadata
from isthmus.split.errors import WrongState


class Database:
    """The file at `path`, made if it is not there. clock: seconds since the epoch.

    Raises WrongState if the file is damaged, not the coordinator's, or of a newer version.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # the log files beside it get the same mode
        except OSError as error:
            raise WrongState(f"{path} cannot be used as the coordinator's database: {error.strerror}") from error
        self._file = DatabaseFile(path)
        try:
            self._create_tables(path)
        except WrongState:
            self.close()
            raise
        except DatabaseError as error:
            self.close()
            raise WrongState(
                f"{path} cannot be read as the coordinator's database ({error.orig}): restore it from a backup, or "
                "move it away to start without its devices and jobs"
            ) from error
        self.devices = DeviceTable(self._file, clock)
        self.jobs = JobTable(self._file, clock)
        self.events = EventTable(self._file, clock)

    def _create_tables(self, path: Path) -> None:
        with self._file.write() as connection:
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
            migrate(connection, path, version)
            metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")

    def close(self) -> None:
        self._file.close()
