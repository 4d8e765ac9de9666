"""Text that comes token by token is the text of all tokens together, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from isthmus.split.inference.text import TextStream, vocabulary_of
from isthmus.split.models.source import open_model
from tests.examples import examples
from tests.split.tiny_models import make_tokenizer

EMOJI = "🙂👩‍👩‍👧é你"


def sentencepiece_like() -> PreTrainedTokenizerBase:
    """As Llama 2's: `▁` for a space, byte tokens for unknown characters, one space dropped at the beginning."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "a", "▁hello", "hello", ".", "é", "▁▁", "�", "world", "▁w"]
    vocabulary = words + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(
        models.BPE({word: id for id, word in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return fast(tokenizer, bos_token="<s>")


def fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerBase:
    untyped: Any = PreTrainedTokenizerFast
    options = {"unk_token": "<unk>", "eos_token": "</s>"} | special
    made: PreTrainedTokenizerBase = untyped(tokenizer_object=tokenizer, **options)
    return made


def metaspace() -> PreTrainedTokenizerBase:
    words = ["<unk>", "</s>", "▁", "▁a", "a", "▁hello", "hello", ".", "é", "▁▁", "🙂"]
    tokenizer = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return fast(tokenizer)


TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "default": open_model("default").tokenizer(),
    "bytes": make_tokenizer(),
    "sentencepiece": sentencepiece_like(),
    "metaspace": metaspace(),
}
BYTES = {id for id in range(300) if 14 <= id < 14 + 256}  # of the sentencepiece tokenizer


def id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(id, int)
    return id


def whole(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def parts(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [*(stream.push(id) for id in ids), stream.finish()]


def reference(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def well_formed(name: str, ids: Sequence[int]) -> bool:
    """Without wrong byte tokens, whose text is the documented difference."""
    return name != "sentencepiece" or "\ufffd" not in whole(TOKENIZERS[name], [i for i in ids if i != 11])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=examples(300), deadline=None)
@given(data=st.data())
def test_any_tokens_give_the_text_of_all_together(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=40))
    if not well_formed(name, ids):
        ids = [id for id in ids if id not in BYTES]
    assert "".join(parts(TextStream(tokenizer), ids)) == whole(tokenizer, ids)


@pytest.mark.parametrize("name", ["default", "bytes", "sentencepiece"])
@settings(max_examples=examples(200), deadline=None)
@given(text=st.text(st.sampled_from("a hello.\n" + EMOJI), max_size=30))
def test_no_character_is_given_out_before_it_is_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    given_out = parts(TextStream(tokenizer), ids)
    assert "".join(given_out) == whole(tokenizer, ids) == text
    assert not any("\ufffd" in part for part in given_out)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=examples(300), deadline=None)
@given(data=st.data())
def test_what_is_given_out_ends_before_the_first_stop_string(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, min(len(tokenizer), 300) - 1), max_size=30))
    if not well_formed(name, ids):
        ids = [id for id in ids if id not in BYTES]
    text = whole(tokenizer, ids)
    pieces = [text[i : i + size] for size in (1, 2, 3, 5) for i in range(len(text) - size + 1)]
    stop = st.sampled_from(pieces) if pieces else st.nothing()
    stops = data.draw(st.lists(stop | st.text("ab ", min_size=1, max_size=4), max_size=4))
    expected, met = reference(text, stops)
    stream = TextStream(tokenizer, stops)
    assert "".join(parts(stream, ids)) == expected
    assert stream.stopped == met
    assert stream.length == len(expected)


@settings(max_examples=examples(300), deadline=None)
@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_nothing_is_given_out_that_could_begin_a_stop_string_and_nothing_else_is_held(
    text: str, stops: list[str]
) -> None:
    tokenizer = TOKENIZERS["default"]
    stream, out = TextStream(tokenizer, stops), ""
    for count, id in enumerate((id_of(tokenizer, c) for c in text), 1):
        out += stream.push(id)
        if stream.stopped:
            break
        beginnings = [stop[:size] for stop in stops for size in range(1, len(stop))]
        held = max((len(b) for b in beginnings if text[:count].endswith(b)), default=0)
        assert out == text[: count - held]


def test_an_answer_keeps_the_space_that_divides_it_from_the_prompt() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    prompt, answer = [1, 6], [6, 8]  # <s>▁hello, ▁hello.
    assert "".join(parts(TextStream(tokenizer), answer)) == "hello."
    assert "".join(parts(TextStream(tokenizer, after=prompt), answer)) == " hello."
    assert "".join(parts(TextStream(tokenizer, after=[1]), answer)) == "hello."


def test_an_answer_can_complete_a_character_that_the_prompt_began() -> None:
    tokenizer = TOKENIZERS["default"]
    ids = tokenizer.encode("🙂!", add_special_tokens=False)
    assert "".join(parts(TextStream(tokenizer, after=ids[:1]), ids[1:])) == "🙂!"


def test_offsets_and_bytes_of_tokens_lead_back_to_the_text() -> None:
    tokenizer = TOKENIZERS["default"]
    vocabulary = vocabulary_of(tokenizer)
    text = "so 🙂 it is"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(vocabulary.piece(id).data for id in ids).decode() == text
    stream, offsets = TextStream(tokenizer), []
    for id in ids:
        offsets.append(stream.length)
        stream.push(id)
    assert offsets == sorted(offsets)
    for id, offset in zip(ids, offsets, strict=True):
        piece = vocabulary.piece(id)
        if piece.text.startswith("bytes:"):
            assert text[offset] in "🙂 "
        else:
            assert text[offset:].startswith(piece.text)


def test_a_special_token_has_a_name_but_no_text() -> None:
    tokenizer = TOKENIZERS["default"]
    piece = vocabulary_of(tokenizer).piece(0)
    assert (piece.text, piece.special) == ("<|endoftext|>", True)
    assert TextStream(tokenizer).push(0) == ""


def test_half_a_character_is_shown_by_its_bytes() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    assert vocabulary_of(tokenizer).piece(14 + 0xF0).text == "bytes:\\xf0"


def test_a_wrong_byte_spoils_no_others() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [14 + byte for byte in "你".encode()] + [14 + 0x80]
    assert "".join(parts(TextStream(tokenizer), ids)) == "你\ufffd"


def test_the_work_for_a_token_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    longest = 0
    decode = tokenizer.decode

    def counted(ids: list[int], **options: bool) -> object:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    stream = TextStream(tokenizer, ["aaab"])
    for id in [200, 201, id_of(tokenizer, "a")] * 500:
        stream.push(id)
    assert longest <= 2
