"""What an aggregation does with the devices' adapters, and the plain one: A and B averaged, the same bytes for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from isthmus.split.aggregation.averager import Averager, Share
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import AVERAGE
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.lora.lora import flatten, shapes_of, unflatten


@dataclass(frozen=True)
class AggregationResult:
    """What an aggregation gives. average: the adapter of all devices, flat; None where they differ. answers: to the
    devices' AGGREGATE frames. method, error: its name, and how far it is from the exact one, for watchers."""

    average: Tensor | None
    answers: Mapping[str, Frame]
    method: str
    error: float


class Averages:
    """Of devices whose adapters have the same matrices. initial: the adapter that each begins with, by name."""

    def __init__(self, config: TrainingConfig, initial: Mapping[str, Tensor]) -> None:
        self._averager = Averager(config, initial)
        self._like = dict(initial)
        self.initial = flatten(initial)
        self.shapes = shapes_of(initial)

    def unfit(self, shares: Mapping[str, Share], last: Tensor | None) -> set[str]:
        """The devices whose adapters nobody could compute with. last: the average before, flat; None: none was."""
        return self._averager.unfit({device: share.values for device, share in shares.items()}, last)

    def aggregate(self, step: int, shares: Mapping[str, Share], last: Tensor | None) -> AggregationResult:
        """Weighted by the devices' numbers of training sequences."""
        total = sum(share.samples for share in shares.values())
        weighted = [(share.values, share.samples / total) for share in shares.values()]
        error = self._averager.error(weighted, last)
        average, encoded = self._averager.average(weighted, last)
        answers = dict.fromkeys(shares, Frame(Phase.AGGREGATE, step, encoded=encoded))
        return AggregationResult(average, answers, AVERAGE, error)

    def named(self, average: Tensor | None) -> dict[str, Tensor]:
        """A flat average by names in the whole model. None: what the devices began with."""
        return unflatten(self._like, self.initial if average is None else average)
