"""The two ends of a model, which are where the text is: the embedding, and the last norm with the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isthmus.split.models.architectures import architecture_of, rotary_boundary
from isthmus.split.models.precision import pick_device
from isthmus.split.models.source import TensorSource
from isthmus.split.models.stage import StageSpec, build_stages
from isthmus.split.runtime.choose import RuntimeChoice, make_head

_ROWS = 256  # of logits at a time: a vocabulary is long


class Ends:
    """Embedding, final norm and head of a model, without any block: token ids in, hidden states out, and back to
    logits.
    """

    def __init__(self, source: TensorSource, choice: RuntimeChoice) -> None:
        config = source.config
        layers = config.num_hidden_layers
        parts = architecture_of(config)
        device = pick_device(choice.device)
        specs = [StageSpec(0, 0, embeds=True, head=False)]
        head = make_head(source, choice)
        if head is None:
            specs.append(StageSpec(layers, layers, embeds=False, head=True))
        front, *rest = (stage.model for stage in build_stages(source, specs, device=device))
        if head is None:
            norm, linear = rest[0].get_submodule(parts.norm), rest[0].get_submodule(parts.head)
            self._head: Callable[[Tensor], Tensor] = lambda hidden: linear(norm(hidden.to(device)))
        else:
            self._head = head
        self.rows_scored = 0  # of hidden states that have become logits
        self.vocabulary, self.hidden_size, self._device = config.vocab_size, config.hidden_size, device
        self._embedding = front.get_submodule(parts.embedding)
        self.rotary_boundary = rotary_boundary(config)
        self._positions = None if parts.positions is None else front.get_submodule(parts.positions)

    @torch.inference_mode()
    def embed(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Embed tokens: (tokens, hidden) float32 on the CPU. positions: of each token in its sequence."""
        hidden: Tensor = self._embedding(torch.tensor(ids, device=self._device))
        if self._positions is not None:
            hidden = hidden + self._positions(torch.tensor(positions, device=self._device))
        return hidden.to("cpu", torch.float32)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits, (tokens, vocabulary) float32 on the CPU. hidden: (tokens, hidden), after the last block."""
        self.rows_scored += len(hidden)
        parts = [self._head(part) for part in hidden.split(_ROWS)]
        return torch.cat(parts).to("cpu", torch.float32)
