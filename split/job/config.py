"""What a training job is: every choice of its submitter that both sides must agree on, checked once, here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from isthmus.split.errors import BadRequest
from isthmus.split.job.fields import at_least, one_of, setting
from isthmus.split.job.grouped import Grouped
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
class TrainingConfig(Grouped):
    """A split fine-tuning job. Steps, batches and sequences are counted for each device."""

    kind: ClassVar[str] = "training configuration"

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
            from isthmus.split.job.streams import remembers_samples  # this imports torch, which not every command needs

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
        """Steps of warm-up, of the share's way down, and between decisions.

        What was not chosen follows the number of steps.
        """
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
        """The learning rate of step 0 to steps - 1: linear warm-up, then the schedule down to 0."""
        chosen = self.optimizer
        if step < chosen.warmup_steps:
            return chosen.learning_rate * (step + 1) / chosen.warmup_steps
        done = (step - chosen.warmup_steps) / max(1, self.steps - chosen.warmup_steps)
        if chosen.schedule == "linear":
            return chosen.learning_rate * (1 - done)
        if chosen.schedule == "cosine":
            return chosen.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return chosen.learning_rate

    # These methods say what happens after `done` steps. Both sides know it from here, so no message has to say it.

    def aggregates_after(self, done: int) -> bool:
        """Whether the adapters are aggregated after `done` steps."""
        return self._rests_after(done) and done > 0 and self.averages

    @property
    def _rests_every(self) -> int:
        """Number of steps between the places at which a checkpoint or an evaluation may be."""
        return self.devices.aggregate_every if self.averages else 1

    def _rests_after(self, done: int) -> bool:
        return done % self._rests_every == 0 or done == self.steps

    def checkpoints_after(self, done: int) -> bool:
        """Whether a multiple of checkpoint_every was passed since the last aggregation, or the job ends here."""
        before, every = (done - 1) // self._rests_every * self._rests_every, self.devices.checkpoint_every
        passed = done // every > before // every
        return self._rests_after(done) and (passed or done == self.steps)

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation follows `done` steps. It is of the aggregated adapter, so it falls on aggregations."""
        if self.text.validation_fraction == 0:
            return False
        if done in (0, self.steps):
            return True
        every = self.devices.evaluate_every
        if not every or not self._rests_after(done):
            return False
        before = (done - 1) // self._rests_every * self._rests_every
        return done // every > before // every

    @classmethod
    def _named_as_now(cls, values: dict[str, Any]) -> dict[str, Any]:
        if isinstance(values.get("dlora"), bool):
            values["method"] = DLORA if values.pop("dlora") else SPLITLORA
        if values.get("active_fraction", 1) == 1 and not values.get("bytes_per_step"):
            for name in ("kill_warmup", "kill_anneal", "kill_interval"):  # version 0.1 wrote them down for every job
                values.pop(name, None)
        return values
