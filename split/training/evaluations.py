"""The losses on held-out text that devices report, summed to the job's perplexity."""

from __future__ import annotations

from collections.abc import Collection

from isthmus.protos.v1.events_pb2 import Evaluated, Event
from isthmus.split.job.events import Tell
from isthmus.split.training.perplexity import perplexity


class Evaluations:
    """Collects the devices' evaluations.

    perplexities: by step, those that are complete and were told.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._sums: dict[int, dict[str, tuple[float, int]]] = {}
        self.perplexities: dict[int, float] = {}

    def add(self, step: int, device: str, nll: float, tokens: int) -> None:
        """Adds what a device has reported.

        nll: in nats, summed over the predicted tokens of the device's held-out text.
        """
        self._sums.setdefault(step, {})[device] = (nll, tokens)

    def complete(self, awaited: Collection[str]) -> None:
        """Tells of each evaluation to which all awaited devices have contributed."""
        for step, sums in sorted(self._sums.items()):
            total, tokens = sum(loss for loss, _ in sums.values()), sum(count for _, count in sums.values())
            if step in self.perplexities or not set(awaited) <= sums.keys() or not tokens:
                continue
            self.perplexities[step] = perplexity(total, tokens)
            each = {device: perplexity(loss, count) for device, (loss, count) in sums.items() if count}
            told = Evaluated(step=step, perplexity=self.perplexities[step], tokens=tokens, devices=each)
            self._tell(Event(evaluation=told))
