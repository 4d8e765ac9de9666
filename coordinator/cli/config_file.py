"""`--config FILE`: reads a command's options from a YAML file, and writes the file that has all of them.

The keys are the options' names with underscores; a setting of a group is in the group's mapping. A file of one line can
ask for much, by aliases that multiply or tags that make objects: neither is read, and the size is bounded.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import typer
import yaml

from isthmus.split.errors import BadRequest
from isthmus.split.job.grouped import Grouped

MOST_BYTES = 64 * 1024
_DEEPEST = 3  # depth of nesting: the file, a group, a list
_SECRET = "api_key"  # it is read, and never printed
_NAMES = "names"  # the key of an option that has a group's name
_NOT_IN_FILES = ("config", "print_config", "help")
_SHOWN = 60  # characters of a wrong value or key in a message
_NULL = "tag:yaml.org,2002:null"
_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class FileKey:
    """The place that an option has in a file.

    group: the mapping; empty for an option in no group.
    keys: the first is printed, any is read.
    """

    group: str
    keys: tuple[str, ...]
    option: click.Option
    listed: bool = False  # NAME,NAME,... on the command line, which may be a list here
    numeric: bool = False  # text on the command line that may be a number

    @property
    def name(self) -> str:
        """The option's name in Click's maps of values and defaults."""
        return str(self.option.name)

    @property
    def path(self) -> str:
        return f"{self.group}.{self.keys[0]}" if self.group else self.keys[0]


def file_keys(command: click.Command, config: type[Grouped]) -> list[FileKey]:
    """All the options that a file may have: those in no group first, then group by group."""
    settings = {one.name: one for one in config.settings() if one.option}
    groups = list(dict.fromkeys(["", *(one.group for one in settings.values())]))
    found: list[FileKey] = []
    for option in command.params:
        if not isinstance(option, click.Option) or option.name in _NOT_IN_FILES:
            continue
        flags = [flag.removeprefix("--").replace("-", "_") for flag in option.opts]
        one = settings.get(str(option.name))
        if one is not None:
            keys = tuple(dict.fromkeys((one.field.name, *flags)))
            found.append(FileKey(one.group, keys, option, listed=one.listed, numeric=bool(one.by_name)))
        elif flags[0] in groups:  # `devices: {names: …}` says which devices, beside the group's settings
            found.append(FileKey(flags[0], (_NAMES,), option, listed=True, numeric=True))
        else:
            found.append(FileKey("", tuple(flags), option))
    return sorted(found, key=lambda place: groups.index(place.group))


def from_file(config: type[Grouped]) -> Any:
    """The option `--config` of a command with these settings: the file's values become the other options' defaults."""

    def read(context: typer.Context, value: Path | None) -> Path | None:
        if value is not None and not context.resilient_parsing:
            context.default_map = read_file(value, context, file_keys(context.command, config))
        return value

    return typer.Option(
        "--config",
        metavar="FILE",
        help="YAML with values for these options (docs/configuration.md); those on the command line win.",
        callback=read,
        is_eager=True,
    )


def read_file(path: Path, context: click.Context, known: Sequence[FileKey]) -> dict[str, Any]:
    """Values by the options' names. Raises BadRequest with the file, the line and the key."""
    refuse = _RefuseAt(path)
    values: dict[str, Any] = {}
    for group, key, node in _entries(_root(path, refuse), known, refuse):
        place = next((one for one in known if one.group == group and key in one.keys), None)
        if place is None:
            refuse(node, _unknown(group, key, known))
        if place.name in values:
            refuse(node, f"{place.path} is there twice")
        values[place.name] = _value(place, node, context, refuse)
    return {name: value for name, value in values.items() if value is not None}


