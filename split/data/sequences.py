"""Documents become rows of tokens: tokenised, packed or padded, and chosen for each step's batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isthmus.split.data.documents import Document, read_documents, split_documents
from isthmus.split.errors import BadData, BadRequest
from isthmus.split.job.groups import TextSettings

if TYPE_CHECKING:  # importing transformers takes seconds, and reading a file does not need it
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of a position on which no loss is taken, as in transformers and torch
_Row = tuple[list[int], list[int]]  # input ids and labels
_RECORDS_A_CALL = 1024  # bounds what the tokenizer holds at once; it works on a list in parallel


@dataclass(frozen=True)
class Sequences:
    """Rows for a causal LM. input_ids, labels: (n, sequence_length) int64 on the CPU.

    labels[i, t] is input_ids[i, t], or -100 where no loss is taken; the model predicts labels[i, t + 1] from
    position t (so labels[:, 0] is never used). Padding is on the right, where no earlier position can attend to it,
    so no attention mask is needed.
    """

    input_ids: Tensor
    labels: Tensor

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that are predicted."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def __len__(self) -> int:
        return len(self.input_ids)


def build_sequences(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, config: TextSettings, *, keep_last: bool
) -> Sequences:
    """Tokenises documents and cuts them into rows of config.sequence_length.

    Running text is tokenised in one go with the tokenizer's defaults (in pieces it could come out different).
    Records are tokenised with the defaults too (so with BOS where the tokenizer adds one) and followed by EOS, if the
    tokenizer has one. A prompt and its completion are tokenised separately and joined with nothing in between: a
    separator belongs at the end of the prompt (or the start of the completion); the prompt's labels are -100.

    packed: windows over the stream of all tokens; the last, shorter one is filled up (keep_last: for validation, where
    every token counts) or dropped (for training, where batches should be full).
    padded: every document is a record in a row of its own, cut off at the end of the row.
    Rows without any token to predict are left out. Raises BadData, with the number of tokens, if no row is left.
    """
    length, padded = config.sequence_length, config.packing == "padded"
    flat_ids: list[int] = []  # the rows one after the other: a tensor of a list of rows is slow to make
    flat_labels: list[int] = []
    tokens = 0
    for ids, labels in (_encode_records if padded else _encode_stream)(documents, tokenizer):
        tokens += len(ids)
        flat_ids += ids[:length] if padded else ids
        flat_labels += labels[:length] if padded else labels
        if padded:
            _fill_row(flat_ids, flat_labels, tokenizer, length)
    if not padded and keep_last:
        _fill_row(flat_ids, flat_labels, tokenizer, length)
    if len(flat_ids) < length:
        raise BadData(
            f"{tokens} tokens of text do not fill a sequence: give more text or less than {length} a sequence"
        )
    end = len(flat_ids) - len(flat_ids) % length
    input_ids = torch.tensor(flat_ids[:end]).view(-1, length)
    labels_of_rows = torch.tensor(flat_labels[:end]).view(-1, length)
    useful = (labels_of_rows[:, 1:] != IGNORE).any(dim=1)
    if not useful.any():
        raise BadData(
            f"nothing to predict in {tokens} tokens with sequence_length {length}:"
            " give more text or, if prompts fill the sequences, a larger sequence_length"
        )
    return Sequences(input_ids[useful], labels_of_rows[useful])


def _fill_row(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Pads to the end of the row, in place."""
    missing = -len(ids) % length
    ids += [next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)] * missing
    labels += [IGNORE] * missing


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which of `count` sequences make up the batch of training step `step` (from 0): batch_size indices.

    Every epoch is a fresh permutation made from (seed, epoch) and batches run on across epochs, so each sequence is
    used once an epoch, all batches are full (also if count < batch_size) and going on at any step needs no state.
    """
    if count < 1 or batch_size < 1 or step < 0:
        raise BadRequest(f"no batch of {batch_size} from {count} sequences at step {step}: all have to be positive")
    places = (divmod(place, count) for place in range(step * batch_size, (step + 1) * batch_size))
    return [int(_permutation(count, seed, epoch)[offset]) for epoch, offset in places]


def micro_batch_slices(batch_size: int, count: int) -> list[slice]:
    """`count` slices of a batch, as equal as can be, the larger ones first."""
    size, larger = divmod(batch_size, count)
    starts = [index * size + min(index, larger) for index in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(starts)]


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.randperm(
        count, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    )


def _encode_stream(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Row]:
    """Each run of running text and each record, in order."""
    for is_record, group in groupby(documents, key=lambda document: document.record or document.prompt != ""):
        if is_record:
            yield from _encode_records(list(group), tokenizer)
        else:
            ids = _encode(["".join(document.text for document in group)], tokenizer)[0]
            yield ids, ids


def _encode_records(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Row]:
    """Each document as a record."""
    eos = tokenizer.eos_token_id
    ends = eos is not None and _encode(["a"], tokenizer)[0][-1:] == [eos]  # some tokenizers add EOS by default
    for start in range(0, len(documents), _RECORDS_A_CALL):
        batch = documents[start : start + _RECORDS_A_CALL]
        heads = _encode([document.prompt or document.text for document in batch], tokenizer)
        with_prompt = [document.text for document in batch if document.prompt]
        completions = iter(_encode(with_prompt, tokenizer, special=False) if with_prompt else [])
        for document, head in zip(batch, heads, strict=True):
            prompt, text = (head[:-1] if ends else head, next(completions)) if document.prompt else ([], head)
            text = text if eos is None or text[-1:] == [eos] else [*text, eos]
            yield prompt + text, [IGNORE] * len(prompt) + text


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, special: bool = True) -> list[list[int]]:
    # verbose=False: a text longer than the model's context is no reason to warn, it is cut into sequences
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return ids


def sequences_of_file(
    path: Path, config: TextSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequences, Sequences | None]:
    """A device's text: its training sequences, and its held-out ones (None when nothing is held out).

    Raises BadData when the file cannot be used, or is too short for its parts.
    """
    try:
        train, held_out = split_documents(read_documents(path, config), config.validation_fraction)
        validation = build_sequences(held_out, tokenizer, config, keep_last=True) if held_out else None
        return build_sequences(train, tokenizer, config, keep_last=False), validation
    except BadData as error:
        line = str(error)
        raise BadData(line if line.startswith(path.name) else f"{path.name}: {line}") from None


def seen_positions(wanted: Tensor) -> Tensor:
    """(rows, sequence) bool: the positions up to the last wanted one of each row, which alone can influence it."""
    return wanted.flip(1).cummax(1).values.flip(1)
