"""Text from token ids as they come: never half a character, nothing past a stop string, constant work a token."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Piece:
    """The text that one token adds after other text.

    data: its bytes, maybe a part of a character only. special: whether it is left out of the text, as an end token is;
    data is then its name.
    """

    data: bytes
    special: bool = False

    @property
    def text(self) -> str:
        """The piece shown alone; bytes that are no text by themselves are written as OpenAI does."""
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.data)


class Vocabulary:
    """The piece of every token of a tokenizer, found when it is first asked for.

    The tokenizer's own decoder says what a token is, in the middle of a text and at its beginning, where many
    decoders drop a space. Only of a token that is not whole characters are the bytes read from its name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        # A token that does not change its neighbour, so that what the other adds after it can be seen.
        self._before = tokenizer.encode("a", add_special_tokens=False)
        self._before_text = self._decode(self._before)
        self._pieces: dict[int, Piece] = {}

    def piece(self, id: int) -> Piece:
        """The piece of a token; an empty one for an id that the tokenizer does not know."""
        if id not in self._pieces:
            self._pieces[id] = self._find(id)
        return self._pieces[id]

    def first(self, id: int) -> bytes:
        """The bytes of a token that begins a text."""
        data, alone = self.piece(id).data, self._decode([id])
        return alone.encode() if data.startswith(b" ") and "\ufffd" not in alone else data

    def _find(self, id: int) -> Piece:
        name = self._tokenizer.convert_ids_to_tokens(id)
        if not isinstance(name, str):
            return Piece(b"")
        if id in self._special:
            return Piece(name.encode(), special=True)
        text = self._decode([*self._before, id])[len(self._before_text) :]
        return Piece(_bytes_of(name) or text.encode() if "\ufffd" in text else text.encode())

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


@lru_cache(maxsize=8)
def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The vocabulary of a tokenizer, the same object for all texts since it remembers the pieces."""
    return Vocabulary(tokenizer)


class TextStream:
    """The text of an answer, token by token. What is given out never changes again.

    All that `push` gives, and `finish` at the end, together are `tokenizer.decode(ids, skip_special_tokens=True)`, or
    the part of it before the first stop string to be complete (the longest, if several are at the same character).
    after: the tokens of a prompt that the answer continues; a space at the answer's beginning is then kept, and so is
    the half of a character that the prompt may end with.

    One difference from `decode`: in tokenizers that spell unknown characters as byte tokens, it makes every byte of a
    row of these a replacement character if one of them is wrong; here only the wrong ones are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        self.stopped = False
        self.length = 0
        """Characters so far, those held back included; the offset at which the next token begins."""
        self._vocabulary = vocabulary_of(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops: list[_Stop] = []
        self._held = ""
        self._begun = False
        for id in after:
            self.push(id)
        self.length = 0
        self._stops = [_Stop(text) for text in stop]

    def push(self, id: int) -> str:
        """Add a token. Returns the text that it makes final."""
        piece = self._vocabulary.piece(id)
        if self.stopped or piece.special or not piece.data:
            return ""
        data = piece.data if self._begun else self._vocabulary.first(id)
        self._begun = True
        return self._take(self._decoder.decode(data))

    def finish(self) -> str:
        """End the text. Returns what was held back; half a character becomes a replacement character."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _take(self, text: str) -> str:
        start = self.length - len(self._held)
        self._held += text
        for count, character in enumerate(text, 1):
            ends = [len(stop.text) for stop in self._stops if stop.read(character)]
            if ends:
                self.stopped = True
                self.length += count - max(ends)
                final, self._held = self._held[: self.length - start], ""
                return final
        self.length += len(text)
        keep = max((stop.matched for stop in self._stops), default=0)
        final = self._held[: len(self._held) - keep]
        self._held = self._held[len(final) :]
        return final


class _Stop:
    """Finds a stop text in a text that comes character by character (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # of its characters, at the end of what was read
        self._shorter = [0, 0]  # for each number of matched characters, the next smaller that matches as well
        for character in text[1:]:
            self._shorter.append(self._extend(self._shorter[-1], character))

    def read(self, character: str) -> bool:
        """Read a character. Returns whether the stop text is complete with it."""
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self.text)

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)


def _bytes_of(name: str) -> bytes:
    """Bytes of a token that is not whole characters; none for any other token.

    name: in the tokenizer, such as sentencepiece's <0x0A>, or in GPT-2's alphabet for bytes.
    """
    if match := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(match[1], 16)])
    values = [_BYTES.get(character) for character in name]
    return bytes(value for value in values if value is not None) if None not in values else b""


def _gpt2_alphabet() -> dict[str, int]:
    """The byte for which each character stands: itself where it can be printed, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _gpt2_alphabet()
