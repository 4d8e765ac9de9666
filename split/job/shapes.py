"""What each device has of a job: its cut and its rank, as they are asked for by name and as they then are.

A device of cut c holds blocks 0..c-1. Its adapter has its own rank, but the scale of the whole job, alpha / rank of the
configuration, so that products B A of different devices can be added. A device of rank 0 trains nothing but takes part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isthmus.split.errors import BadRequest

if TYPE_CHECKING:
    from isthmus.split.job.config import TrainingConfig

AUTO = "auto"
AVERAGE, PADDING, STACKING, SVD = "average", "padding", "stacking", "svd"
AGGREGATIONS = (AVERAGE, PADDING, STACKING, SVD)


@dataclass(frozen=True, order=True)
class Shape:
    """A device's cut, in blocks, and the rank of its adapter."""

    cut: int
    rank: int

    def __str__(self) -> str:
        return f"cut {self.cut}, rank {self.rank}"


@dataclass(frozen=True)
class ByName:
    """A number for each device, or None for `auto`.

    rest: the number for all devices that are not named.
    """

    rest: int | None
    named: Mapping[str, int | None] = field(default_factory=dict)

    def of(self, device: str) -> int | None:
        return self.named.get(device, self.rest)

    def but(self, device: str, number: int) -> ByName:
        """The same, with this number for this device."""
        return ByName(self.rest, {**self.named, device: number})

    @property
    def numbers(self) -> list[int]:
        return [value for value in (self.rest, *self.named.values()) if value is not None]

    @property
    def automatic(self) -> bool:
        return None in (self.rest, *self.named.values())


def parse_by_name(option: str, text: str, rest: int) -> ByName:
    """Reads `auto`, `N` or `NAME=N,NAME=auto,N`, whose last part without a name is for the rest.

    option: the option's name in errors.
    rest: the number for the rest where the text has none.

    Raises BadRequest for other text.
    """
    named: dict[str, int | None] = {}
    others: list[int | None] = []
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        name, equals, value = part.rpartition("=")
        number = None if value.strip() == AUTO else _number(option, text, value.strip())
        if not equals:
            others.append(number)
        elif not name.strip() or name.strip() in named:
            raise BadRequest(f"{option} {text}: {name.strip() or 'a device without a name'} is there twice, or is none")
        else:
            named[name.strip()] = number
    if len(others) > 1 or not parts:
        raise BadRequest(f"{option} {text!r}: write auto, N or NAME=N,NAME=auto,N (the last is for the rest)")
    return ByName(others[0] if others else rest, named)


def options_of(cut: str, rank: str, default: TrainingConfig) -> dict[str, Any]:
    """The fields of TrainingConfig for the command's `--cut` and `--rank`.

    The job's own rank, which gives the scale, is the largest number that `rank` names, or the default if it names none.
    Raises BadRequest for text that cannot be read.
    """
    cuts = parse_by_name("--cut", cut, default.devices.cut_layer)
    ranks = parse_by_name("--rank", rank, 0)
    own = max(ranks.numbers, default=0)
    if ranks.named or ranks.rest is None:  # a 0 without a name is for the whole job, and is refused there
        own = own or default.lora.rank
    return {
        "cut_layer": default.devices.cut_layer if cuts.rest is None else cuts.rest,
        "rank": own,
        "cuts": cut if cuts.named or cuts.rest is None else "",
        "ranks": rank if ranks.named or ranks.rest is None else "",
    }


def asked(config: TrainingConfig) -> tuple[ByName, ByName]:
    """The cuts and the ranks that a job's submitter asked for."""
    cut, cuts, rank, ranks = config.devices.cut_layer, config.devices.cuts, config.lora.rank, config.lora.ranks
    by_cut = parse_by_name("cut", cuts, cut) if cuts else ByName(cut)
    return by_cut, parse_by_name("rank", ranks, rank) if ranks else ByName(rank)


def check_named(config: TrainingConfig, devices: Iterable[str]) -> None:
    """Raises BadRequest where a cut or a rank is for a device that has no part in the job."""
    known = set(devices)
    for option, wanted in zip(("--cut", "--rank"), asked(config), strict=True):
        strange = sorted(set(wanted.named) - known)
        if strange:
            raise BadRequest(f"{option} names {strange[0]}, which is not among the devices: {', '.join(sorted(known))}")


def fixed_shapes(config: TrainingConfig, devices: Iterable[str]) -> dict[str, Shape]:
    """The shapes in a job without `auto`, by device. Raises BadRequest where one is `auto`."""
    cuts, ranks = asked(config)
    shapes = {}
    for device in sorted(devices):
        cut, rank = cuts.of(device), ranks.of(device)
        if cut is None or rank is None:
            raise BadRequest(f"the cut and rank of {device} are auto: they are chosen where devices are measured")
        shapes[device] = Shape(cut, rank)
    return shapes


def aggregation_of(config: TrainingConfig, shapes: Mapping[str, Shape]) -> str:
    """The name of the aggregation. Raises BadRequest for `average` of adapters of different ranks."""
    alike = len({shape.rank for shape in shapes.values()} | {config.lora.rank}) == 1
    if config.devices.aggregation == AVERAGE and not alike:
        raise BadRequest("--aggregation average needs the same rank on all devices; choose padding, stacking or svd")
    return config.devices.aggregation or (AVERAGE if alike else SVD)


def as_plain(shapes: Mapping[str, Shape]) -> dict[str, list[int]]:
    """Shapes as plain lists of cut and rank, for JSON and for Ray."""
    return {device: [shape.cut, shape.rank] for device, shape in sorted(shapes.items())}


def from_plain(plain: Mapping[str, Iterable[int]]) -> dict[str, Shape]:
    return {device: Shape(*values) for device, values in plain.items()}


def _number(option: str, text: str, value: str) -> int:
    if not value.isdecimal():
        raise BadRequest(f"{option} {text}: {value!r} is neither a number nor auto")
    return int(value)
