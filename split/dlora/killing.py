"""Kill and Revive on a device: its controller (kill_and_revive.py), with what this job knows of its modules."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from isthmus.split.dlora.kill_and_revive import Controller, Decision
from isthmus.split.dlora.kill_policy import KillPolicy
from isthmus.split.dlora.module_costs import costs_of
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import KEEP
from isthmus.split.lora.sites import Layout
from isthmus.split.resources.traffic import Traffic

log = logging.getLogger(__name__)

_PROBE_SHARE, _PROBE_STEPS = 0.8, 40  # most of the budget takes turns: better than to trust in early scores (measured)
_OF_MODULES = ("forward modules", "backward modules")
_OF_STEPS = (*_OF_MODULES, "forward", "backward", "step")  # kinds of messages


class Killing:
    """Which modules train, by number. `decide(step)` before a step, `observe` after its gradients are there."""

    def __init__(
        self,
        layout: Layout,
        parameters: Mapping[str, nn.Parameter],
        config: TrainingConfig,
        traffic: Traffic,
    ) -> None:
        self._layout, self._parameters, self._config, self._traffic = layout, parameters, config, traffic
        self._costs = costs_of(layout)
        self._all = frozenset(module.number for module in layout.modules)
        self._controller: Controller | None = None
        self._began: tuple[int, int, int] | None = None  # this run's first step; bytes of modules, and in all, by then
        if not config.dlora.kills:
            return
        if config.dlora.killed == KEEP:
            log.warning("killed modules are kept, and still exchanged: that saves their gradients here, not messages")
        self._warmup, anneal, interval = config.kill_times
        turn = min(_PROBE_STEPS, max(1, config.steps // 10))
        policy = KillPolicy(
            active_fraction=config.dlora.active_fraction,  # 1 with bytes_per_step: until those are measured
            warmup_steps=self._warmup,
            anneal_steps=anneal,
            interval=interval,
            killed=config.dlora.killed,
            probe_share=_PROBE_SHARE,
            probe_steps=turn,
            hold_steps=turn,
            probe_interval=interval,
        )
        self._controller = Controller(self._costs, policy, config.steps)

    def decide(self, step: int) -> frozenset[int]:
        """What trains at this step; the empty set: nothing does any more."""
        if self._controller is None or not self._all:
            return self._all
        if self._began is None:
            self._began = step, *self._counts()
        if self._config.dlora.bytes_per_step and step >= self._warmup:
            self._ration(step)
        decision = self._controller.decide(step)
        if decision.killed or decision.revived:
            log.info("step %d: %s", step, told(decision, len(self._all)))
        return frozenset(self._layout.by_name[name].number for name in decision.active)

    @torch.no_grad()
    def observe(self, step: int, loss: float, trained: frozenset[int]) -> None:
        """A module's responsiveness is the norm of its gradient, which says how much the loss would change with it."""
        if self._controller is not None:
            self._controller.observe(step, loss, {name: self._norm(name) for name in self._layout.names(trained)})

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {} if self._controller is None else self._controller.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What `state` gave. Nothing (a device that comes without its record) leaves the controller as it is."""
        if self._controller is not None and state:
            policy = KillPolicy(**state["policy"])
            self._controller = Controller(self._costs, policy, self._config.steps)
            self._controller.load_state(state)

    def _norm(self, name: str) -> float:
        gradients = (self._parameters[each].grad for each in self._layout.by_name[name].shapes(0))
        return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None))

    def _ration(self, step: int) -> None:
        """The share of the modules' bytes that keeps a step within bytes_per_step, from the bytes of the warm-up."""
        controller = self._controller
        assert controller is not None
        if controller.policy.active_fraction < 1 or self._began is None:
            return
        first, modules_before, all_before = self._began
        modules, everything = self._counts()
        steps = step - first
        if not steps:  # no step of the warm-up was this run's: wait for one that it has measured
            return
        of_modules, rest = (modules - modules_before) / steps, (everything - all_before) / steps
        rest -= of_modules
        wanted = self._config.dlora.bytes_per_step
        fraction = min(1.0, max(0.0, (wanted - rest) / max(1.0, of_modules)))
        if fraction == 1:
            return
        line = "step %d: modules took %.0f bytes a step, all else %.0f: their share is %.1f %% from now on"
        log.info(line, step, of_modules, rest, 100 * fraction)
        if rest > wanted:
            log.warning("bytes_per_step %d cannot be held: %.0f a step are of other than modules", wanted, rest)
        state = controller.state()
        state["policy"] = asdict(replace(controller.policy, active_fraction=fraction))
        self.load_state(state)

    def _counts(self) -> tuple[int, int]:
        """Bytes both ways so far: of modules in training, and of all that steps have."""
        traffic = self._traffic
        sizes = {key: traffic.payload_bytes[key] + traffic.overhead_bytes[key] for key in list(traffic.messages)}
        modules = sum(size for (_, kind, _), size in sizes.items() if kind in _OF_MODULES)
        return modules, sum(size for (_, kind, _), size in sizes.items() if kind in _OF_STEPS)


def told(decision: Decision, count: int) -> str:
    """A decision in a line."""
    changes = [f"killed {', '.join(decision.killed)}"] if decision.killed else []
    changes += [f"revived {', '.join(decision.revived)}"] if decision.revived else []
    return f"{'; '.join(changes)} ({decision.reason}); {len(decision.active)} of {count} modules train"
