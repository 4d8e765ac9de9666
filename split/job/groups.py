"""The groups of a job's configuration. The text beside a field is its help, on the command line and in the documents.

A field's name is unique over all groups, so that it is also the name of the option: `learning_rate` is
`--learning-rate`, and `optimizer: {learning_rate: …}` in a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from isthmus.split.errors import BadRequest
from isthmus.split.job.fields import at_least, one_of, setting
from isthmus.split.job.shapes import AGGREGATIONS, parse_by_name

LABELS = ("device", "server")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "float32", "bfloat16")
OVERLAPS = ("exact", "stale")
KEEP, MERGE, DROP = "keep", "merge", "drop"
KILLED = (KEEP, MERGE, DROP)
"""What becomes of a killed module.

Its branch stays at the device, frozen (keep); the coordinator applies it, for which it is given A and B (merge); or the
model goes on without it (drop). Only merge and drop exchange nothing for it.
"""


@dataclass(frozen=True)
class LoraSettings:
    """LoRA: how large the adapters are, and where."""

    rank: int = setting(
        8,
        "Of LoRA; auto: as a device's speed and link allow. For single devices: NAME=RANK,NAME=auto,RANK. "
        "0: such a device trains nothing. The largest number is the job's, and that of the coordinator's blocks.",
        by_name="ranks",
    )
    ranks: str = setting("", "Other ranks for devices by name, or auto; empty: rank for all.", option=False)
    alpha: float = setting(16.0, "Of LoRA: its output is scaled by ALPHA/RANK.")
    target_modules: tuple[str, ...] = setting((), "NAME,NAME,...; empty: the architecture's usual ones.")

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)
        numbers = parse_by_name("ranks", self.ranks, 0).numbers if self.ranks else []
        if max(numbers, default=0) > self.rank:
            raise BadRequest(f"ranks {self.ranks}: no device can have more than the job's rank, {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise BadRequest(f"alpha is {self.alpha}; choose a number above 0")

    @property
    def scale(self) -> float:
        """What a module's product B A is multiplied by, whatever the rank of a device's own adapter."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser of the LoRA values, its schedule, and what it computes in."""

    name: str = setting("adamw", "adamw or sgd.", option="optimizer")
    learning_rate: float = setting(1e-3, "The largest of the schedule.")
    weight_decay: float = setting(0.0, "Of the LoRA values.")
    schedule: str = setting("cosine", "constant, or linear or cosine down to 0.")
    warmup_steps: int = setting(0, "Steps of linear warm-up.")
    max_gradient_norm: float = setting(1.0, "Clip the whole model's gradient to it; 0: do not.")
    precision: str = setting("auto", "float32, bfloat16, or auto: measured on each processor.")

    def __post_init__(self) -> None:
        one_of("optimizer", self.name, OPTIMIZERS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)
        for name in ("warmup_steps", "max_gradient_norm", "weight_decay"):
            at_least(name, getattr(self, name), 0)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise BadRequest(f"learning_rate is {self.learning_rate}; choose a number above 0")


@dataclass(frozen=True)
class TextSettings:
    """How the text in files becomes sequences."""

    sequence_length: int = setting(128, "Tokens of a sequence.")
    packing: str = setting("packed", "packed: text cut into full sequences. padded: a record a sequence.")
    text_column: str | None = setting(None, "The column of .csv and .jsonl files that is the text.")
    prompt_column: str | None = setting(None, "The column that is the prompt, which takes no loss.")
    completion_column: str | None = setting(None, "The column that is the completion, which takes the loss.")
    validation_fraction: float = setting(0.1, "Share of the text that is held out, by hash.")

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise BadRequest(f"sequence_length {self.sequence_length} leaves nothing to predict: choose 2 or more")
        if self.packing not in ("packed", "padded"):
            raise BadRequest(f"packing {self.packing!r} is not known: choose packed or padded")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise BadRequest("prompt_column and completion_column go together: give both or neither")
        if self.text_column is not None and self.prompt_column is not None:
            raise BadRequest("text_column and prompt_column exclude each other: give the text or prompt and completion")
        if self.prompt_column is not None and self.prompt_column == self.completion_column:
            raise BadRequest("prompt_column and completion_column are the same column: name two")
        if not 0 <= self.validation_fraction < 1:
            raise BadRequest(
                f"validation_fraction {self.validation_fraction} is not a share: choose 0 or more, below 1"
            )