class _RefuseAt:
    """Raises BadRequest for a place in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, at: Any, line: str) -> NoReturn:
        """Raises BadRequest for this place.

        at: a node or an event of the file.
        line: what is wrong there.
        """
        raise BadRequest(f"{self._path}, line {at.start_mark.line + 1}: {line}")


def _root(path: Path, refuse: _RefuseAt) -> yaml.MappingNode | None:
    """The file's mapping, or None for an empty file. Raises BadRequest for a file that cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"--config {path} cannot be read: {error.strerror or error}") from None
    if len(content) > MOST_BYTES:
        raise BadRequest(f"--config {path} is larger than {MOST_BYTES // 1024} KiB: it is no configuration")
    try:
        text = content.decode()
        _check_events(text, refuse)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise BadRequest(f"--config {path} is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        what = " ".join(filter(None, (error.context, error.problem)))
        raise BadRequest(f"{path}{where}: this cannot be read as YAML: {what}") from None
    except yaml.YAMLError as error:
        raise BadRequest(f"{path}: this cannot be read as YAML: {' '.join(str(error).split())}") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        refuse(root, "write KEY: VALUE, a line each")
    return root


def _check_events(text: str, refuse: _RefuseAt) -> None:
    """Refuses what could make much of little, before anything is made of the text. Raises BadRequest."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            refuse(event, "anchors and aliases (& and *) are not read: write the value itself")
        if getattr(event, "tag", None):
            refuse(event, "tags (!) are not read: write a plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            refuse(event, "this is nested too deeply: write groups of KEY: VALUE")


def _entries(
    root: yaml.MappingNode | None, known: Sequence[FileKey], refuse: _RefuseAt
) -> Iterator[tuple[str, str, yaml.Node]]:
    """Group, key and value of each entry. Raises BadRequest for a group that is there twice, or is no mapping."""
    groups = {place.group for place in known} - {""}
    with_names = {place.group for place in known if place.keys == (_NAMES,)}  # for these, `devices: 2` will do too
    opened: set[str] = set()
    for key, value in root.value if root is not None else ():
        if _key(key, refuse) not in groups:
            yield "", key.value, value
            continue
        if key.value in opened:
            refuse(key, f"{key.value} is there twice")
        opened.add(key.value)
        if value.tag == _NULL:  # a group whose settings are all comments
            continue
        if isinstance(value, yaml.MappingNode):
            for inner, one in value.value:
                yield key.value, _key(inner, refuse), one
        elif key.value in with_names:
            yield key.value, _NAMES, value
        else:
            refuse(value, f"{key.value} is a group: write its settings under it, as KEY: VALUE")


def _key(node: yaml.Node, refuse: _RefuseAt) -> str:
    if not isinstance(node, yaml.ScalarNode):
        refuse(node, "a key has to be a word")
    return str(node.value)


def _unknown(group: str, key: str, known: Sequence[FileKey]) -> str:
    """What to say of an unknown key: where it belongs, or what may have been meant."""
    elsewhere = next((place for place in known if key in place.keys), None)
    if elsewhere is not None:
        return f"{key} belongs {f'under {elsewhere.group}' if elsewhere.group else 'to no group'}"
    path = f"{group}.{key}" if group else key
    near = difflib.get_close_matches(path[:_SHOWN], [place.path for place in known], n=1)
    return f"there is no setting {_shown(path)}" + (f"; is {near[0]} meant?" if near else "")


def _shown(text: str) -> str:
    """As much of a text as fits into a message of one line."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _value(place: FileKey, node: yaml.Node, context: click.Context, refuse: _RefuseAt) -> Any:
    """The value for an option, as the command line would have it; None for the option's own default.

    Raises BadRequest for a value that the option cannot have.
    """
    wanted = _wanted(place.option)[0]
    if node.tag == _NULL:
        if place.option.default is not None:
            refuse(node, f"{place.path} has no value: it must be {wanted}")
        return None
    value: Any
    if isinstance(node, yaml.SequenceNode) and (place.option.multiple or place.listed):
        value = [_scalar(place, one, refuse) for one in node.value]
        value = ",".join(value) if place.listed else value
    else:
        value = _scalar(place, node, refuse)
        value = [value] if place.option.multiple else value
    try:
        place.option.type_cast_value(context, value)
    except click.BadParameter as error:
        refuse(node, f"{place.path}: {error.message}")
    return value


def _scalar(place: FileKey, node: yaml.Node, refuse: _RefuseAt) -> Any:
    """One value of the option's type; text is what is written, whatever YAML would make of it.

    Raises BadRequest for a value of another type.
    """
    wanted, fits = _wanted(place.option)
    if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL:
        refuse(node, f"{place.path} must be {wanted}")
    text = str(node.value)
    if not fits(text, node.style is None):
        quoted = "" if node.style is None else ", without quotes"
        refuse(node, f"{place.path} is {_shown(text)}; it must be {wanted}{quoted}")
    return text.lower() == "true" if place.option.is_flag else text


def _wanted(option: click.Option) -> tuple[str, Callable[[str, bool], bool]]:
    """What an option's values have to be, and a function that tells whether a text is one.

    The function's second argument says whether the text is without quotes.
    """
    if option.is_flag:
        return "true or false", lambda text, plain: plain and text.lower() in ("true", "false")
    if isinstance(option.type, click.types.IntParamType):
        return "a whole number", lambda text, plain: plain and bool(_WHOLE.fullmatch(text))
    if isinstance(option.type, click.types.FloatParamType):
        return "a number", lambda text, plain: plain and bool(_NUMBER.fullmatch(text))
    return "text", lambda text, plain: True


def print_file(config: type[Grouped]) -> None:
    """Prints a file with the value of each option of the running command."""
    context = click.get_current_context()
    typer.echo(file_text(context, config), nl=False)


def file_text(context: click.Context, config: type[Grouped]) -> str:
    """The file that makes the command do what it would do now, each value under its help."""
    lines = [f"# For `{context.command_path} --config FILE`; options on the command line win.", ""]
    about = {name: one.__doc__ or "" for name, one in vars(config()).items() if dataclasses.is_dataclass(one)}
    group = ""
    for place in file_keys(context.command, config):
        if place.group != group:
            group = place.group
            lines += ["", *_comment(about[group], ""), f"{group}:"]
        indent = "  " if group else ""
        lines += _comment(place.option.help or "", indent)
        if place.name == _SECRET:
            lines.append(f"# {place.keys[0]}: (not printed)")
        else:
            value = plain_value(place, context.params[place.name])
            lines.append(f"{indent}{place.keys[0]}: {_scalar_text(value)}")
    return "\n".join(lines) + "\n"


def _scalar_text(value: Any) -> str:
    """A value, or a list of values, on one line."""
    plain = not isinstance(value, str) or value.isprintable()
    style = None if plain else '"'  # the only style that has line breaks on one line
    text = yaml.safe_dump([value], default_style=style, default_flow_style=True, width=2**30, allow_unicode=plain)
    return str(text).strip()[1:-1]


def _comment(text: str, indent: str) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split()), 110, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {line}" for line in lines]


def plain_value(place: FileKey, value: Any) -> Any:
    """A value of the command line as YAML has it."""
    if place.option.multiple:
        return [str(one) for one in value or ()]
    if isinstance(value, Path):
        return str(value)
    if place.numeric and value.isdecimal():
        return int(value)
    return [part.strip() for part in value.split(",") if part.strip()] if place.listed else value
