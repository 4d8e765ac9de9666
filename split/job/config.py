"""What a training job is: every choice of the user that both sides must agree on, checked once, here."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

from isthmus.split.data.documents import DataConfig
from isthmus.split.errors import BadRequest
from isthmus.split.job.shapes import AGGREGATIONS, AVERAGE, STACKING, parse_by_name

LABELS = ("device", "server")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "float32", "bfloat16")
OVERLAPS = ("exact", "stale")
KEEP, MERGE, DROP = "keep", "merge", "drop"
KILLED = (KEEP, MERGE, DROP)
"""What becomes of a killed module: its branch stays at the device, frozen; the cloud applies it (it has to be given A
and B for that); or the model goes on without it. Only the last two exchange nothing."""


@dataclass(frozen=True)
class TrainingConfig:
    """A split fine-tuning job. Steps, batches and sequences are counted for each device."""

    cut_layer: int = 1  # a device holds blocks 0..cut_layer-1
    cuts: str = ""  # `auto`, or other cuts for devices by name; empty: cut_layer for all (see split/job/shapes.py)
    labels: str = "device"  # who computes the loss: the device (U-shaped), or the server (which then reads the text)
    rank: int = 8  # of the job: the scale of all adapters is alpha / rank
    ranks: str = ""  # `auto`, or other ranks for devices by name; empty: rank for all
    aggregation: str = ""  # empty: average where all ranks are equal, else svd
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ()  # empty: the architecture's usual ones
    steps: int = 100
    batch_size: int = 8
    sequence_length: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    max_gradient_norm: float = 1.0  # 0: gradients are not clipped
    seed: int = 0
    precision: str = "auto"
    codec: str = "auto"  # of what crosses the link: see split/job/streams.py
    error_budget: float = 0.005  # share by which perplexity may be worse for compression, that `auto` aims at
    micro_batches: int = 0  # that a step's batch is cut into; 0: as the link makes it worth
    overlap: str = "exact"  # stale: a device begins its next forward before the last backward's answer has come
    aggregate_every: int = 10
    checkpoint_every: int = 50
    evaluate_every: int = 0  # 0: before the first step and after the last
    packing: str = "packed"
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    validation_fraction: float = 0.1
    dlora: bool = False  # the devices train all modules, those of the server's blocks too: see split/dlora
    active_fraction: float = 1.0  # of the modules' bytes, that Kill and Revive goes down to; 1: it kills none
    bytes_per_step: int = 0  # instead, a device's, both ways; 0: no limit
    kill_warmup: int | None = None  # steps with all modules active, which score them; None: see kill_times
    kill_anneal: int | None = None  # steps in which the share goes down from there
    kill_interval: int | None = None  # steps between decisions
    killed: str = KEEP  # a killed module is still asked for, or merged into what the server applies, or dropped
    aggregate: bool = False  # average the devices' adapters, which are personal otherwise

    def __post_init__(self) -> None:
        _one_of("labels", self.labels, LABELS)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("overlap", self.overlap, OVERLAPS)
        _one_of("killed", self.killed, KILLED)
        _one_of("aggregation", self.aggregation, ("", *AGGREGATIONS))
        for option, text in (("cuts", self.cuts), ("ranks", self.ranks)):
            numbers = parse_by_name(option, text, 0).numbers if text else []
            if option == "ranks" and max(numbers, default=0) > self.rank:
                raise BadRequest(f"ranks {text}: no device can have more than the job's rank, {self.rank}")
        for name in ("rank", "steps", "batch_size", "aggregate_every", "checkpoint_every"):
            _at_least(name, getattr(self, name), 1)
        for name in (
            "cut_layer",
            "warmup_steps",
            "max_gradient_norm",
            "evaluate_every",
            "seed",
            "weight_decay",
            "micro_batches",
        ):
            _at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise BadRequest(f"{name} is {value}; choose a number above 0")
        if self.micro_batches > self.batch_size:
            raise BadRequest(f"micro_batches is {self.micro_batches}; a batch has {self.batch_size} sequences")
        if not 0.0005 <= self.error_budget <= 0.1:
            raise BadRequest(
                f"error_budget is {self.error_budget}; choose from 0.0005 to 0.1, a share of the perplexity"
            )
        if self.codec != "auto":
            from isthmus.split.job.streams import choices  # torch comes with it: not for every command's start

            choices(self.codec)  # raises for a codec that there is not
        _ = self.data  # raises for what concerns the text
        if self.dlora:
            self._check_dlora()
        elif self.kills or self.aggregate or self.killed != KEEP:
            raise BadRequest("active_fraction, bytes_per_step, killed and aggregate are for method dlora")
        self._check_kill_times()

    def _check_dlora(self) -> None:
        if self.labels != "device":
            raise BadRequest("method dlora keeps the labels on the devices: leave labels at the server out")
        if self.stale:
            raise BadRequest("method dlora has no overlap stale: its micro-batches overlap by themselves")
        if not 0 < self.active_fraction <= 1:
            raise BadRequest(f"active_fraction is {self.active_fraction}; choose a share above 0, up to 1")
        _at_least("bytes_per_step", self.bytes_per_step, 0)
        if not self.aggregate and (self.aggregation or self.aggregate_every != TrainingConfig.aggregate_every):
            raise BadRequest("aggregation and aggregate_every: method dlora averages only where aggregate asks for it")
        if self.aggregation not in ("", AVERAGE):
            raise BadRequest(f"aggregation {self.aggregation} is not for method dlora, which averages A and B")
        if self.aggregate and self.kills:
            raise BadRequest("an average of modules that some devices have killed means nothing: leave aggregate out")
        if self.active_fraction < 1 and self.bytes_per_step:
            raise BadRequest("active_fraction and bytes_per_step are two ways to say one thing: choose one")
        if self.bytes_per_step and self.killed == KEEP:
            raise BadRequest(
                "bytes_per_step cannot be held with killed keep, whose modules are still exchanged: choose merge (the "
                "coordinator gets their values and applies them) or drop (the model goes on without them)"
            )
        if self.codec != "auto":
            from isthmus.split.job.streams import remembers_samples

            if remembers_samples(self.codec):
                raise BadRequest("ef and delta remember samples, which modules' rows are not: choose a codec without")

    def _check_kill_times(self) -> None:
        chosen = self.kill_warmup, self.kill_anneal, self.kill_interval
        if not self.kills:
            if chosen != (None, None, None):
                raise BadRequest(
                    "kill_warmup, kill_anneal and kill_interval are for method dlora with active_fraction or "
                    "bytes_per_step: give one of these, or leave them out"
                )
            return
        warmup, anneal, interval = self.kill_times
        _at_least("kill_warmup", warmup, 1)
        _at_least("kill_anneal", anneal, 0)
        _at_least("kill_interval", interval, 1)
        if warmup + anneal >= self.steps:
            raise BadRequest(
                f"kill_warmup {warmup} and kill_anneal {anneal} leave none of {self.steps} steps at the share that was "
                "asked for: choose fewer, or more steps"
            )

    @property
    def kills(self) -> bool:
        """Whether Kill and Revive is at work."""
        return self.active_fraction < 1 or self.bytes_per_step > 0

    @property
    def kill_times(self) -> tuple[int, int, int]:
        """Steps of warm-up, of the share's way down, and between decisions. What was not chosen follows the steps."""
        warmup = max(1, min(30, self.steps * 15 // 100)) if self.kill_warmup is None else self.kill_warmup
        anneal = min(100, self.steps * 35 // 100) if self.kill_anneal is None else self.kill_anneal
        return warmup, anneal, 10 if self.kill_interval is None else self.kill_interval

    @property
    def data(self) -> DataConfig:
        return DataConfig(
            sequence_length=self.sequence_length,
            packing=self.packing,
            text_column=self.text_column,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
            validation_fraction=self.validation_fraction,
        )

    @property
    def stale(self) -> bool:
        return self.overlap == "stale"

    @property
    def starts_anew(self) -> bool:
        """Whether a device begins anew after an aggregation, its optimiser included."""
        return self.aggregation == STACKING

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0..steps-1: linear warm-up, then the schedule down to 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate

    # What happens once `done` steps are done. Both sides know it from here, so no message has to say it.

    def aggregates_after(self, done: int) -> bool:
        return self._rests_after(done) and done > 0 and (self.aggregate or not self.dlora)

    @property
    def _rests_every(self) -> int:
        """Steps between places at which a checkpoint or an evaluation may be."""
        return 1 if self.dlora and not self.aggregate else self.aggregate_every

    def _rests_after(self, done: int) -> bool:
        return done % self._rests_every == 0 or done == self.steps

    def checkpoints_after(self, done: int) -> bool:
        """Whether a multiple of checkpoint_every was passed since the last aggregation, or the job ends here."""
        before = (done - 1) // self._rests_every * self._rests_every
        passed = done // self.checkpoint_every > before // self.checkpoint_every
        return self._rests_after(done) and (passed or done == self.steps)

    def evaluates_after(self, done: int) -> bool:
        """Evaluation is of the averaged adapter, so it falls on aggregations, like checkpoints."""
        if self.validation_fraction == 0:
            return False
        if done in (0, self.steps):
            return True
        if not self.evaluate_every or not self._rests_after(done):
            return False
        before = (done - 1) // self._rests_every * self._rests_every
        return done // self.evaluate_every > before // self.evaluate_every

    def to_json(self) -> str:
        chosen = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(chosen, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TrainingConfig:
        """Raises BadRequest for text that is not a JSON object of known fields with values of their types."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise BadRequest(f"the training configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise BadRequest("the training configuration is not a JSON object")
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise BadRequest(f"unknown training options: {', '.join(unknown)}; is the other side a newer version?")
        if "target_modules" in values:
            values["target_modules"] = tuple(values["target_modules"])
        for name, value in values.items():
            if not _fits(known[name].type, value):
                raise BadRequest(f"training option {name} has the value {value!r}; it must be {known[name].type}")
        if values.get("active_fraction", 1) == 1 and not values.get("bytes_per_step"):
            for name in ("kill_warmup", "kill_anneal", "kill_interval"):  # earlier versions told them of every job
                values.pop(name, None)
        return cls(**values)


def _fits(annotation: object, value: object) -> bool:
    allowed: dict[object, tuple[type, ...]] = {
        "int": (int,),
        "int | None": (int, type(None)),
        "bool": (bool,),
        "float": (int, float),
        "str": (str,),
        "str | None": (str, type(None)),
        "tuple[str, ...]": (tuple,),
    }
    return isinstance(value, allowed[annotation]) and isinstance(value, bool) == (annotation == "bool")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BadRequest(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise BadRequest(f"{name} is {value}; choose {least} or more")
