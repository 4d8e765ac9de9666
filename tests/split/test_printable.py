"""Text from elsewhere in logs, tables and lines: what a terminal would obey is shown, and none of it is endless."""

from __future__ import annotations

import io
import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.live import Live
from rich.table import Table

from isthmus.split.errors import BadRequest
from isthmus.split.printable import LABEL, LINE, LogFormatter, check_label, printable
from isthmus.split.terminal import PlainConsole

EVIL = (
    "a\nFORGED\r\x1b[2J\x1b]0;title\x07\x9b31m\u202eright to left\u2066\u2028\x7f\ud800[red]:smile:" + "x" * 20_000_000
)


@given(text=st.text(st.characters()))
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = printable(text, None)
    assert len(shown.splitlines()) <= 1
    assert not {unicodedata.category(one) for one in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")
    assert printable(shown, None) == shown
    shown.encode()


@pytest.mark.parametrize("text", ["plain", "Ærøskøbing \u00a0!", "日本語", "👩\u200d🚀", "نص", "[red] back\\slash"])
def test_what_is_visible_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_what_is_not_visible_is_written_out_and_the_length_is_bounded() -> None:
    assert printable("a\nb\x1b[2J\x9b\u202e") == r"a\nb\x1b[2J\x9b\u202e"
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
    assert printable("x" * 10, 10) == "x" * 10
    assert printable("x" * 11, 10) == "x" * 9 + "…"
    assert len(printable("\n" * 20_000_000, 10)) == 10


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "x" * (LABEL + 1), "\u202e"])
def test_a_label_is_one_short_line(text: str) -> None:
    with pytest.raises(BadRequest, match="a dataset's name has to be one line") as refused:
        check_label(text, "a dataset's name")
    assert len(str(refused.value)) < 300
    assert check_label("Notes of [2026]", "a dataset's name") == "Notes of [2026]"


def test_a_record_is_one_bounded_line_and_a_traceback_cannot_pass_for_others() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("refused: %s", EVIL)
    line = written.getvalue().removesuffix("\n")
    assert line.isprintable()
    assert line.startswith(r"WARNING refused: a\nFORGED\r\x1b[2J")
    assert len(line) <= LINE + 10
    try:
        raise ValueError(EVIL + "\nINFO device good enrolled" * 1000)
    except ValueError:
        log.exception("a bug")
    first, *lines = written.getvalue()[len(line) + 1 :].splitlines()
    assert first == "ERROR a bug"
    assert all(line.startswith("  | ") and line.isprintable() and len(line) <= LINE + 10 for line in lines)
    assert len(lines) <= 201
    assert "raise ValueError(EVIL" in "".join(lines)


def test_the_console_shows_text_from_devices_as_it_is() -> None:
    console = PlainConsole()
    console.file = io.StringIO()
    console.print(EVIL, soft_wrap=True)
    table = Table("device", "offers", title=EVIL)
    table.add_row("edge", EVIL)
    console.print(table)
    with Live(table, console=console, auto_refresh=False):
        pass
    written = console.file.getvalue()
    assert not {one for one in written if unicodedata.category(one) in ("Cc", "Cf", "Cs")} - {"\n"}
    assert "[red]:smile:" in written
    assert not any(line.startswith("FORGED") for line in written.splitlines())
    assert len(written) < 10 * LINE
