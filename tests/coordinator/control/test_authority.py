"""What the authority signs, refuses to sign, and keeps on disk."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.coordinator.control.authority import Authority
from isthmus.coordinator.control.interceptors import caller
from isthmus.split.errors import BadRequest, NotEnrolled, WrongState
from isthmus.split.tls import ADMIN, DEVICE, SERVER_NAME, Credentials, Peer, peer_of, pin_of


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str = "somebody-else") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM)


def purposes(pem: bytes) -> list[x509.ObjectIdentifier]:
    certificate = x509.load_pem_x509_certificate(pem)
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def dns_names(pem: bytes) -> list[str]:
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName)


def test_a_second_start_has_the_same_authority(tmp_path: Path) -> None:
    first, second = Authority.open(tmp_path), Authority.open(tmp_path)
    assert first.ca_pem == second.ca_pem
    assert first.pin == second.pin == pin_of(first.ca_pem)
    assert len(first.pin) == 32


def test_the_key_is_only_for_the_owner_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        Authority.open(tmp_path / "state")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "ca.key").stat().st_mode) == 0o600


def test_a_crash_between_key_and_certificate_is_made_good(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    _, serial = authority.sign_device(request(ec.generate_private_key(ec.SECP256R1())), "edge")
    certificate, _ = authority.sign_device(request(ec.generate_private_key(ec.SECP256R1())), "edge")
    (tmp_path / "ca.pem").unlink()
    again = Authority.open(tmp_path)
    x509.load_pem_x509_certificate(certificate).verify_directly_issued_by(again.certificate)
    assert serial


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("ca.key", None, "ca.key is missing"),
        ("ca.key", b"", "cannot be read as a key"),
        ("ca.pem", b"-----BEGIN", "ca.pem cannot be read"),
    ],
)
def test_damaged_files_give_one_line(tmp_path: Path, file: str, damage: bytes | None, message: str) -> None:
    Authority.open(tmp_path)
    if damage is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(damage)
    with pytest.raises(WrongState, match=message):
        Authority.open(tmp_path)


def test_a_certificate_of_another_key_is_noticed(tmp_path: Path) -> None:
    other = Authority.open(tmp_path / "other")
    Authority.open(tmp_path / "state")
    (tmp_path / "state" / "ca.pem").write_bytes(other.ca_pem)
    with pytest.raises(WrongState, match="is not of"):
        Authority.open(tmp_path / "state")


def test_a_device_gets_the_name_of_its_token_and_may_only_be_a_client(tmp_path: Path) -> None:
    certificate, serial = Authority.open(tmp_path).sign_device(
        request(ec.generate_private_key(ec.SECP256R1()), name=SERVER_NAME), "edge-1"
    )
    assert peer_of({"x509_pem_cert": [certificate]}) == Peer("edge-1", "device", serial)
    assert purposes(certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert SERVER_NAME not in dns_names(certificate)


def test_a_server_may_not_be_a_client_and_is_never_the_same_twice(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    (first, first_key), (second, second_key) = authority.issue_server(), authority.issue_server()
    assert purposes(first) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert dns_names(first) == [SERVER_NAME]
    assert peer_of({"x509_pem_cert": [first]}).role == "coordinator"
    assert first != second
    assert first_key != second_key


def test_requests_that_are_not_signed(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    good = request(ec.generate_private_key(ec.SECP256R1()))
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    for csr, message in [
        (b"", "cannot be read"),
        (b"\xff" * 100, "cannot be read"),
        (good + b"\n" * 10_000, "bytes"),
        (forged, "not signed by its own key"),
        (request(rsa.generate_private_key(65537, 2048)), "P-256"),
        (request(ec.generate_private_key(ec.SECP384R1())), "P-256"),
    ]:
        with pytest.raises(BadRequest, match=message):
            authority.sign_device(csr, "edge")
    with pytest.raises(BadRequest, match="not a name"):
        authority.sign_device(good, "Not A Name")


def test_the_administrators_folder_is_made_once_and_says_where_the_coordinator_is(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    folder = authority.write_admin("127.0.0.1", 7000)
    before = Credentials.load(folder)
    assert authority.write_admin("127.0.0.1", 7001) == folder == tmp_path / "admin"
    assert Credentials.load(folder) == before
    assert json.loads((folder / "address.json").read_text())["port"] == 7001
    assert peer_of({"x509_pem_cert": [before.certificate]}).role == ADMIN
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def test_an_administrators_certificate_of_another_authority_is_replaced(tmp_path: Path) -> None:
    Authority.open(tmp_path / "other").issue_admin("admin").save(tmp_path / "state" / "admin")
    authority = Authority.open(tmp_path / "state")
    assert Credentials.load(authority.write_admin("h", 1)).ca == authority.ca_pem


def test_an_administrators_certificate_of_version_0_1_still_counts_and_no_device_can_ask_for_it(
    tmp_path: Path,
) -> None:
    authority = Authority.open(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    old = authority._sign(key.public_key(), "admin", "user", client=True)
    pem = old.public_bytes(serialization.Encoding.PEM)
    assert peer_of({"x509_pem_cert": [pem]}) == Peer("admin", ADMIN, f"{old.serial_number:x}")
    for role in ("user", ADMIN):
        subject = [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, "admin"),
        ]
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject)).sign(key, hashes.SHA256())
        certificate, serial = authority.sign_device(csr.public_bytes(serialization.Encoding.PEM), "edge")
        assert peer_of({"x509_pem_cert": [certificate]}) == Peer("edge", DEVICE, serial)


def test_a_certificate_of_a_role_that_there_is_not_is_refused_in_one_line(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    signed = authority._sign(ec.generate_private_key(ec.SECP256R1()).public_key(), "me", "users", client=True)
    pem = signed.public_bytes(serialization.Encoding.PEM)
    context = SimpleNamespace(auth_context=lambda: {"x509_pem_cert": [pem]})
    for role in (ADMIN, DEVICE, None):
        with pytest.raises(NotEnrolled, match="a certificate of the role 'users' cannot call"):
            caller(cast(Any, context), cast(Any, None), role)
