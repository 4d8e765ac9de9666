"""The runtime for processors: a stage's blocks as a graph in ONNX Runtime, its keys and values in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnxruntime
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from isthmus.split.errors import BadRequest
from isthmus.split.lora.served import Lora
from isthmus.split.models.source import TensorSource
from isthmus.split.runtime.base import Row, check_rows
from isthmus.split.runtime.onnx_adapters import adapter_stacks, without_adapters
from isthmus.split.runtime.onnx_builder import ADAPTER
from isthmus.split.runtime.onnx_cache import cached_graph, default_cache
from isthmus.split.runtime.onnx_graph import write_blocks
from isthmus.split.runtime.onnx_session import OnnxOptions, bind_inputs, bind_outputs, open_session
from isthmus.split.runtime.onnx_shape import RotaryTables, shape_of

_TOGETHER = 16
"""The most new tokens of rows that share a call: so many take hardly longer than one, for which all weights have to be
read, too."""

_PIECE = 512
"""The most new tokens of a row in a call: more are not faster, and need memory."""


class OnnxRuntime:
    """The runtime for processors.

    A sequence has a slot in each block's buffer of keys and one of values, (sequences, kv_heads, tokens, head size),
    which the system fills with memory only as they are written. The graph reads and writes the slots in place, so those
    of a call have to be side by side: sequences that are computed together are moved together, once.
    """

    def __init__(
        self,
        source: TensorSource,
        first: int,
        last: int,
        *,
        sequences: int,
        tokens: int,
        options: OnnxOptions | None = None,
        adapters: Sequence[Mapping[str, Lora]] = (),
    ) -> None:
        """Load blocks first..last-1 of a model.

        sequences: how many there is room for. tokens: the most of a sequence. adapters: each one's part in the blocks.
        Raises UnsupportedModel for what a graph cannot compute, BadRequest, BadModelFolder.
        """
        options = options or OnnxOptions()
        self.sequences, self.tokens, self.adapters = sequences, tokens, len(adapters)
        adapted = frozenset(module for adapter in adapters for module in adapter)
        shape = replace(shape_of(source.config, first, last), adapted=adapted)
        self._graph = cached_graph(
            options.cache or default_cache(),
            source,
            shape.tensors,
            ["blocks", first, last, options.weights, *sorted(adapted)],
            lambda folder: write_blocks(source, shape, options.weights, folder),
        )
        self._session = open_session(self._graph.folder, options)
        self._hidden = shape.hidden
        self._rotary = RotaryTables(source.config, tokens)
        slots = (sequences, shape.kv_heads, tokens, shape.head_size)
        self._buffers = {f"{what}_{i}": torch.empty(slots) for i in range(last - first) for what in ("key", "value")}
        self._stacks = adapter_stacks(shape, adapters)
        self._no_stacks = without_adapters(self._stacks)
        self._lengths: dict[int, int] = {}
        self._slots: dict[int, int] = {}
        # By the first slot, their number, and whether any has an adapter.
        self._bindings: dict[tuple[int, int, bool], onnxruntime.IOBinding] = {}

    def lengths(self) -> dict[int, int]:
        return dict(self._lengths)

    def forget(self, sequences: Iterable[int]) -> None:
        for sequence in sequences:
            self._lengths.pop(sequence, None)
            self._slots.pop(sequence, None)

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        check_rows(rows, hidden, self)
        width = hidden.shape[1]
        if width != self._hidden or hidden.dtype != torch.float32:
            raise BadRequest(
                f"hidden states of {width} values in {hidden.dtype}; these blocks take {self._hidden} in float32"
            )
        for row in rows:
            self._lengths[row.sequence] = row.position
            if row.sequence not in self._slots:
                self._slots[row.sequence] = min(set(range(self.sequences)) - set(self._slots.values()))
        given = hidden.contiguous().split([row.count for row in rows])
        computed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        taken = computed.split([row.count for row in rows])
        tables = [self._rotary.number(row.position + row.count, row.long) for row in rows]
        for members in _calls(rows, tables, self.tokens):
            first = self._side_by_side([rows[i].sequence for i in members])
            members.sort(key=lambda i: self._slots[rows[i].sequence])
            for at in range(0, max(rows[i].count for i in members), _PIECE):
                piece = slice(at, at + _PIECE)
                self._run(
                    first,
                    [rows[i].position + at for i in members],
                    [given[i][piece] for i in members],
                    [taken[i][piece] for i in members],
                    [rows[i].adapter for i in members],
                    self._rotary[tables[members[0]]],
                )
            self._lengths.update({rows[i].sequence: rows[i].position + rows[i].count for i in members})
        return computed

    def _run(
        self,
        first: int,
        positions: Sequence[int],
        parts: Sequence[Tensor],
        results: Sequence[Tensor],
        adapters: Sequence[int],
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        """Compute one call.

        parts: (count, hidden), a row's tokens from its position on, for each of the slots from first on. results:
        tensors of the same shapes, into which the results are written.
        """
        alone = len(parts) == 1
        x = parts[0][None] if alone else pad_sequence(list(parts), batch_first=True)
        computed = results[0][None] if alone else torch.empty_like(x)
        counts = torch.tensor([len(part) for part in parts], dtype=torch.int32)
        lengths = torch.tensor(positions, dtype=torch.int32) + counts
        cosines, sines = rotary
        inputs = {
            "hidden": x,
            "lasts": lengths - 1,
            "counts": counts,
            "longest": lengths.max(),
            "cosines": cosines,
            "sines": sines,
        }
        if self._stacks:  # where all rows have the same one, it is not copied for each of them
            inputs[ADAPTER] = torch.tensor(adapters if len(set(adapters)) > 1 else adapters[:1])
        binding = self._binding(first, len(parts), any(adapters))
        bind_inputs(binding, **inputs)
        bind_outputs(binding, computed=computed)
        self._session.run_with_iobinding(binding)
        if not alone:
            for result, row in zip(results, computed, strict=True):
                result.copy_(row[: len(result)])

    def _binding(self, first: int, count: int, adapted: bool) -> onnxruntime.IOBinding:
        """The binding of so many slots' keys and values and of the adapters; the rest is bound anew for every call."""
        binding = self._bindings.get((first, count, adapted))
        if binding is None:
            binding = self._bindings[first, count, adapted] = self._session.io_binding()
            bind_inputs(binding, **(self._stacks if adapted else self._no_stacks))
            slots = {name: buffer[first : first + count] for name, buffer in self._buffers.items()}
            bind_inputs(binding, **{f"past_{name}": slot for name, slot in slots.items()})
            bind_outputs(binding, **{f"present_{name}": slot for name, slot in slots.items()})
        return binding

    def _side_by_side(self, sequences: Sequence[int]) -> int:
        """Move these sequences into neighbouring slots where they are not yet; returns the first of these."""
        here = {self._slots[sequence] for sequence in sequences}
        count = len(here)
        if max(here) - min(here) + 1 == count:
            return min(here)
        first = max(range(self.sequences - count + 1), key=lambda first: len(here & set(range(first, first + count))))
        inside = set(range(first, first + count))
        for ours, other in zip(sorted(here - inside), sorted(inside - here), strict=True):
            self._swap(ours, other)
        return first

    def _swap(self, a: int, b: int) -> None:
        """Exchange what is in two slots."""
        owners = {slot: sequence for sequence, slot in self._slots.items()}
        lengths = [self._lengths[owners[slot]] if slot in owners else 0 for slot in (a, b)]
        for tensor in self._buffers.values():
            # By NumPy, in one thread: torch's wait for each other busily, on a busy machine 100 times as long.
            buffer = tensor.numpy()
            kept = buffer[b, :, : lengths[1]].copy()
            buffer[b, :, : lengths[0]] = buffer[a, :, : lengths[0]]
            buffer[a, :, : lengths[1]] = kept
        for sequence, slot in ((owners.get(a), b), (owners.get(b), a)):
            if sequence is not None:
                self._slots[sequence] = slot


def _calls(rows: Sequence[Row], tables: Sequence[int], tokens: int) -> list[list[int]]:
    """Which rows (by their numbers) are computed together, each padded to as many tokens as the first one has."""
    calls: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (tables[i], rows[i].count), reverse=True):
        call = calls[-1] if calls else [i]
        longest = rows[call[0]].count
        wanted = sum(rows[j].count for j in call) + rows[i].count
        if (
            calls
            and tables[i] == tables[call[0]]
            and longest <= _TOGETHER
            and rows[i].position + longest <= tokens  # the padding too has to have a place
            and (len(call) + 1) * longest <= max(_TOGETHER, wanted * 3 // 2)
        ):
            call.append(i)
        else:
            calls.append([i])
    return calls
