"""Which devices may come in: one-time tokens, and what is known of each enrolled device."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from google.protobuf.json_format import MessageToDict, ParseDict

from isthmus.coordinator.control.schema import DatabaseFile, devices, tokens
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest, NotEnrolled, NotFound
from isthmus.split.tls import check_name

DEFAULT_TOKEN_LIFETIME = 3600.0
MAX_TOKEN_LIFETIME = 30 * 86400.0


class DeviceTable:
    """clock: seconds since the epoch."""

    def __init__(self, file: DatabaseFile, clock: Callable[[], float]) -> None:
        self._file, self._clock = file, clock

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
        with self._file.write() as connection:
            # Old ones are kept for a while, to tell "used" and "expired" from "never existed".
            connection.execute(tokens.delete().where(tokens.c.expires < now - MAX_TOKEN_LIFETIME))
            connection.execute(tokens.insert().values(digest=_digest(secret), name=name, expires=now + lifetime))
        return secret, now + lifetime

    def token_name(self, secret: str) -> str:
        """For whom a token is, without using it. Raises NotEnrolled saying what is wrong with it."""
        return self._valid_token(self._file.rows(_token_query(secret)))

    def redeem_token(self, secret: str, serial: str) -> str:
        """Use a token for the certificate with this serial; returns the device's name.

        In one transaction, so of two that race with one token exactly one gets a certificate that is valid.
        From here on only that certificate is, and a revocation is over. Raises NotEnrolled.
        """
        with self._file.write() as connection:
            name = self._valid_token(list(connection.execute(_token_query(secret))))
            connection.execute(tokens.update().where(tokens.c.digest == _digest(secret)).values(serial=serial))
            known = devices.update().where(devices.c.name == name).values(serial=serial, revoked=False)
            if not connection.execute(known).rowcount:
                connection.execute(devices.insert().values(name=name, serial=serial))
        return name

    def _valid_token(self, found: list[sa.Row[Any]]) -> str:
        """The device's name, of the token that was looked up. Raises NotEnrolled."""
        token = found[0] if found else None
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

    def get(self, name: str) -> pb.Device:
        """Raises NotFound. `connected` and `job` are left empty: they are not the file's to know."""
        return _device_to_proto(self._row(name))

    def all(self) -> list[pb.Device]:
        """All that were ever enrolled, by name."""
        return [_device_to_proto(row) for row in self._file.rows(sa.select(devices).order_by(devices.c.name))]

    def _row(self, name: str) -> sa.Row[Any]:
        rows = self._file.rows(sa.select(devices).where(devices.c.name == name))
        if not rows:
            raise NotFound(f"no device {name!r}: `isthmus devices` lists them")
        return rows[0]

    def record(self, name: str, profile: pb.Profile) -> None:
        """Keep what an enrolled device said about itself, and that it was seen now."""
        values = {"profile": MessageToDict(profile), "last_seen": self._clock()}
        self._update_device(name, values)

    def seen(self, name: str, when: float | None = None) -> None:
        """when: seconds since the epoch; None: now."""
        self._update_device(name, {"last_seen": self._clock() if when is None else when})

    def revoke(self, name: str) -> None:
        """Put a device out, and with it the tokens for its name that are not used yet. Raises NotFound."""
        with self._file.write() as connection:
            unused = (tokens.c.name == name) & tokens.c.serial.is_(None)
            withdrawn = connection.execute(tokens.delete().where(unused)).rowcount
            known = connection.execute(devices.update().where(devices.c.name == name).values(revoked=True)).rowcount
        if not known and not withdrawn:
            raise NotFound(f"no device {name!r}: `isthmus devices` lists them")

    def check_certificate(self, name: str, serial: str) -> None:
        """Raises NotEnrolled unless this is the present certificate of a device that is not revoked."""
        rows = self._file.rows(sa.select(devices.c.serial, devices.c.revoked).where(devices.c.name == name))
        anew = f"enrol it again with a token from `isthmus enroll {name}`"
        if not rows:
            raise NotEnrolled(f"device {name} is not known to this coordinator: {anew}")
        if rows[0].revoked:
            raise NotEnrolled(f"device {name} is revoked: to let it in again, {anew}")
        if rows[0].serial != serial:
            raise NotEnrolled(f"device {name} was enrolled again since this certificate was made: {anew}")

    def _update_device(self, name: str, values: Mapping[str, Any]) -> None:
        with self._file.write() as connection:
            if not connection.execute(devices.update().where(devices.c.name == name).values(**values)).rowcount:
                raise NotFound(f"no device {name!r}: `isthmus devices` lists them")


def _token_query(secret: str) -> sa.Select[Any]:
    # The look-up compares SHA-256 digests of 192 random bits: what its timing tells about a digest is of no use
    # to someone who would have to find a secret with that digest.
    return sa.select(tokens).where(tokens.c.digest == _digest(secret))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _device_to_proto(row: sa.Row[Any]) -> pb.Device:
    # Unknown fields are those of a version before this one.
    profile = ParseDict(row.profile, pb.Profile(), ignore_unknown_fields=True)
    return pb.Device(name=row.name, revoked=row.revoked, last_seen=row.last_seen, profile=profile)
