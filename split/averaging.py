"""The average of the devices' adapters, as all of them get it: the same bytes for everyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from protos.v1 import stage_pb2
from split.adapters.lora import flatten, shapes_of
from split.codecs import CodecState, for_matrices, parse
from split.coding import stream_seed
from split.config import TrainingConfig
from split.streams import choices


class Averager:
    """Where the adapters' codecs are not exact, what crosses is differences from the last average, which both sides
    have: an adapter is nearly the same after some steps, so little is lost.

    What the codec draws comes from the job's seed, and no codec of adapters remembers anything that a decoder would
    need, so a device that joins later decodes the same.
    """

    def __init__(self, config: TrainingConfig, initial: Mapping[str, Tensor]) -> None:
        """initial: the adapter that every device starts with, by name."""
        codecs = choices(config.codec)
        down = parse(codecs["adapters_down"])
        self._up, self._down = parse(codecs["adapters_up"]), for_matrices(down, shapes_of(initial))
        seed = stream_seed(config.seed, "adapters_down")
        self._encoder, self._decoder = CodecState(seed), CodecState(seed)
        self._initial = flatten(initial)

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
