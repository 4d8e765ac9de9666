"""A configuration as groups of settings, made and changed by the settings' names, and written as JSON.

The field of a group is a dataclass of fields that `setting` made. Names are unique over all groups, so a name alone
says which setting is meant: on the command line, in Python, and in the flat JSON of version 0.1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from isthmus.split.errors import BadRequest
from isthmus.split.job.fields import Setting

_TYPES: Mapping[object, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "bool": (bool,),
    "float": (int, float),
    "str": (str,),
    "str | None": (str, type(None)),
}


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Base of configurations.

    kind: what messages call the configuration.
    """

    kind: ClassVar[str]

    @classmethod
    def settings(cls) -> list[Setting]:
        """All settings, in the order in which they are declared."""
        found: list[Setting] = []
        for field in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(field.default):
                found.append(Setting(field.name, "", field))
                continue
            for one in dataclasses.fields(field.default):
                name = one.metadata["option"] if one.name == "name" else one.name  # several groups may have a `name`
                found.append(Setting(name, field.name, one))
        return found

    @classmethod
    def of(cls, **values: Any) -> Self:
        """A configuration with these values of settings, by their names, and defaults for all others.

        Raises BadRequest for an unknown name, and for a value that cannot be.
        """
        return cls().but(**values)

    def but(self, **values: Any) -> Self:
        """This configuration with other values of some settings.

        Raises BadRequest for an unknown name, and for a value that cannot be.
        """
        known = {one.name: one for one in self.settings()}
        _check_names(self.kind, values, known)
        groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            groups.setdefault(known[name].group, {})[known[name].field.name] = value
        changed: dict[str, Any] = groups.pop("", {})
        for group, chosen in groups.items():
            changed[group] = dataclasses.replace(getattr(self, group), **chosen)
        return dataclasses.replace(self, **changed)

    def values(self) -> dict[str, Any]:
        """The value of every setting, by its name."""
        return {
            one.name: getattr(getattr(self, one.group) if one.group else self, one.field.name)
            for one in self.settings()
        }

    def to_json(self) -> str:
        """All settings in their groups, as JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote, or version 0.1, which had no groups.

        Raises BadRequest for text that is not a JSON object of known fields with values of their types.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise BadRequest(f"the {cls.kind} is not JSON: {error}") from None
        except RecursionError:
            raise BadRequest(f"the {cls.kind} is not JSON that can be read: it is nested too deeply") from None
        if not isinstance(values, dict):
            raise BadRequest(f"the {cls.kind} is not a JSON object")
        return cls.of(**cls._checked(cls._named_as_now(cls._flat(values))))

    @classmethod
    def _named_as_now(cls, values: dict[str, Any]) -> dict[str, Any]:
        """These values, with version 0.1's own way to say some things translated."""
        return values

    @classmethod
    def _flat(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by the settings' names, whether they came in groups or not.

        Raises BadRequest for a setting that is there twice.
        """
        groups = {one.group for one in cls.settings()} - {""}
        names = {(one.group, one.field.name): one.name for one in cls.settings()}
        pairs: list[tuple[str, Any]] = []
        for key, value in values.items():
            if key in groups and isinstance(value, Mapping):
                pairs += [(names.get((key, inner), f"{key}.{inner}"), one) for inner, one in value.items()]
            else:
                pairs.append((key, value))
        flat = dict(pairs)
        if len(flat) != len(pairs):
            raise BadRequest(f"the {cls.kind} has a setting twice: in its group and outside")
        return flat

    @classmethod
    def _checked(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Values of the fields' types. Raises BadRequest for an unknown name, or a value of another type."""
        known = {one.name: one.field for one in cls.settings()}
        _check_names(cls.kind, values, known)
        return {name: _typed(cls.kind, name, known[name], value) for name, value in values.items()}


def _check_names(kind: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise BadRequest(f"the {kind} has no setting {', '.join(unknown)}; is the other side a newer version?")


def _typed(kind: str, name: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """The field's value, from JSON. Raises BadRequest for a value of another type."""
    read = field.metadata["read"]
    try:
        if read is not None:
            return read(value)
        if isinstance(value, list):
            value = tuple(value)
        fits = _fits(field.type, value)
        if fits and field.type == "float":
            value = float(value)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        fits = False
    if not fits:
        raise BadRequest(f"{name} of the {kind} has the value {value!r}; it must be {field.type}")
    return value


def _fits(annotation: object, value: object) -> bool:
    if annotation == "tuple[str, ...]":
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    return isinstance(value, _TYPES[annotation]) and isinstance(value, bool) == (annotation == "bool")
