"""What is served and by whom: spans of blocks, each with its holders."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from isthmus.split.errors import BadRequest
from isthmus.split.inference.exits import parse_exit
from isthmus.split.inference.local import EARLY, NONE
from isthmus.split.inference.wire import codec_for_hidden_states
from isthmus.split.plan.memory import ServedMemory
from isthmus.split.runtime.choose import AUTO, check_runtime
from isthmus.split.tls import check_name

CLOUD = "cloud"  # as a holder: an actor at the coordinator
_GUESTS = 4  # sequences that are kept for devices which use the chain, where nobody says how many
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


@dataclass(frozen=True)
class ServingConfig:
    """One served model. spans: none: all at the coordinator. context: tokens of a sequence, 0: as many as the model
    takes, up to 4096; sequences: at the same time; queue: requests that may wait.

    key_sha256: of the API key, hexadecimal; empty: none is needed. patience: seconds that an answer waits for a holder.
    http_certificate, http_key: PEM files at the coordinator, for TLS; empty: HTTP is not encrypted.
    draft: NONE, LOOKUP, or a model at the coordinator. exit_threshold: as `parse_exit`.

    users: devices that may use the chain themselves, beside those that hold the first span; guests: sequences for them,
    beside the others; None: 4 if there is anybody who may.
    adapters: of LoRA, chosen by a request's model name.
    """

    spans: tuple[SpanConfig, ...]
    name: str
    context: int = 0
    sequences: int = 8
    queue: int = 64
    chunk: int = 256
    codec: str = "none"
    runtime: str = AUTO
    weights: str = "float32"
    http_host: str = "127.0.0.1"
    http_port: int = 0
    http_certificate: str = ""
    http_key: str = ""
    key_sha256: str = ""
    patience: float = 60.0
    draft: str = NONE
    exit_threshold: str = ""
    users: tuple[str, ...] = ()
    guests: int | None = None
    adapters: tuple[AdapterConfig, ...] = ()

    def __post_init__(self) -> None:
        for name, least, most in (("sequences", 1, 1024), ("queue", 0, 100_000), ("chunk", 1, 4096)):
            if not least <= getattr(self, name) <= most:
                raise BadRequest(f"{name} {getattr(self, name)}: choose {least} to {most}")
        if not 0 < self.patience < 86400:
            raise BadRequest(f"patience {self.patience}: choose seconds, more than 0")
        if self.guests is not None and not bool(self.users) <= self.guests <= 1024:
            raise BadRequest(f"guests {self.guests}: choose {int(bool(self.users))} to 1024")
        for user in self.users:
            check_name(user)
        names = ["", self.name]
        for adapter in self.adapters:
            if adapter.name in names:
                raise BadRequest(
                    f"no adapter can be called {adapter.name!r} here: it is the model's name, another adapter's, or "
                    "none; write --adapter NAME=DIR"
                )
            names.append(adapter.name)
        if bool(self.http_certificate) != bool(self.http_key):
            raise BadRequest("TLS needs both --tls-certificate and --tls-key")
        codec_for_hidden_states(self.codec)
        check_runtime(self.runtime, self.weights)
        if self.draft == EARLY:
            raise BadRequest("--draft early: the gateway holds no blocks; choose lookup or a model")
        if parse_exit(self.exit_threshold) and self.draft != NONE:
            raise BadRequest("--exit-threshold and --draft exclude each other")

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
        if self.guests == 0:
            return []
        first = self.spans[0].holders if self.spans else ()
        return list(dict.fromkeys([*self.users, *(holder for holder in first if holder != CLOUD)]))

    @property
    def room(self) -> int:
        """Sequences that every holder has to have room for: the API's, and after them the guests'."""
        if self.guests == 0 or (self.spans and not self.may_use):  # without spans a device may still get the first
            return self.sequences
        return self.sequences + (_GUESTS if self.guests is None else self.guests)

    @property
    def boundaries(self) -> list[int]:
        """Numbers of blocks that a device which uses the chain may have itself."""
        return [span.first for span in self.spans]

    def span_of(self, device: str) -> SpanConfig:
        return next(span for span in self.spans if device in span.holders)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServingConfig:
        """Raises BadRequest for what is not one."""
        try:
            raw = json.loads(text)
            spans = tuple(
                SpanConfig(int(s["first"]), int(s["last"]), tuple(map(str, s["holders"]))) for s in raw["spans"]
            )
            adapters = tuple(AdapterConfig(str(a["name"]), str(a["folder"])) for a in raw.get("adapters", ()))
            users = tuple(map(str, raw.get("users", ())))
            return cls(**{**raw, "spans": spans, "adapters": adapters, "users": users})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadRequest(f"not a serving configuration: {error}") from None


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
    """What its parts take at those who hold them. config: of the whole model."""
    return ServedMemory(config, serving.weights, serving.room, serving.context)
