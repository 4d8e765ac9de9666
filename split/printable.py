"""Text that comes from elsewhere, as it is shown and logged here: bounded, on one line, with no commands to a terminal.

What devices, coordinators, servers and models say is such text, and so is every error that quotes it.
"""

from __future__ import annotations

import logging
import types
import unicodedata

from isthmus.split.errors import BadRequest

LINE = 4000
"""Characters of a line that is logged or shown."""

LABEL = 200
"""Characters of what somebody calls a thing: a dataset, a platform, an accelerator."""

_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Unicode's categories: control characters (C0, DEL and C1), those that change the direction of text or are invisible,
# halves of surrogate pairs, and what ends a line or paragraph.
_JOINERS = "\u200c\u200d"  # in words of many scripts, and in emoji
_HALF = 100  # lines of a traceback that are kept from its beginning, and from its end


def printable(text: str, limit: int | None = LINE, *, keep: str = "") -> str:
    r"""The text with what is not visible written as an escape (`\n`, `\x1b`, `\u202e`).

    limit: characters of the result, whose last one is then `…`; None: all. keep: characters that stay as they are.
    """
    cut = text if limit is None else text[: limit + 1]
    shown = cut if cut.isascii() and cut.isprintable() else "".join(_shown(one, keep) for one in cut)
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}…"


def check_label(text: str, what: str) -> str:
    """The text, if it is a line of at most LABEL characters that can be shown as it is; raises BadRequest."""
    if printable(text, LABEL) != text:
        raise BadRequest(f"{what} has to be one line of at most {LABEL} visible characters, not {printable(text, 80)}")
    return text


class LogFormatter(logging.Formatter):
    """Makes one bounded line of a record, whatever its text quotes. A traceback's lines begin with `  | `."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # the library's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(  # the library's name
        self,
        ei: tuple[type[BaseException], BaseException, types.TracebackType | None] | tuple[None, None, None],
    ) -> str:
        lines = super().formatException(ei).splitlines()
        left_out = len(lines) - 2 * _HALF
        if left_out > 0:
            lines = [*lines[:_HALF], f"({left_out} lines are left out)", *lines[-_HALF:]]
        return "\n".join(f"  | {printable(line)}" for line in lines)


def log_to_stderr(format: str, level: int = logging.INFO, *, formatter: type[LogFormatter] = LogFormatter) -> None:
    """Sets this process's logging up. format: as of `logging.Formatter`."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(format))
    logging.basicConfig(level=level, handlers=[handler])


def _shown(one: str, keep: str) -> str:
    if unicodedata.category(one) not in _ESCAPED or one in _JOINERS or one in keep:
        return one
    return one.encode("unicode_escape").decode("ascii")