@dataclass(frozen=True)
class LinkSettings:
    """What crosses the link, as what, and how much of it is under way at the same time."""

    codec: str = setting(
        "auto",
        "What crosses the link as what. auto: as the measured link makes it worth, within --error-budget. Or a codec "
        "of `isthmus codecs` for hidden states and gradients. Or KEY=CODEC;KEY=CODEC with KEY up, down, hidden, "
        "gradients, adapters, evaluation, hidden_up, ...; the rest is auto. none: float32.",
    )
    error_budget: float = setting(
        0.005, "By how much of it perplexity may be worse for compression, as `auto` aims at."
    )
    micro_batches: int = setting(
        0, "Parts of a step's batch that are under way at the same time; 0: as the link makes it worth."
    )
    overlap: str = setting(
        "exact",
        "exact. stale: a device begins its next step before the last gradient has come, with adapter values that are "
        "one step old: faster on a slow link, and another result.",
    )

    def __post_init__(self) -> None:
        one_of("overlap", self.overlap, OVERLAPS)
        at_least("micro_batches", self.micro_batches, 0)
        if not 0.0005 <= self.error_budget <= 0.1:
            raise BadRequest(
                f"error_budget is {self.error_budget}; choose from 0.0005 to 0.1, a share of the perplexity"
            )
        if self.codec != "auto":
            from isthmus.split.job.streams import choices  # this imports torch, which not every command's start needs

            choices(self.codec)  # raises for an unknown codec

    @property
    def stale(self) -> bool:
        return self.overlap == "stale"


@dataclass(frozen=True)
class DevicesSettings:
    """What is on the devices, and how often their adapters become one and are kept and judged."""

    labels: str = setting(
        "device",
        "device: text and labels are not sent (U-shaped split; docs/security.md says what a coordinator that attacks "
        "can still work out). server: the paper's form; the labels are the text, so THE COORDINATOR CAN READ THE TEXT.",
    )
    cut_layer: int = setting(
        1,
        "A device holds blocks 0..CUT-1. 0: only the embedding: it trains nothing, and what it sends is as good as "
        "the text, for the embedding can be looked up. auto: as its speed, memory and link allow. For single devices: "
        "NAME=CUT,NAME=auto,CUT (the last is for the rest).",
        option="cut",
        by_name="cuts",
    )
    cuts: str = setting("", "Other cuts for devices by name, or auto; empty: cut_layer for all.", option=False)
    aggregation: str = setting(
        "",
        "How the devices' adapters become one. average: A and B each for itself, an approximation, for equal ranks. "
        "padding: the same, with zeros in the place of ranks that a device does not have. stacking: exact; the sum of "
        "all rounds is kept frozen and grows. svd: the exact average, factorised anew to the job's rank. Empty: "
        "average where all ranks are equal, else svd. With dlora only average, and only with --aggregate.",
    )
    aggregate_every: int = setting(
        10, "Steps between averages of the devices' adapters; with dlora, takes --aggregate."
    )
    checkpoint_every: int = setting(50, "Steps between checkpoints; rounded up to an aggregation.")
    evaluate_every: int = setting(0, "Steps between evaluations; 0: before the first step and after the last.")

    def __post_init__(self) -> None:
        one_of("labels", self.labels, LABELS)
        one_of("aggregation", self.aggregation, ("", *AGGREGATIONS))
        if self.cuts:
            parse_by_name("cuts", self.cuts, 0)
        for name, least in (("aggregate_every", 1), ("checkpoint_every", 1), ("cut_layer", 0), ("evaluate_every", 0)):
            at_least(name, getattr(self, name), least)


@dataclass(frozen=True)
class DloraSettings:
    """Kill and Revive, and averages, of method dlora. See docs/dlora.md."""

    active_fraction: float = setting(
        1.0,
        "Kill and Revive goes down to modules that take this share of all modules' bytes; 1: it kills none. With "
        "--killed keep it saves the device's gradients only: bytes with merge or drop.",
    )
    bytes_per_step: int = setting(
        0, "Instead: down to so many bytes a step of a device, both ways. Takes --killed merge or drop."
    )
    killed: str = setting(
        KEEP,
        "A killed module. keep: frozen, and still exchanged, which saves no bytes. merge: frozen, and its values go to "
        "the coordinator, which applies it (the device's owner has to allow modules-leave). drop: left out.",
    )
    kill_warmup: int | None = setting(
        None, "Steps with all modules active, which score them. Left out: 15 % of the steps, 30 at most."
    )
    kill_anneal: int | None = setting(
        None, "Steps in which the share goes down from there. Left out: 35 % of the steps, 100 at most."
    )
    kill_interval: int | None = setting(None, "Steps between decisions. Left out: 10.")
    aggregate: bool = setting(
        False, "Average the devices' adapters every --aggregate-every steps (owners have to allow modules-leave)."
    )

    def __post_init__(self) -> None:
        one_of("killed", self.killed, KILLED)

    @property
    def kills(self) -> bool:
        """Whether Kill and Revive is at work."""
        return self.active_fraction < 1 or self.bytes_per_step > 0
