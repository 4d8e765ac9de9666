"""What a training job is: every choice of the user that both sides must agree on, checked once, here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from isthmus.split.errors import BadRequest
from isthmus.split.job.fields import at_least, one_of, setting
from isthmus.split.job.groups import (
    KEEP,
    DevicesSettings,
    DloraSettings,
    LinkSettings,
    LoraSettings,
    OptimizerSettings,
    TextSettings,
)
from isthmus.split.job.shapes import AVERAGE, STACKING

SPLITLORA, DLORA = "splitlora", "dlora"
METHODS = (SPLITLORA, DLORA)


@dataclass(frozen=True)
class TrainingConfig:
    """A split fine-tuning job. Steps, batches and sequences are counted for each device."""

    method: str = setting(SPLITLORA, "splitlora or dlora: who trains what.", option=False)
    steps: int = setting(100, "Optimiser steps.")
    batch_size: int = setting(8, "Sequences a device a step.")
    seed: int = setting(0, "Of LoRA's first values and of the batches.")
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    text: TextSettings = TextSettings()
    link: LinkSettings = LinkSettings()
    devices: DevicesSettings = DevicesSettings()
    dlora: DloraSettings = DloraSettings()

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            at_least(name, getattr(self, name), least)
        if self.link.micro_batches > self.batch_size:
            raise BadRequest(f"micro_batches is {self.link.micro_batches}; a batch has {self.batch_size} sequences")
        if self.method == DLORA:
            self._check_dlora()
        elif self.dlora.kills or self.dlora.aggregate or self.dlora.killed != KEEP:
            raise BadRequest("active_fraction, bytes_per_step, killed and aggregate are for method dlora")
        self._check_kill_times()

    def _check_dlora(self) -> None:
        dlora, devices = self.dlora, self.devices
        if devices.labels != "device":
            raise BadRequest("method dlora keeps the labels on the devices: leave labels at the server out")
        if self.link.stale:
            raise BadRequest("method dlora has no overlap stale: its micro-batches overlap by themselves")
        if not 0 < dlora.active_fraction <= 1:
            raise BadRequest(f"active_fraction is {dlora.active_fraction}; choose a share above 0, up to 1")
        at_least("bytes_per_step", dlora.bytes_per_step, 0)
        if not dlora.aggregate and (devices.aggregation or devices.aggregate_every != DevicesSettings.aggregate_every):
            raise BadRequest("aggregation and aggregate_every: method dlora averages only where aggregate asks for it")
        if devices.aggregation not in ("", AVERAGE):
            raise BadRequest(f"aggregation {devices.aggregation} is not for method dlora, which averages A and B")
        if dlora.aggregate and dlora.kills:
            raise BadRequest("an average of modules that some devices have killed means nothing: leave aggregate out")
        if dlora.active_fraction < 1 and dlora.bytes_per_step:
            raise BadRequest("active_fraction and bytes_per_step are two ways to say one thing: choose one")
        if dlora.bytes_per_step and dlora.killed == KEEP:
            raise BadRequest(
                "bytes_per_step cannot be held with killed keep, whose modules are still exchanged: choose merge (the "
                "coordinator gets their values and applies them) or drop (the model goes on without them)"
            )
        if self.link.codec != "auto":
            from isthmus.split.job.streams import remembers_samples  # torch comes with it: not for every command

            if remembers_samples(self.link.codec):
                raise BadRequest("ef and delta remember samples, which modules' rows are not: choose a codec without")

    def _check_kill_times(self) -> None:
        chosen = self.dlora.kill_warmup, self.dlora.kill_anneal, self.dlora.kill_interval
        if not self.dlora.kills:
            if chosen != (None, None, None):
                raise BadRequest(
                    "kill_warmup, kill_anneal and kill_interval are for method dlora with active_fraction or "
                    "bytes_per_step: give one of these, or leave them out"
                )
            return
        warmup, anneal, interval = self.kill_times
        at_least("kill_warmup", warmup, 1)
        at_least("kill_anneal", anneal, 0)
        at_least("kill_interval", interval, 1)
        if warmup + anneal >= self.steps:
            raise BadRequest(
                f"kill_warmup {warmup} and kill_anneal {anneal} leave none of {self.steps} steps at the share that was "
                "asked for: choose fewer, or more steps"
            )

    @property
    def kill_times(self) -> tuple[int, int, int]:
        """Steps of warm-up, of the share's way down, and between decisions. What was not chosen follows the steps."""
        dlora = self.dlora
        warmup = max(1, min(30, self.steps * 15 // 100)) if dlora.kill_warmup is None else dlora.kill_warmup
        anneal = min(100, self.steps * 35 // 100) if dlora.kill_anneal is None else dlora.kill_anneal
        return warmup, anneal, 10 if dlora.kill_interval is None else dlora.kill_interval

    @property
    def averages(self) -> bool:
        """Whether the devices' adapters become one every `aggregate_every` steps."""
        return self.method != DLORA or self.dlora.aggregate

    @property
    def devices_train_all(self) -> bool:
        """Whether the devices train all modules, those of the coordinator's blocks too."""
        return self.method == DLORA

    @property
    def starts_anew(self) -> bool:
        """Whether a device begins anew after an aggregation, its optimiser included."""
        return self.devices.aggregation == STACKING

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0..steps-1: linear warm-up, then the schedule down to 0."""
        chosen = self.optimizer
        if step < chosen.warmup_steps:
            return chosen.learning_rate * (step + 1) / chosen.warmup_steps
        done = (step - chosen.warmup_steps) / max(1, self.steps - chosen.warmup_steps)
        if chosen.schedule == "linear":
            return chosen.learning_rate * (1 - done)
        if chosen.schedule == "cosine":
            return chosen.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return chosen.learning_rate

    # What happens once `done` steps are done. Both sides know it from here, so no message has to say it.

    def aggregates_after(self, done: int) -> bool:
        """Whether adapters are averaged then."""
        return self._rests_after(done) and done > 0 and self.averages

    @property
    def _rests_every(self) -> int:
        """Steps between places at which a checkpoint or an evaluation may be."""
        return self.devices.aggregate_every if self.averages else 1

    def _rests_after(self, done: int) -> bool:
        return done % self._rests_every == 0 or done == self.steps

    def checkpoints_after(self, done: int) -> bool:
        """Whether a multiple of checkpoint_every was passed since the last aggregation, or the job ends here."""
        before, every = (done - 1) // self._rests_every * self._rests_every, self.devices.checkpoint_every
        passed = done // every > before // every
        return self._rests_after(done) and (passed or done == self.steps)

    def evaluates_after(self, done: int) -> bool:
        """Evaluation is of the averaged adapter, so it falls on aggregations, like checkpoints."""
        if self.text.validation_fraction == 0:
            return False
        if done in (0, self.steps):
            return True
        every = self.devices.evaluate_every
        if not every or not self._rests_after(done):
            return False
        before = (done - 1) // self._rests_every * self._rests_every
        return done // every > before // every

    # As names and values.

    @classmethod
    def of(cls, **values: Any) -> Self:
        """A job with these values of settings, by their names whatever the group; the others are the defaults."""
        return cls().but(**values)

    def but(self, **values: Any) -> Self:
        """This job with other values of some settings. Raises BadRequest for a name that there is not."""
        groups: dict[str, dict[str, Any]] = {}
        known = {name: (group, field.name) for name, group, field in settings()}
        for name, value in values.items():
            if name not in known:
                raise BadRequest(f"unknown training options: {name}; is the other side a newer version?")
            group, field_name = known[name]
            groups.setdefault(group, {})[field_name] = value
        changed: dict[str, Any] = groups.pop("", {})
        for group, chosen in groups.items():
            changed[group] = dataclasses.replace(getattr(self, group), **chosen)
        return dataclasses.replace(self, **changed)

    def to_json(self) -> str:
        """All settings, in their groups."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote, or version 0.1, which had no groups.

        Raises BadRequest for text that is not a JSON object of known fields with values of their types.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise BadRequest(f"the training configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise BadRequest("the training configuration is not a JSON object")
        return cls.of(**_checked(_flat(values)))


def settings() -> Iterator[tuple[str, str, dataclasses.Field[Any]]]:
    """All settings of a job: the name that is theirs alone, their group (empty: none), the field."""
    for field in dataclasses.fields(TrainingConfig):
        if not dataclasses.is_dataclass(field.default):
            yield field.name, "", field
            continue
        for one in dataclasses.fields(field.default):
            option = one.metadata["option"]
            yield option if one.name == "name" else one.name, field.name, one


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """By the names that are theirs alone: groups opened, and version 0.1's own way to say some things translated."""
    flat: dict[str, Any] = {}
    groups = {group for _, group, _ in settings() if group}
    names = {(group, field.name): name for name, group, field in settings()}
    for key, value in values.items():
        if key in groups and isinstance(value, Mapping):
            for inner, one in value.items():
                flat[names.get((key, inner), f"{key}.{inner}")] = one
        elif key == "dlora" and isinstance(value, bool):
            flat["method"] = DLORA if value else SPLITLORA
        else:
            flat[key] = value
    if flat.get("active_fraction", 1) == 1 and not flat.get("bytes_per_step"):
        for name in ("kill_warmup", "kill_anneal", "kill_interval"):  # version 0.1 told them of every job
            flat.pop(name, None)
    return flat


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Raises BadRequest for a name that there is not, or a value of another type."""
    known = {name: field for name, _, field in settings()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise BadRequest(f"unknown training options: {', '.join(unknown)}; is the other side a newer version?")
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = value = tuple(value)
        if not _fits(known[name].type, value):
            raise BadRequest(f"training option {name} has the value {value!r}; it must be {known[name].type}")
    return values


def _fits(annotation: object, value: object) -> bool:
    if annotation == "tuple[str, ...]":
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    allowed: dict[object, tuple[type, ...]] = {
        "int": (int,),
        "int | None": (int, type(None)),
        "bool": (bool,),
        "float": (int, float),
        "str": (str,),
        "str | None": (str, type(None)),
    }
    return isinstance(value, allowed[annotation]) and isinstance(value, bool) == (annotation == "bool")
