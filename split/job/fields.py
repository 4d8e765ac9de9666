"""Fields of a configuration that carry their own help, and what is checked of many of them."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from isthmus.split.errors import BadRequest


def setting(default: Any, help: str, *, option: str | bool = True, by_name: str = "") -> Any:
    """A dataclass field with its help. option: another name for the option than the field's, or False for none.

    by_name: the text field beside this number that has other values for single devices, by name; one option gives both.
    """
    return field(default=default, metadata={"help": help, "option": option, "by_name": by_name})


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises BadRequest for a value that is not among those allowed."""
    if value not in allowed:
        raise BadRequest(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def at_least(name: str, value: float, least: int) -> None:
    """Raises BadRequest for a value below the least, or one that is not a number."""
    if not value >= least:
        raise BadRequest(f"{name} is {value}; choose {least} or more")
