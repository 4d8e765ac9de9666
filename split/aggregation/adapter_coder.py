"""How adapters cross between a device and the stage at an aggregation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import CodecState, for_matrices, parse
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import choices
from isthmus.split.link.coding import stream_seed


class AdapterCoder:
    """The stage's coding of adapters of one layout, with what its codec remembers.

    An exact codec is given the adapters themselves. Any other codec is given differences from the last aggregation's
    adapter (the base), which both sides have: an adapter is nearly the same after some steps, so little is lost. What a
    codec draws comes from the job's seed, and no codec of adapters remembers anything that a decoder would need, so a
    device that joins later decodes the same.
    """

    def __init__(self, config: TrainingConfig, shapes: Sequence[Sequence[int]]) -> None:
        """Take the shapes of the adapter's matrices, in the order in which they lie in the flat vector."""
        codecs = choices(config.link.codec)
        self._up, self._down = parse(codecs["adapters_up"]), for_matrices(parse(codecs["adapters_down"]), shapes)
        seed = stream_seed(config.seed, "adapters_down")
        self._encoder, self._decoder = CodecState(seed), CodecState(seed)

    def received(self, sent: Tensor, base: Tensor) -> Tensor:
        """Turn what a device sent, (values,), into its adapter, (values,). base: the adapter that it had before."""
        return sent if self._up.exact else base + sent

    def message(self, adapter: Tensor, base: Tensor) -> tuple[Tensor, stage_pb2.Tensor]:
        """Encode an adapter, (values,), for devices that have `base`.

        Returns the adapter as the devices will have decoded it, (values,), and the message that brings it to them.
        """
        payload = self._down.encode(adapter if self._down.exact else adapter - base, self._encoder)
        message = stage_pb2.Tensor(codec=self._down.name, dtype="float32", shape=list(adapter.shape), payload=payload)
        if not self._down.exact:
            adapter = base + self._down.decode(payload, adapter.shape, self._decoder)
        return adapter, message
