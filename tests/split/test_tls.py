"""Tokens, addresses, private files and who a certificate names."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isthmus.split.errors import BadRequest, NotEnrolled, NotFound
from isthmus.split.tls import (
    Credentials,
    EnrolmentToken,
    check_name,
    join_address,
    peer_of,
    private_folder,
    split_address,
    write_private,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
tokens = st.builds(
    EnrolmentToken,
    st.text(LETTERS, min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32),
    st.integers(1, 65535),
)


@given(tokens)
def test_a_token_is_what_was_printed(token: EnrolmentToken) -> None:
    assert EnrolmentToken.parse(f"  {token.format()}\n") == token


@given(st.one_of(st.text(max_size=200), st.text(LETTERS + ".", max_size=100).map(lambda text: f"ist1.{text}")))
@example("ist1." + "a" * 32 + "." + "A" * 43 + ".65536")
@example("ist1." + "a" * 32 + "." + "A" * 42 + "B.7000")  # bits that no 32 bytes have
@example("ist1." + "a" * 32 + "." + "A" * 43 + ".07000")
def test_any_text_is_a_whole_token_or_a_clear_error(text: str) -> None:
    message: str | None = None
    try:
        token = EnrolmentToken.parse(text)
    except BadRequest as error:
        message = str(error)
    else:
        assert token.format() == text.strip()
    assert message is None or ("token" in message and "\n" not in message)


@given(tokens, st.data())
def test_a_token_cut_short_is_refused_without_repeating_it(token: EnrolmentToken, data: st.DataObject) -> None:
    text = token.format()
    cut = data.draw(st.integers(5, text.rindex(".")))
    with pytest.raises(BadRequest, match="damaged") as caught:
        EnrolmentToken.parse(text[:cut])
    assert token.secret not in str(caught.value)


@given(tokens)
def test_the_secret_is_not_in_the_representation(token: EnrolmentToken) -> None:
    assert token.secret not in repr(token)


@pytest.mark.parametrize("name", ["a", "0", "edge-1", "a" * 63])
def test_names_that_are_fine(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "Edge", "a b", "a.b", "a/../b", "a\n", "é", "a" * 64])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="not a name"):
        check_name(name)


@pytest.mark.parametrize("identifier", ["../x", "/etc/x", "..", "a/b", "a\0", "k3v9x2ab\n", "x" * 20_000_000])
def test_what_is_no_id_is_refused_in_one_short_line(identifier: str) -> None:
    with pytest.raises(BadRequest, match="is not a job's id") as refused:
        check_name(identifier, "a job's id")
    assert len(str(refused.value)) < 400
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(("host", "port"), [("localhost", 1), ("10.0.0.1", 7000), ("::1", 65535)])
def test_addresses_round_trip(host: str, port: int) -> None:
    assert split_address(join_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    "address", ["", "host", ":1", "host:", "host:0", "host:65536", "::1", "::1:7000", "h:+1", "h:\uff11"]
)
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(BadRequest, match="HOST:PORT"):
        split_address(address)


def test_private_files_are_replaced_whole_and_only_for_the_owner(tmp_path: Path) -> None:
    path = private_folder(tmp_path / "state") / "key"
    path.write_bytes(b"old, and open to all")
    path.chmod(0o666)
    write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    write_private(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isthmus.split.tls.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_credentials_are_saved_privately_and_loaded(tmp_path: Path) -> None:
    credentials = Credentials(b"ca", b"certificate", b"the key")
    credentials.save(tmp_path / "state")
    assert Credentials.load(tmp_path / "state") == credentials
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "state").iterdir()} == {0o600}
    assert "the key" not in repr(credentials)
    with pytest.raises(NotFound, match=r"no credentials in .*elsewhere"):
        Credentials.load(tmp_path / "elsewhere")


def test_a_call_without_a_certificate_is_nobodys() -> None:
    with pytest.raises(NotEnrolled, match="needs a certificate"):
        peer_of({"transport_security_type": [b"ssl"]})
