"""The result of an aggregation, and the plain way to aggregate: A and B averaged, the same bytes for all devices."""

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
    """What an aggregation gives.

    average: the adapter that all devices now have, flat; None where their adapters differ.
    answers: the answer to each device's AGGREGATE, by device.
    method, error: the method's name and its distance from the exact aggregation, for watchers.
    """

    average: Tensor | None
    answers: Mapping[str, Frame]
    method: str
    error: float


class Averages:
    """Averaging for devices whose adapters have the same matrices.

    initial: the adapter that each device begins with, by name.
    """

    def __init__(self, config: TrainingConfig, initial: Mapping[str, Tensor]) -> None:
        self._averager = Averager(config, initial)
        self._like = dict(initial)
        self.initial = flatten(initial)
        self.shapes = shapes_of(initial)

    def unfit(self, shares: Mapping[str, Share], last: Tensor | None) -> set[str]:
        """The devices whose adapters have values that nobody could compute with.

        last: the average before, flat; None if there was none.
        """
        return self._averager.unfit({device: share.values for device, share in shares.items()}, last)

    def aggregate(self, step: int, shares: Mapping[str, Share], last: Tensor | None) -> AggregationResult:
        """Averages the adapters, weighted by the devices' numbers of training sequences.

        last: the average before, flat; None if there was none.
        """
        total = sum(share.samples for share in shares.values())
        weighted = [(share.values, share.samples / total) for share in shares.values()]
        error = self._averager.error(weighted, last)
        average, encoded = self._averager.average(weighted, last)
        answers = dict.fromkeys(shares, Frame(Phase.AGGREGATE, step, encoded=encoded))
        return AggregationResult(average, answers, AVERAGE, error)

    def named(self, average: Tensor | None) -> dict[str, Tensor]:
        """A flat average, by names in the whole model; for None, the adapter that the devices began with."""
        return unflatten(self._like, self.initial if average is None else average)
