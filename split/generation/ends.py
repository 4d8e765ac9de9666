"""The two ends of a model, which are where the text is: the embedding, and the last norm with the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from split.models.architectures import architecture_of
from split.models.source import TensorSource
from split.models.stage import StageSpec, build_stages

_ROWS = 256  # of logits at a time: a vocabulary is long


class Ends:
    """Token ids in, hidden states out; and hidden states in, logits out. Without any block."""

    def __init__(self, source: TensorSource, *, device: torch.device | str = "cpu") -> None:
        config = source.config
        layers = config.num_hidden_layers
        specs = (StageSpec(0, 0, embeds=True, head=False), StageSpec(layers, layers, embeds=False, head=True))
        front, tail = (stage.model for stage in build_stages(source, specs, device=device))
        parts = architecture_of(config)
        self.vocabulary, self.hidden_size, self._device = config.vocab_size, config.hidden_size, device
        self._embedding = front.get_submodule(parts.embedding)
        self._positions = None if parts.positions is None else front.get_submodule(parts.positions)
        self._norm, self._head = tail.get_submodule(parts.norm), tail.get_submodule(parts.head)

    @torch.inference_mode()
    def embed(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """(tokens, hidden) float32 on the CPU; positions: of each token in its sequence."""
        hidden: Tensor = self._embedding(torch.tensor(ids, device=self._device))
        if self._positions is not None:
            hidden = hidden + self._positions(torch.tensor(positions, device=self._device))
        return hidden.to("cpu", torch.float32)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) after the last block -> (tokens, vocabulary) float32 on the CPU."""
        parts = [self._head(self._norm(part.to(self._device))) for part in hidden.split(_ROWS)]
        return torch.cat(parts).to("cpu", torch.float32)
