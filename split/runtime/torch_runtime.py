"""The reference runtime: the architecture's own code in torch, on whatever device torch has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from isthmus.split.lora.served import Lora
from isthmus.split.models.architectures import architecture_of, rotary_boundary
from isthmus.split.models.stage import Stage
from isthmus.split.runtime.base import Row, check_rows
from isthmus.split.runtime.torch_adapters import TorchAdapters


class TorchRuntime:
    """The reference runtime. Rows with as many new tokens are computed together.

    A sequence has a slot in each block's buffer of keys and one of values, (sequences, heads, tokens, head size), which
    the system fills with memory only as they are written.
    """

    def __init__(
        self, stage: Stage, *, sequences: int, tokens: int, adapters: Sequence[Mapping[str, Lora]] = ()
    ) -> None:
        """Take a stage of blocks alone, without embedding and head. adapters: each one's part in these blocks."""
        if stage.spec.embeds or stage.spec.head or stage.spec.first == stage.spec.last:
            raise ValueError(f"{stage.spec} is not a stage of blocks alone")
        self.sequences, self.tokens, self.adapters = sequences, tokens, len(adapters)
        self._stage = stage
        self._loras = TorchAdapters(stage, adapters)
        self._device = next(stage.parameters()).device
        self._dtype = next(stage.parameters()).dtype
        self._lengths: dict[int, int] = {}
        self._reached: dict[int, int] = {}  # the most tokens that a sequence had, taken back or not
        self._slots: dict[int, int] = {}
        self._free = list(reversed(range(sequences)))
        self._cache = _Cache(sequences, tokens)
        self._rotary: _LongRope | None = None
        boundary = rotary_boundary(stage.model.config)
        if boundary is not None:
            name = architecture_of(stage.model.config).rotary
            assert name is not None
            self._rotary = _LongRope(stage.model.get_submodule(name), boundary)
            stage.model.set_submodule(name, self._rotary)

    def lengths(self) -> dict[int, int]:
        return dict(self._lengths)

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        check_rows(rows, hidden, self)
        for row in rows:
            if row.sequence not in self._slots:
                self._slots[row.sequence] = self._free.pop()
            self._reached[row.sequence] = max(row.position + row.count, self._reached.get(row.sequence, 0))
            self._lengths[row.sequence] = row.position  # what follows counts once all of it is there
        parts = hidden.split([row.count for row in rows])
        computed: dict[int, Tensor] = {}
        kinds = [(row.count, self._rotary is not None and self._rotary.for_row(row)) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (kinds[i], self._slots[rows[i].sequence]))
        for (_, long), group in groupby(order, key=lambda i: kinds[i]):
            members = list(group)
            if self._rotary is not None:
                self._rotary.long = long
            x = torch.stack([parts[i] for i in members]).to(self._device, self._dtype)
            computed |= zip(members, self._forward([rows[i] for i in members], x), strict=True)
        for row in rows:
            self._lengths[row.sequence] = row.position + row.count
        return torch.cat([computed[i] for i in range(len(rows))])

    @torch.inference_mode()
    def forget(self, sequences: Iterable[int]) -> None:
        for sequence in sequences:
            if sequence in self._slots:
                del self._lengths[sequence]
                self._cache.clear(self._slots[sequence], self._reached.pop(sequence))
                self._free.append(self._slots.pop(sequence))

    def _forward(self, rows: Sequence[Row], x: Tensor) -> Tensor:
        """Compute rows' next tokens, (rows, count, hidden). Returns the same shape, float32 on the CPU."""
        count = rows[0].count
        starts = torch.tensor([row.position for row in rows], device=self._device)
        positions = starts[:, None] + torch.arange(count, device=self._device)
        longest = max(row.position for row in rows) + count
        self._cache.use([self._slots[row.sequence] for row in rows], positions, longest)
        self._loras.use([row.adapter for row in rows])
        output = self._stage.model(
            inputs_embeds=x,
            attention_mask=self._mask(positions, longest),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return output.to("cpu", torch.float32)  # type: ignore[no-any-return]

    def _mask(self, positions: Tensor, longest: int) -> Tensor | dict[str, Tensor]:
        """(rows, 1, count, longest) bool: what each new token sees; by type of layer where there are several."""
        config = self._stage.model.config
        behind = positions[:, None, :, None] - torch.arange(longest, device=self._device)
        full = behind >= 0
        window = getattr(config, "sliding_window", None)
        sliding = full if window is None else full & (behind < window)
        if self._stage.by_layer_type:
            return {"full_attention": full, "sliding_attention": sliding}
        return sliding


class _LongRope(torch.nn.Module):
    """Stands for the library's rotary module, which chooses frequencies by a batch's last position: here `long`
    does.
    """

    def __init__(self, rotary: torch.nn.Module, boundary: int) -> None:
        super().__init__()
        self.long = False
        self._rotary, self._boundary = rotary, boundary

    def for_row(self, row: Row) -> bool:
        return row.long or row.position + row.count > self._boundary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, count) -> cosines and sines, each (rows, count, rotary dimensions)."""
        if not self.long:
            cosines, sines = self._rotary(x, position_ids)
            return cosines, sines
        beyond = position_ids.new_full((len(position_ids), 1), self._boundary)
        cosines, sines = self._rotary(x, torch.cat([position_ids, beyond], dim=1))
        return cosines[:, :-1], sines[:, :-1]


class _Cache:
    """Stands for the library's cache: the blocks put keys and values into it, and get all of a row back."""

    is_compileable = False

    def __init__(self, sequences: int, tokens: int) -> None:
        self._sequences, self._tokens = sequences, tokens
        self._buffers: dict[tuple[int, int], Tensor] = {}  # by block and 0 (keys) or 1 (values)
        self._slots: list[int] = []
        self._positions = torch.empty(0, 0, dtype=torch.long)
        self._longest = 0

    def use(self, slots: list[int], positions: Tensor, longest: int) -> None:
        """Set what the next forward pass reads and writes.

        That is its rows' slots, their new tokens' positions (rows, count), and how much of the buffers is in use.
        """
        self._slots, self._positions, self._longest = slots, positions, longest

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(rows, heads, count, head size) -> (rows, heads, longest, head size)."""
        return self._put(keys, layer_idx, 0), self._put(values, layer_idx, 1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self._positions[0, 0])

    def clear(self, slot: int, length: int) -> None:
        """Zero a sequence's slot: masked values count as 0 times what they are, and NaN would be seen."""
        for buffer in self._buffers.values():
            buffer[slot, :, :length].zero_()

    def _put(self, new: Tensor, block: int, which: int) -> Tensor:
        buffer = self._buffers.get((block, which))
        if buffer is None:
            shape = (self._sequences, new.shape[1], self._tokens, new.shape[3])
            buffer = self._buffers[block, which] = torch.zeros(shape, dtype=new.dtype, device=new.device)
        slots, first, count = self._slots, self._slots[0], new.shape[2]
        if len(slots) == 1:
            start = self._longest - count
            buffer[first, :, start : self._longest] = new[0]
            return buffer[first : first + 1, :, : self._longest]
        index = torch.tensor(slots, device=new.device)
        buffer[index[:, None], :, self._positions] = new.transpose(1, 2)
        if slots == list(range(first, first + len(slots))):
            return buffer[first : first + len(slots), :, : self._longest]
        return buffer[index, :, : self._longest]
