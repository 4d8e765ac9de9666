"""The average of the devices' adapters, as all of them get it: the same bytes for everyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.aggregation.adapter_coder import AdapterCoder
from isthmus.split.aggregation.average import Average
from isthmus.split.codecs.finite import can_be_used
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.factors import Factors, difference_squared, norm_squared, stacked
from isthmus.split.lora.frozen import Frozen
from isthmus.split.lora.lora import A, factors_of, flatten, shapes_of, unflatten


@dataclass(frozen=True)
class Share:
    """A device's contribution to an aggregation.

    values: what the device sent, (values,). samples: the number of its training sequences, by which it is weighted.
    """

    values: Tensor
    samples: int


@dataclass(frozen=True)
class Merged:
    """The result of an aggregation.

    answers: the message for each device. frozen: what each device adds to the frozen part of its model.
    server: new values of the server's own adapter, by name. server_frozen: all of its frozen part, by module.
    error: relative error of the result's products against the exact average of the products (Frobenius norms).
    """

    answers: Mapping[str, stage_pb2.Tensor]
    frozen: Mapping[str, Frozen] = field(default_factory=dict)
    server: Mapping[str, Tensor] = field(default_factory=dict)
    server_frozen: Mapping[str, Factors] = field(default_factory=dict)
    error: float = 0.0


class Averager:
    """Averages A and B of adapters that are all alike."""

    def __init__(self, config: TrainingConfig, initial: Mapping[str, Tensor]) -> None:
        """Take the adapter that every device starts with, by name."""
        self._coder = AdapterCoder(config, shapes_of(initial))
        self._initial = flatten(initial)
        self._like = dict(initial)

    def unfit(self, sent: Mapping[str, Tensor], last: Tensor | None) -> set[str]:
        """The devices whose adapters cannot be used. sent: what each device sent, (values,)."""
        base = self._initial if last is None else last
        return {device for device, values in sent.items() if not can_be_used([self._coder.received(values, base)])}

    def error(self, shares: Sequence[tuple[Tensor, float]], last: Tensor | None) -> float:
        """Compute the relative error of averaging A and B each for itself, as in `Merged`, for these shares."""
        base = self._initial if last is None else last
        own = [(unflatten(self._like, self._coder.received(sent, base)), weight) for sent, weight in shares]
        lost = norm = 0.0
        for module in [name.removesuffix(A) for name in self._like if name.endswith(A)] if len(own) > 1 else []:
            parts = [(factors_of(values, module), weight) for values, weight in own]
            exact = stacked(parts)
            lost += difference_squared(Average().merge(parts, exact.rank), exact)
            norm += norm_squared(exact)
        return float((lost / norm) ** 0.5) if norm else 0.0

    def average(self, shares: Sequence[tuple[Tensor, float]], last: Tensor | None) -> tuple[Tensor, stage_pb2.Tensor]:
        """Average what the devices sent.

        shares: each device's values, (values,), and its weight. last: the average before; None: there was none.
        Returns the average as every device will have it, (values,), and the message that brings it to them.
        """
        base = self._initial if last is None else last
        sent = torch.stack([tensor * weight for tensor, weight in shares]).sum(0)
        return self._coder.message(self._coder.received(sent, base), base)
