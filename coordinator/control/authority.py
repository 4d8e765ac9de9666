"""The coordinator's certificate authority: it alone says who is a server, a device or an administrator.

On disk, in the state folder (0700): ca.key and ca.pem, made on first start, and admin/ with an administrator's
client certificate. Server certificates are made afresh at every start, in memory: none expires on disk, none leaks.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.split.errors import BadRequest, WrongState
from isthmus.split.tls import (
    ADMIN,
    COORDINATOR,
    DEVICE,
    ENROLMENT_NAME,
    SERVER_NAME,
    STAGE,
    Credentials,
    check_name,
    join_address,
    pin_of,
    private_folder,
    server_credentials,
    write_private,
)

MAX_CSR_BYTES = 8192
_DAY = datetime.timedelta(days=1)
_CA_LIFE = 3650 * _DAY
_SERVER_LIFE = 3650 * _DAY  # as long as a process may run: the next start makes a new one
_CLIENT_LIFE = 365 * _DAY
_RENEW_BEFORE = 30 * _DAY
_CLOCK_SKEW = _DAY  # an edge device without a battery-backed clock may be well behind


@dataclass(frozen=True)
class Authority:
    """The key that signs every certificate. `Authority.open(state)` makes it on first start."""

    state: Path
    certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey

    @classmethod
    def open(cls, state: Path) -> Authority:
        """Load the authority of a state folder, or create it.

        The key is written first. A crash between the two files leaves a key without certificate, and the
        next start signs a new certificate for the same key.
        Raises WrongState if the files do not fit each other or the certificate has expired.
        """
        private_folder(state)
        key_file, certificate_file = state / "ca.key", state / "ca.pem"
        if not key_file.exists():
            if certificate_file.exists():
                raise WrongState(
                    f"{key_file} is missing: restore it from a backup, or move {certificate_file} away to start with a "
                    "new authority (every device then enrols again)"
                )
            write_private(key_file, _pem(ec.generate_private_key(ec.SECP256R1())))
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise WrongState(f"{key_file} cannot be read as a key: restore it from a backup") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise WrongState(f"{key_file} is not the elliptic-curve key that isthmus made: restore it from a backup")
        if not certificate_file.exists():
            write_private(certificate_file, _self_signed(key).public_bytes(serialization.Encoding.PEM), 0o644)
        try:
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        except (OSError, ValueError) as error:
            raise WrongState(f"{certificate_file} cannot be read: move it away, a start makes it again") from error
        if certificate.public_key() != key.public_key():
            raise WrongState(f"{certificate_file} is not of {key_file}: restore both from one backup")
        if certificate.not_valid_after_utc < _now():
            raise WrongState(f"{certificate_file} has expired: move it away and enrol the devices again")
        return cls(state, certificate, key)

    @property
    def ca_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def pin(self) -> bytes:
        """SHA-256 of the certificate, 32 bytes: what a token carries."""
        return pin_of(self.ca_pem)

    def sign_device(self, csr_pem: bytes, name: str) -> tuple[bytes, str]:
        """Sign a client certificate for the key of a CSR. Returns it in PEM, and its serial in hexadecimal.

        Only the key is taken from the CSR: the name comes with the token, and the subject that the device asks for is
        ignored. Raises BadRequest if the CSR is too large, unsigned, or of an unusual kind of key.
        """
        if len(csr_pem) > MAX_CSR_BYTES:
            raise BadRequest(f"the certificate request has {len(csr_pem)} bytes; at most {MAX_CSR_BYTES} are read")
        try:
            csr = x509.load_pem_x509_csr(csr_pem)
            key = csr.public_key()
            signed = csr.is_signature_valid
        except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
            raise BadRequest("the certificate request cannot be read: send a PKCS #10 request in PEM") from error
        if not signed:
            raise BadRequest("the certificate request is not signed by its own key")
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise BadRequest("the key of the certificate request has to be ECDSA P-256")
        certificate = self._sign(key, check_name(name), DEVICE, client=True)
        return certificate.public_bytes(serialization.Encoding.PEM), f"{certificate.serial_number:x}"

    def issue_server(self) -> tuple[bytes, bytes]:
        """Make a fresh server certificate and key (PEM), for this process or for a stage actor elsewhere."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), SERVER_NAME, COORDINATOR, client=False)
        return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)

    def issue_admin(self, name: str) -> Credentials:
        """Make a client certificate for the person or program that submits jobs and manages devices."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), check_name(name), ADMIN, client=True)
        return Credentials(self.ca_pem, certificate.public_bytes(serialization.Encoding.PEM), _pem(key))

    def issue_stage(self, job: str) -> tuple[bytes, bytes]:
        """Make a client certificate and key (PEM) for the actors that hold blocks of a served model."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), check_name(job), STAGE, client=True)
        return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)

    def write_admin(self, host: str, port: int) -> Path:
        """Make sure of <state>/admin (a certificate with a month left) and say in it where the coordinator is."""
        folder = self.state / "admin"
        if not self._is_good(folder):
            self.issue_admin("admin").save(folder)
        address = {"host": host, "port": port, "address": join_address(host, port)}
        write_private(folder / "address.json", json.dumps(address).encode())
        return folder

    def control_credentials(self) -> grpc.ServerCredentials:
        """Make the credentials of this process's control server."""
        return server_credentials(*self.issue_server(), self.ca_pem)

    def enrolment_credentials(self) -> grpc.ServerCredentials:
        """Make the credentials of the enrolment server, which shows the authority's own certificate and asks for none.

        So a device can fetch it, compare it with the pin in its token, and have the root of trust for all that follows.
        gRPC for Python cannot ask for a certificate without requiring one: hence two ports.
        """
        return grpc.ssl_server_credentials([(_pem(self._key), self.ca_pem)])

    def _is_good(self, folder: Path) -> bool:
        if not all((folder / name).exists() for name in ("ca.pem", "cert.pem", "key.pem")):
            return False
        credentials = Credentials.load(folder)
        try:
            certificate = x509.load_pem_x509_certificate(credentials.certificate)
            key = serialization.load_pem_private_key(credentials.key, password=None)
        except ValueError:
            return False
        return (
            credentials.ca == self.ca_pem
            and certificate.public_key() == key.public_key()
            and certificate.not_valid_after_utc > _now() + _RENEW_BEFORE
        )

    def _sign(self, key: ec.EllipticCurvePublicKey, name: str, role: str, client: bool) -> x509.Certificate:
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        # A certificate without a SAN would be matched by its CN; a client's SAN can never be a server's name.
        dns = f"{name}.{role}.isthmus" if client else SERVER_NAME
        life = _CLIENT_LIFE if client else _SERVER_LIFE
        return (
            x509.CertificateBuilder()
            .subject_name(_subject(name, role))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_now() - _CLOCK_SKEW)
            .not_valid_after(min(_now() + life, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The root. It is a server's certificate too (see `enrolment_credentials`): hence the name and the key usage."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Isthmus authority")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCK_SKEW)
        .not_valid_after(_now() + _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(ENROLMENT_NAME)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str, role: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
