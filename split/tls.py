"""Who is who on the wire: enrolment tokens, certificates and keys as files, and gRPC channels over mutual TLS.

Both sides of every connection have a certificate of the coordinator's own authority. Servers are checked by one
fixed logical name (`SERVER_NAME`) and not by host name or address: coordinators and stage actors move between
machines and sit behind forwarded ports, so an address in a certificate would be wrong as soon as it is
written, and it is the private authority, pinned by the token, that says who may be the server.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import ssl
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.x509.oid import NameOID

from isthmus.split.errors import BadRequest, IsthmusError, LinkLost, NotEnrolled, NotFound, WrongState, from_status
from isthmus.split.printable import printable

SERVER_NAME = "coordinator.isthmus"
"""The name in the certificate of every server but the enrolment server."""

ENROLMENT_NAME = "enrolment.isthmus"
"""The name in the authority's own certificate, with which the enrolment server shows itself."""

COORDINATOR, STAGE, DEVICE, ADMIN = "coordinator", "stage", "device", "admin"
"""The roles that a certificate can have. `ADMIN` is whoever may submit jobs and revoke devices."""

_OLD_ROLES = {"user": ADMIN}
"""What version 0.1 wrote into certificates that are still valid, and the role that each stands for."""

MAX_MESSAGE_BYTES = 64 * 2**20
"""The largest message, both ways, on both sides. gRPC's own 4 MiB are too few for a batch of hidden states."""

# A peer that went away without a word (power, radio, NAT) is noticed 10 s + 10 s after its last sign of life.
_KEEPALIVE: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SIZES: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    *_KEEPALIVE,
    *_SIZES,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # else the clients' pings count as abuse
    ("grpc.so_reuseport", 0),  # a port that is taken has to be an error, not half of the connections
]
"""The options of every server: `grpc.aio.server(options=SERVER_OPTIONS)`."""


def _channel_options(server_name: str) -> list[tuple[str, Any]]:
    """Options of a channel to the server of this logical name."""
    return [
        *_KEEPALIVE,
        *_SIZES,
        ("grpc.ssl_target_name_override", server_name),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 5_000),  # callers back off themselves; gRPC's 2 minutes would hide them
        ("grpc.enable_http_proxy", 0),  # a proxy for web pages breaks long streams, and loopback above all
    ]


# ---- Names and addresses ----

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def check_name(name: str, what: str = "a name") -> str:
    """Return the name of a device or administrator, or the id of a job, task or session, unchanged.

    Whatever passes can be a part of a path and stand in a line of a log. All ids that a coordinator or a device makes
    pass. Raises BadRequest for anything else, in which it is called `what`.
    """
    if not _NAME.fullmatch(name):
        raise BadRequest(f"{name[:80]!r} is not {what}: use 1 to 63 of a-z, 0-9 and -, a letter or digit first")
    return name


def split_address(address: str) -> tuple[str, int]:
    """Split `HOST:PORT` or `[IPV6]:PORT` into (host without brackets, port). Raises BadRequest."""
    host, colon, digits = address.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    port = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 5 else 0
    if not colon or not host or (":" in host and not bracketed) or not 0 < port < 65536:
        raise BadRequest(f"{address!r} is not HOST:PORT (an IPv6 address goes in brackets: [::1]:7000)")
    return host, port


def join_address(host: str, port: int) -> str:
    """Join what `split_address` splits."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ---- The token ----


def pin_of(certificate: bytes) -> bytes:
    """Compute the SHA-256 of a PEM certificate's DER bytes, 32 bytes."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode("ascii"))).digest()


_TOKEN = re.compile(r"ist1\.([A-Za-z0-9_-]{32})\.([A-Za-z0-9_-]{43})\.([1-9][0-9]{0,4})")


@dataclass(frozen=True)
class EnrolmentToken:
    """What a device needs to enrol: the right to do so once, and which coordinator to trust.

    It is printed as `ist1.<secret>.<pin>.<port>`, in letters that survive shells, chat windows and double clicks.
    """

    secret: str = field(repr=False)
    """24 random bytes, base64url: 32 characters."""
    pin: bytes
    """`pin_of` the authority's certificate."""
    port: int
    """The enrolment server's port, on the coordinator's host."""

    def format(self) -> str:
        """Write the token as it is printed."""
        pin = base64.urlsafe_b64encode(self.pin).rstrip(b"=").decode()
        return f"ist1.{self.secret}.{pin}.{self.port}"

    @classmethod
    def parse(cls, text: str) -> EnrolmentToken:
        """Read a printed token. Raises BadRequest; the message never repeats the text, which may end up in a log."""
        text = text.strip()
        if not text.startswith("ist1."):
            raise BadRequest(
                "this is not an enrolment token: one begins with ist1. and is printed by `isthmus enroll NAME`"
            )
        match = _TOKEN.fullmatch(text)
        if match is None or int(match[3]) > 65535:
            raise BadRequest(
                f"the token is damaged ({len(text)} characters, {text.count('.')} of 3 dots): copy all of it again"
            )
        try:
            token = cls(match[1], base64.b64decode(match[2] + "=", altchars=b"-_", validate=True), int(match[3]))
        except binascii.Error as error:
            raise BadRequest("the token is damaged: copy all of it again") from error
        if token.format() != text:  # stray bits in the last letter: it was typed wrong
            raise BadRequest("the token is damaged: copy all of it again")
        return token


# ---- Files ----


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file at once and durably: a crash leaves the old file or the new one, and nobody else can read it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner can enter (0700), or make an existing one so."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise BadRequest(f"{path} cannot be used as a folder for keys: {error.strerror}; choose another") from error
    return path


