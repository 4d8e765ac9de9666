"""Options of a command that are made from the configuration which they fill, so that nothing is written twice.

A setting's name, type, default and help are those of its dataclass field (`isthmus.split.job.fields.setting`); its
group is a panel of the command's help, and a mapping in the file that `--config` reads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.coordinator.cli.config_file import from_file
from isthmus.split.job.fields import Setting
from isthmus.split.job.grouped import Grouped

Settings = Mapping[str, Any]
"""Values of a configuration's settings by name, as `Grouped.of` takes them; numbers by name are still text."""

PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all of this as a file for --config, and do nothing else.")
]
_PANELS = {"lora": "LoRA", "dlora": "DLoRA", "http": "HTTP"}  # panels that are not the group's name with a capital
_TYPES: Mapping[object, Any] = {
    "bool": bool,
    "int": int,
    "int | None": int | None,
    "float": float,
    "str": str,
    "str | None": str | None,
    "tuple[str, ...]": str,  # NAME,NAME,...
}


Command = Callable[..., None]


def with_settings(config: type[Grouped], panel: str = "Options") -> Callable[[Command], Command]:
    """Gives a command `--config FILE` and an option for each setting; it gets their values as parameter `settings`.

    panel: the heading, in the help, of settings that are in no group.
    """
    made = [_parameter(one, panel) for one in config.settings() if one.option]
    lists = {one.name for one in config.settings() if one.listed}
    file = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, from_file(config)]
    )

    def decorated(command: Command) -> Command:
        own = [one for one in inspect.signature(command, eval_str=True).parameters.values() if one.name != "settings"]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            values.pop(file.name)
            chosen = {one.name: values.pop(one.name) for one in made}
            settings = {name: _names(value) if name in lists else value for name, value in chosen.items()}
            command(settings=settings, **values)

        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + [file, *made]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorated


def _parameter(one: Setting, panel: str) -> inspect.Parameter:
    """The command's parameter for a setting; for a number that differs by name it is text."""
    flags = [f"--{name.replace('_', '-')}" for name in dict.fromkeys((one.option, one.name))]
    kind: Any = _TYPES[one.field.type]
    default: Any = one.field.default
    if kind is bool:
        flags = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]  # so that the command line can undo a file
    if one.by_name:
        kind, default = str, str(default)
    elif one.listed:
        default = ",".join(default)
    heading = _PANELS.get(one.group, one.group.capitalize()) or panel
    option = typer.Option(*flags, help=one.help, rich_help_panel=heading)
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _names(text: str) -> tuple[str, ...]:
    """Turns `a, b` into ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
