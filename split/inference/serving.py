"""What is served and by whom: spans of blocks, each with its holders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from isthmus.split.errors import BadRequest
from isthmus.split.inference.settings import (
    AccessSettings,
    ChainSettings,
    DraftsSettings,
    HttpSettings,
    LimitsSettings,
)
from isthmus.split.job.fields import setting
from isthmus.split.job.grouped import Grouped

if TYPE_CHECKING:  # torch: not for the command's `--help`
    from transformers import PretrainedConfig

    from isthmus.split.plan.memory import ServedMemory

CLOUD = "cloud"  # as a holder: an actor at the coordinator
_GUESTS = 4  # sequences that are kept for devices which use the chain, where nobody says how many
_NAMES_OF_0_1 = {
    "http_host": "host",
    "http_port": "port",
    "http_certificate": "tls_certificate",
    "http_key": "tls_key",
}
_SPAN = re.compile(r"\s*([a-z0-9+-]+)\s*:\s*(\d+)\s*-\s*(\d+)\s*")


@dataclass(frozen=True)
class SpanConfig:
    """Blocks first to last-1. holders: the first computes, the others stand by; CLOUD or devices' names."""

    first: int
    last: int
    holders: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True)
class AdapterConfig:
    """name: what clients call it. folder: at the coordinator; devices are not told."""

    name: str
    folder: str = ""


def _read_spans(value: Any) -> tuple[SpanConfig, ...]:
    return tuple(SpanConfig(int(one["first"]), int(one["last"]), tuple(map(str, one["holders"]))) for one in value)


def _read_adapters(value: Any) -> tuple[AdapterConfig, ...]:
    return tuple(AdapterConfig(str(one["name"]), str(one["folder"])) for one in value)


@dataclass(frozen=True)
class ServingConfig(Grouped):
    """One served model: who holds which blocks, what clients call it, and how it is computed and reached."""

    kind: ClassVar[str] = "serving configuration"

    spans: tuple[SpanConfig, ...] = setting(
        (), "Who holds which blocks; none: it is planned.", option=False, read=_read_spans
    )
    name: str = setting("", "What clients call the model.", option=False)
    adapters: tuple[AdapterConfig, ...] = setting(
        (), "Of LoRA, chosen by a request's model name.", option=False, read=_read_adapters
    )
    limits: LimitsSettings = LimitsSettings()
    chain: ChainSettings = ChainSettings()
    drafts: DraftsSettings = DraftsSettings()
    http: HttpSettings = HttpSettings()
    access: AccessSettings = AccessSettings()

    def __post_init__(self) -> None:
        names = ["", self.name]
        for adapter in self.adapters:
            if adapter.name in names:
                raise BadRequest(
                    f"no adapter can be called {adapter.name!r} here: it is the model's name, another adapter's, or "
                    "none; write --adapter NAME=DIR"
                )
            names.append(adapter.name)

    @property
    def devices(self) -> list[str]:
        return [holder for span in self.spans for holder in span.holders if holder != CLOUD]

    @property
    def names(self) -> list[str]:
        """That a request can call the model by: the base's, and in their order the adapters'."""
        return [self.name, *(adapter.name for adapter in self.adapters)]

    @property
    def may_use(self) -> list[str]:
        """Devices that may use the chain themselves."""
        if self.access.guests == 0:
            return []
        first = self.spans[0].holders if self.spans else ()
        return list(dict.fromkeys([*self.access.users, *(holder for holder in first if holder != CLOUD)]))

    @property
    def room(self) -> int:
        """Sequences that every holder has to have room for: the API's, and after them the guests'."""
        if self.access.guests == 0 or (
            self.spans and not self.may_use
        ):  # without spans a device may still get the first
            return self.limits.sequences
        return self.limits.sequences + (_GUESTS if self.access.guests is None else self.access.guests)

    @property
    def boundaries(self) -> list[int]:
        """Numbers of blocks that a device which uses the chain may have itself."""
        return [span.first for span in self.spans]

    def span_of(self, device: str) -> SpanConfig:
        return next(span for span in self.spans if device in span.holders)

    @classmethod
    def _named_as_now(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {_NAMES_OF_0_1.get(name, name): value for name, value in values.items()}


def parse_stages(text: str) -> tuple[SpanConfig, ...]:
    """`laptop:0-8,cloud:8-24` -> spans. `auto` -> none. Several holders of one span: `laptop+desktop:0-8`.

    Raises BadRequest for what cannot be read; `check_spans` says whether a model can be served so.
    """
    if text.strip() == "auto":
        return ()
    spans: list[SpanConfig] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part)
        if match is None:
            raise BadRequest(f"--stages {part.strip()!r}: write HOLDER:FIRST-LAST, as in laptop:0-8,cloud:8-24")
        holders = tuple(match[1].split("+"))
        if not all(holders):
            raise BadRequest(f"--stages {part.strip()!r}: a holder without a name")
        spans.append(SpanConfig(int(match[2]), int(match[3]), holders))
    return tuple(spans)


def parse_adapter(text: str) -> AdapterConfig:
    """`NAME=DIR`, or `DIR`, whose last part is the name then; as a full path, where the folder is on this machine."""
    name, equals, folder = text.partition("=")
    if not equals or "/" in name:
        name, folder = "", text
    path = Path(folder).expanduser().resolve()
    return AdapterConfig(name if equals and name else path.name, str(path) if path.is_dir() else folder)


def format_stages(spans: Sequence[SpanConfig]) -> str:
    """As `parse_stages` reads it."""
    return ",".join(f"{'+'.join(span.holders)}:{span}" for span in spans)


def check_spans(spans: Sequence[SpanConfig], layers: int) -> None:
    """Raises BadRequest for blocks that are missing, held twice or not in a model of so many layers, and for a device
    that is named twice."""
    at = 0
    for span in spans:
        where = format_stages([span])
        if span.first >= span.last or span.last > layers:
            raise BadRequest(f"stages: there are no blocks {where} in this model, which has 0-{layers}")
        if span.first > at:
            raise BadRequest(f"stages: nobody holds blocks {at}-{span.first}; name them in rising order")
        if span.first < at:
            raise BadRequest(f"stages: blocks {span.first}-{min(at, span.last)} of {where} are held already")
        at = span.last
    if at < layers:
        raise BadRequest(f"stages: nobody holds blocks {at}-{layers} of this model")
    devices = [holder for span in spans for holder in span.holders if holder != CLOUD]
    twice = next((name for name in devices if devices.count(name) > 1), None)
    if twice is not None:
        raise BadRequest(f"stages: device {twice} is named twice; it can hold one range of blocks")


def memory_of(config: PretrainedConfig, serving: ServingConfig) -> ServedMemory:
    """What the parts of a served model take at those who hold them. config: of the whole model."""
    from isthmus.split.plan.memory import ServedMemory  # torch: not for the command's `--help`

    return ServedMemory(config, serving.chain.weights, serving.room, serving.limits.context)