@dataclass(frozen=True)
class Credentials:
    """A certificate with its key, and the authority that the other side is checked against; all PEM."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> Credentials:
        """Read ca.pem, cert.pem and key.pem. Raises NotFound naming the file that cannot be read."""
        try:
            return cls(*((folder / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")))
        except OSError as error:
            raise NotFound(f"no credentials in {folder}: {error.filename}: {error.strerror}") from error

    def save(self, folder: Path) -> None:
        """Write ca.pem, cert.pem and key.pem to a folder of mode 0700, each 0600."""
        private_folder(folder)
        write_private(folder / "key.pem", self.key)
        write_private(folder / "cert.pem", self.certificate)
        write_private(folder / "ca.pem", self.ca)


# ---- Channels and servers ----


def _channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)


def channel(address: str, credentials: Credentials) -> grpc.Channel:
    """Make a blocking channel to the server at HOST:PORT; nothing is dialled before the first call."""
    return grpc.secure_channel(address, _channel_credentials(credentials), _channel_options(SERVER_NAME))


def aio_channel(address: str, credentials: Credentials) -> grpc.aio.Channel:
    """Make a channel for asyncio to the server at HOST:PORT; nothing is dialled before the first call."""
    return grpc.aio.secure_channel(address, _channel_credentials(credentials), _channel_options(SERVER_NAME))


def enrolment_channel(address: str, ca: bytes) -> grpc.Channel:
    """Make a channel to the enrolment server, for a caller that has no certificate yet. ca: PEM, known by the pin."""
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca), _channel_options(ENROLMENT_NAME))


def server_credentials(certificate: bytes, key: bytes, ca: bytes) -> grpc.ServerCredentials:
    """Make the credentials of a server that talks only to clients with a certificate of the authority."""
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)


def bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials) -> int:
    """Listen on host:port (0: any free port) and return the port. Raises WrongState if that cannot be."""
    try:
        bound = server.add_secure_port(join_address(host, port), credentials)
    except RuntimeError as error:
        raise WrongState(
            f"cannot listen on {join_address(host, port)}: the port is taken, or the address is not this machine's; "
            "choose another (port 0 takes any free one)"
        ) from error
    return int(bound)


def bind_one_of(server: grpc.aio.Server, host: str, ports: tuple[int, int], credentials: grpc.ServerCredentials) -> int:
    """Listen on the first free port from ports[0] to ports[1], or on any with (0, 0). Raises WrongState if none is."""
    first, last = ports
    for port in range(first, last):
        try:
            return bind(server, host, port, credentials)
        except WrongState:
            continue
    return bind(server, host, last, credentials)


_BROKE_OFF = ("Internal error from Core", "Received RST_STREAM")
"""Lines that gRPC itself gives where no server has answered.

The first is grpc.aio's word for a message that could not be written; it takes the place of the status with which the
stream ended, even of a server's."""


def error_of(error: grpc.RpcError, address: str) -> IsthmusError:
    """Turn a failed call into the error that the server raised, or into one line about the connection."""
    assert isinstance(error, (grpc.Call, grpc.aio.AioRpcError))
    status = error.code()
    line = printable(" ".join((error.details() or "no details").split()))
    if status is grpc.StatusCode.UNAVAILABLE:
        reason = line.rpartition("last error: ")[2]
        if "CERTIFICATE_VERIFY_FAILED" in reason or "Hostname Verification" in reason:
            return NotEnrolled(f"{address} is not the coordinator that this certificate is from: check the address")
        if reason != line and any(sign in reason for sign in ("Socket closed", "reset by peer", "alert")):
            # In TLS 1.3 a server refuses a certificate after the client's handshake is over: it just hangs up.
            return LinkLost(
                f"the coordinator at {address} hung up at once: it does not take this certificate (missing, expired "
                "or another coordinator's: enrol again), or it is stopping"
            )
        return LinkLost(f"the coordinator at {address} cannot be reached: {reason}")
    if status in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return LinkLost(f"the coordinator at {address} did not answer: {line}")
    if status is grpc.StatusCode.INTERNAL and line.startswith(_BROKE_OFF):
        return LinkLost(f"the stream to the coordinator at {address} broke off: {line}")
    return from_status(status.name, line)


# ---- Who called ----


@dataclass(frozen=True)
class Peer:
    """The other side of a connection, as its verified certificate says."""

    name: str
    role: str
    """`COORDINATOR`, `STAGE`, `DEVICE` or `ADMIN`; of another authority's certificate any text."""
    serial: str
    """The certificate's serial number, in hexadecimal."""


def peer_of(auth_context: Mapping[str, Iterable[bytes]]) -> Peer:
    """Read who called from `context.auth_context()` of a server with `server_credentials`. Raises NotEnrolled."""
    certificates = list(auth_context.get("x509_pem_cert", ()))
    if not certificates:
        raise NotEnrolled("this call needs a certificate: enrol the device first (`isthmus enroll NAME`)")
    return _peer(certificates[0])


@lru_cache(maxsize=1024)  # asked at every call; a fleet has a few certificates
def _peer(pem: bytes) -> Peer:
    certificate = x509.load_pem_x509_certificate(pem)
    names, roles = (
        [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(oid)]
        for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME)
    )
    if len(names) != 1 or len(roles) != 1:
        raise NotEnrolled("the certificate names nobody: it was not made by this coordinator's enrolment")
    return Peer(names[0], _OLD_ROLES.get(roles[0], roles[0]), f"{certificate.serial_number:x}")
