"""A device's measurements of its link and its computing, for the stage's plans."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.protos.v1 import stage_pb2
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.device import Link
from isthmus.split.link.ladder import candidates
from isthmus.split.link.profile import LinkProfile, codec_seconds
from isthmus.split.plan.choose import DEVICE_WORK, RECENT
from isthmus.split.resources.ledger import Ledger

_PROBE_EVERY = 60.0  # seconds between probes of the link, unless it seems to have changed
_NOISE = 0.05  # seconds of waiting in a step that tell nothing


class Measurements:
    """What one device measures.

    hidden_size: the model's hidden size.
    """

    def __init__(self, config: TrainingConfig, ledger: Ledger, hidden_size: int) -> None:
        self._config, self._ledger, self._hidden_size = config, ledger, hidden_size
        self._profile, self._probed_at = LinkProfile(), -math.inf
        self._steps_done = 0
        self._looked_at = (0, 0.0)  # steps, and seconds of waiting for the link, at the last aggregation
        self._usual_wait: float | None = None  # seconds of waiting for the link in a step, after the last probe
        self._recently = (0, 0.0)  # steps, and seconds of computing, at the last aggregation

    def stepped(self) -> None:
        """Notes that a step is done."""
        self._steps_done += 1

    def take(self, link: Link) -> stage_pb2.Measured:
        """Takes the measurements; call it when nothing is under way.

        The link is probed only after some time, or if it seems to have changed, because that takes some round trips.
        """
        if time.monotonic() - self._probed_at > _PROBE_EVERY or self._link_has_changed():
            self._profile, self._probed_at = link.measure(), time.monotonic()
            self._usual_wait = None
        measured = self._profile.to_proto()
        coding = codec_seconds(candidates(self._config), self._hidden_size)
        slow = max(1.0, self._ledger.slow_down)
        measured.codec_seconds.update({name: slow * seconds for name, seconds in coding.items()})
        steps = max(1, self._steps_done)
        for name, seconds in self._ledger.compute_by_work.items():
            if name in DEVICE_WORK:
                measured.compute_seconds[name] = seconds / steps
        done, computed = self._recently
        if self._steps_done > done:
            measured.compute_seconds[RECENT] = (self._computed - computed) / (self._steps_done - done)
        self._recently = self._steps_done, self._computed
        return measured

    @contextmanager
    def not_of_steps(self) -> Iterator[None]:
        """Context in which waiting for the link does not count as a step's."""
        waited = self._ledger.link_seconds
        yield
        self._looked_at = self._looked_at[0], self._looked_at[1] + self._ledger.link_seconds - waited

    @property
    def _computed(self) -> float:
        """Seconds of computing in training."""
        return sum(self._ledger.compute_by_work.get(name, 0.0) for name in DEVICE_WORK)

    def _link_has_changed(self) -> bool:
        """Whether the steps since the last look waited much longer or shorter for the link than those before."""
        steps, seconds = self._steps_done - self._looked_at[0], self._ledger.link_seconds - self._looked_at[1]
        self._looked_at = self._steps_done, self._ledger.link_seconds
        if not steps:
            return False
        wait, usual = seconds / steps, self._usual_wait
        self._usual_wait = wait if usual is None else usual
        return usual is not None and not usual / 2 - _NOISE < wait < 1.5 * usual + _NOISE
