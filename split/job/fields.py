"""Fields of a configuration that carry their own help, and checks that many of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from isthmus.split.errors import BadRequest


def setting(
    default: Any,
    help: str,
    *,
    option: str | bool = True,
    by_name: str = "",
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """Makes a dataclass field with its help.

    option: another name for the option than the field's, or False for no option.
    by_name: the text field beside this number that has other values for single devices by name; one option sets both.
    read: makes the field's value from what JSON has, where the two differ in type.
    """
    metadata = {"help": help, "option": option, "by_name": by_name, "read": read}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One choice of a configuration.

    name: its name, which is unique over all groups.
    group: the group's name; empty for a setting in no group.
    """

    name: str
    group: str
    field: dataclasses.Field[Any]

    @property
    def help(self) -> str:
        return str(self.field.metadata["help"])

    @property
    def option(self) -> str:
        """The name of its option on the command line, with underscores; empty if it has none."""
        option = self.field.metadata["option"]
        return (self.name if option else "") if isinstance(option, bool) else str(option)

    @property
    def listed(self) -> bool:
        """Whether its value is several texts, which the option takes as NAME,NAME,..."""
        return bool(self.field.type == "tuple[str, ...]")

    @property
    def by_name(self) -> str:
        """The text field beside this number that has other values for single devices; empty if there is none."""
        return str(self.field.metadata["by_name"])


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises BadRequest for a value that is not among those allowed."""
    if value not in allowed:
        raise BadRequest(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def at_least(name: str, value: float, least: int) -> None:
    """Raises BadRequest for a value below the least, or one that is not a number."""
    if not value >= least:
        raise BadRequest(f"{name} is {value}; choose {least} or more")


def between(name: str, value: float, least: int, most: int) -> None:
    """Raises BadRequest for a value outside least to most, or one that is not a number."""
    if not least <= value <= most:
        raise BadRequest(f"{name} is {value}; choose {least} to {most}")
