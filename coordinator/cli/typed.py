"""Lines that are typed or pasted at a terminal: none is cut in silence, and none is left over for the shell.

From a pipe or a file each line is read whole, and nothing here does anything else.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from isthmus.split.errors import BadRequest

_FULL = 1023 if sys.platform == "darwin" else 4095
"""Bytes of a line that a terminal keeps until Enter is pressed; it drops what is typed beyond them."""

_QUIET = 0.1  # seconds without a byte after which a paste has ended
_LONGEST = 5.0  # most seconds to wait for the rest of a paste


def read_line(prompt: str) -> str:
    """The next line; empty at the end of input.

    A line that a terminal may have cut is refused and asked for again. Raises BadRequest where input that is not a
    terminal is no UTF-8.
    """
    while True:
        undecoded = b""
        try:
            line = input(prompt)
        except EOFError:
            return ""
        except UnicodeDecodeError as error:  # another encoding, or a character that was cut in two
            line, undecoded = "", error.object
        if not sys.stdin.isatty():
            if undecoded:
                raise BadRequest("standard input is no text in UTF-8: convert it first")
            return line
        if max(len(undecoded), len(line.encode(errors="surrogateescape"))) >= _FULL:
            refusal = (
                f"a terminal keeps {_FULL} bytes of a line, and may have cut it; send longer lines by a pipe, as in "
                "`isthmus chat < FILE`"
            )
        elif undecoded:
            refusal = "it is no text in UTF-8"
        else:
            return line
        typer.echo(f"this line is left out, with what was pasted after it: {refusal}", err=True)
        discard_typed()


@contextmanager
def nothing_left_to_the_shell() -> Iterator[None]:
    """Throws away, however the block ends, what was typed or pasted and not read."""
    try:
        yield
    finally:
        discard_typed()


def discard_typed() -> None:
    """Throws away what waits at the terminal, and what comes until a paste has ended."""
    if not sys.stdin.isatty() or _in_background():
        return
    terminal = sys.stdin.fileno()
    with contextlib.suppress(termios.error):  # the terminal has gone, and what waited there with it
        before = termios.tcgetattr(terminal)
        bytewise = [*before]
        bytewise[3] &= ~(termios.ICANON | termios.ECHO)  # counts a part of a line too, and shows none
        try:
            termios.tcsetattr(terminal, termios.TCSANOW, bytewise)
            termios.tcflush(terminal, termios.TCIFLUSH)
            end = time.monotonic() + _LONGEST
            while time.monotonic() < end and select.select([terminal], [], [], _QUIET)[0]:
                termios.tcflush(terminal, termios.TCIFLUSH)
        finally:
            termios.tcflush(terminal, termios.TCIFLUSH)
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def _in_background() -> bool:
    """Whether the terminal belongs to others now, who would be stopped, or robbed of what was typed for them."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp()
    except OSError:  # a terminal that controls no processes
        return False
