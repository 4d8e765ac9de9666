"""Who this device is: its key, its certificate, and the coordinator that it belongs to, in its state folder.

The files are ca.pem, cert.pem, key.pem (0600) and coordinator.json. The last is written last and removed first, so that
the other three belong together while it is there.
"""

from __future__ import annotations

import datetime
import hmac
import json
import ssl
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import coordinator_pb2_grpc as rpc
from isthmus.split.errors import IsthmusError, LinkLost, NotEnrolled, WrongState
from isthmus.split.tls import (
    Credentials,
    EnrolmentToken,
    check_name,
    enrolment_channel,
    error_of,
    join_address,
    pin_of,
    private_folder,
    split_address,
    write_private,
)

_TIMEOUT = 20.0  # seconds for each of the two calls


@dataclass(frozen=True)
class Identity:
    """A device that is enrolled."""

    state: Path
    name: str
    host: str
    port: int
    """The port of the coordinator's control server."""
    credentials: Credentials

    @property
    def address(self) -> str:
        """HOST:PORT of the control server."""
        return join_address(self.host, self.port)

    @classmethod
    def open(cls, state: Path) -> Identity | None:
        """The identity in a state folder, or None if there is none yet.

        Raises NotEnrolled for an identity that cannot be used: damaged files, an expired certificate.
        """
        again = "enrol this device again with a token from `isthmus enroll NAME`"
        try:
            saved = json.loads((state / "coordinator.json").read_text())
            name, host, port = check_name(saved["name"]), str(saved["host"]), int(saved["port"])
            identity = cls(state, name, host, port, Credentials.load(state))
            expires = _check(identity.credentials)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, IsthmusError) as error:
            raise NotEnrolled(f"the identity in {state} is damaged ({error}): {again}") from error
        if expires < datetime.datetime.now(datetime.UTC):
            raise NotEnrolled(f"the certificate in {state} expired on {expires:%Y-%m-%d}: {again}")
        return identity

    def moved_to(self, coordinator: str) -> Identity:
        """The same device, for a coordinator that is now reached at HOST:PORT; it is kept for the next start.

        Raises WrongState if the folder cannot be written.
        """
        host, port = split_address(coordinator)
        if (host, port) == (self.host, self.port):
            return self
        moved = replace(self, host=host, port=port)
        moved.save()
        return moved

    def save(self) -> None:
        """Keeps the identity in place of an earlier one. Raises WrongState if the folder cannot be written."""
        marker = self.state / "coordinator.json"
        try:
            marker.unlink(missing_ok=True)
            self.credentials.save(self.state)
            write_private(marker, json.dumps({"name": self.name, "host": self.host, "port": self.port}).encode())
        except OSError as error:
            raise WrongState(
                f"the certificate cannot be kept in {self.state}: {error.strerror}; make room, and get a new token for "
                f"{self.name}: this one is used"
            ) from error


def enrol(state: Path, coordinator: str, token: str) -> Identity:
    """Trades a token for an identity, and keeps that in the state folder in place of an earlier one.

    coordinator: HOST:PORT of the control server, as `isthmus enroll` printed it; the token says the enrolment port.

    The key is made here and never leaves. Raises BadRequest for a wrong address or token, LinkLost where nobody
    answers, NotEnrolled where another coordinator answers than the token's, or one that refuses it, and WrongState if
    the folder cannot be written.
    """
    host, port = split_address(coordinator)
    parsed = EnrolmentToken.parse(token)
    private_folder(state)  # an unusable folder has to show before the token is used
    address = join_address(host, parsed.port)
    ca = _fetch_authority(host, parsed.port)
    if not hmac.compare_digest(pin_of(ca), parsed.pin):
        raise NotEnrolled(
            f"{address} is not the coordinator that the token was made for: check the address, or get a new token"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    request = pb.EnrollRequest(token=parsed.secret, csr=csr.public_bytes(serialization.Encoding.PEM))
    with enrolment_channel(address, ca) as channel:
        try:
            reply = rpc.EnrolmentStub(channel).Enroll(request, timeout=_TIMEOUT)
        except grpc.RpcError as error:
            raise error_of(error, address) from error
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    credentials = Credentials(ca, reply.certificate, private)
    try:
        _check(credentials)
    except ValueError as error:
        raise NotEnrolled(f"the coordinator at {address} sent a certificate of no use: {error}") from error
    identity = Identity(state, check_name(reply.name), host, port, credentials)
    identity.save()
    return identity


def _fetch_authority(host: str, port: int) -> bytes:
    """The certificate (PEM) that the enrolment server shows, unverified: the caller compares it with the pin.

    Raises LinkLost where it cannot be reached.
    """
    try:
        return ssl.get_server_certificate((host, port), timeout=_TIMEOUT).encode("ascii")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise LinkLost(
            f"the coordinator's enrolment port at {join_address(host, port)} cannot be reached: {reason}; is "
            "`isthmus up` running there, and is the port open?"
        ) from error


def _check(credentials: Credentials) -> datetime.datetime:
    """Returns when the certificate expires. Raises ValueError if the three files do not belong together."""
    certificate = x509.load_pem_x509_certificate(credentials.certificate)
    key = serialization.load_pem_private_key(credentials.key, password=None)
    if certificate.public_key() != key.public_key():
        raise ValueError("the certificate is not of the key")
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(credentials.ca))
    except InvalidSignature as error:
        raise ValueError("the certificate is not of the authority") from error
    return certificate.not_valid_after_utc
