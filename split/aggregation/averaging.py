"""The average of the devices' adapters, as all of them get it: the same bytes for everyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.aggregation.average import Average
from isthmus.split.codecs import CodecState, for_matrices, parse
from isthmus.split.finite import can_be_used
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import choices
from isthmus.split.link.coding import stream_seed
from isthmus.split.lora.factors import Factors, difference_squared, norm_squared, stacked
from isthmus.split.lora.frozen import Frozen
from isthmus.split.lora.lora import A, B, flatten, shapes_of, unflatten


@dataclass(frozen=True)
class Share:
    """What a device sent to an aggregation: (values,). samples: its training sequences."""

    values: Tensor
    samples: int


@dataclass(frozen=True)
class Merged:
    """What an aggregation gives. answers: a message for each device; frozen: what becomes a frozen part of its model.

    server: values that the server's adapter takes, by name; server_frozen: all of its frozen part, by module.
    error: of the result's products against the exact average of the products, relative (Frobenius).
    """

    answers: Mapping[str, stage_pb2.Tensor]
    frozen: Mapping[str, Frozen] = field(default_factory=dict)
    server: Mapping[str, Tensor] = field(default_factory=dict)
    server_frozen: Mapping[str, Factors] = field(default_factory=dict)
    error: float = 0.0


class Averager:
    """Where the adapters' codecs are not exact, what crosses is differences from the last average, which both sides
    have: an adapter is nearly the same after some steps, so little is lost.

    What the codec draws comes from the job's seed, and no codec of adapters remembers anything that a decoder would
    need, so a device that joins later decodes the same.
    """

    def __init__(self, config: TrainingConfig, initial: Mapping[str, Tensor]) -> None:
        """initial: the adapter that every device starts with, by name."""
        codecs = choices(config.link.codec)
        down = parse(codecs["adapters_down"])
        self._up, self._down = parse(codecs["adapters_up"]), for_matrices(down, shapes_of(initial))
        seed = stream_seed(config.seed, "adapters_down")
        self._encoder, self._decoder = CodecState(seed), CodecState(seed)
        self._initial = flatten(initial)
        self._like = dict(initial)

    def unfit(self, sent: Mapping[str, Tensor], last: Tensor | None) -> set[str]:
        """The devices whose adapters cannot be used. sent: (values,) of each."""
        base = self._initial if last is None else last
        return {
            device for device, values in sent.items() if not can_be_used([values if self._up.exact else base + values])
        }

    def error(self, shares: Sequence[tuple[Tensor, float]], last: Tensor | None) -> float:
        """Of averaging A and B each for itself (see Merged), for these shares."""
        base = self._initial if last is None else last
        own = [(unflatten(self._like, v if self._up.exact else base + v), weight) for v, weight in shares]
        lost = norm = 0.0
        for name in [name.removesuffix(A) for name in self._like if name.endswith(A)] if len(own) > 1 else []:
            parts = [(Factors(values[name + A], values[name + B]), weight) for values, weight in own]
            exact = stacked(parts)
            lost += difference_squared(Average().merge(parts, exact.rank), exact)
            norm += norm_squared(exact)
        return float((lost / norm) ** 0.5) if norm else 0.0

    def average(self, shares: Sequence[tuple[Tensor, float]], last: Tensor | None) -> tuple[Tensor, stage_pb2.Tensor]:
        """shares: what each device sent, (values,), and its weight; last: the average before.

        Returns the average as every device will have it, and the message that brings it to them.
        """
        base = self._initial if last is None else last
        sent = torch.stack([tensor * weight for tensor, weight in shares]).sum(0)
        average = sent if self._up.exact else base + sent
        payload = self._down.encode(average if self._down.exact else average - base, self._encoder)
        message = stage_pb2.Tensor(codec=self._down.name, dtype="float32", shape=list(average.shape), payload=payload)
        if not self._down.exact:
            average = base + self._down.decode(payload, average.shape, self._decoder)
        return average, message
