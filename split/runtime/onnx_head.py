"""The final norm and the head as a graph in ONNX Runtime, for whoever has them on a processor."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.split.models.source import TensorSource
from isthmus.split.runtime.onnx_cache import cached_graph, default_cache
from isthmus.split.runtime.onnx_graph import head_tensors, write_head
from isthmus.split.runtime.onnx_session import OnnxOptions, bind_inputs, bind_outputs, open_session


class OnnxHead:
    """Called with the last block's hidden states (tokens, hidden) float32, returns logits (tokens, vocabulary)."""

    def __init__(self, source: TensorSource, options: OnnxOptions | None = None) -> None:
        """Raises UnsupportedModel, BadRequest, BadModelFolder. source: of the tensors of the last norm and the head."""
        options = options or OnnxOptions()
        self._graph = cached_graph(
            options.cache or default_cache(),
            source,
            head_tensors(source.config),
            ["head", options.weights],
            lambda folder: write_head(source, options.weights, folder),
        )
        self._session = open_session(self._graph.folder, options)
        self._vocabulary: int = source.config.vocab_size

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self._vocabulary)
        binding = self._session.io_binding()
        bind_inputs(binding, hidden=hidden)
        bind_outputs(binding, logits=logits)
        self._session.run_with_iobinding(binding)
        return logits
