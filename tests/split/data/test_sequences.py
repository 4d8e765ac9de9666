"""Reading, splitting, tokenising and batching of text."""

from __future__ import annotations

import csv
import json
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from isthmus.split.data.documents import Document, read_documents, split_documents
from isthmus.split.data.sequences import IGNORE, Sequences, batch_indices, build_sequences
from isthmus.split.errors import BadData, BadRequest
from isthmus.split.job.groups import TextSettings

TEXT = (
    "The old mill stands by the river.\nNobody grinds there now.\n\nThe wheel turns anyway, when the water is high.\n"
)
documents_of_text = st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=8)


@lru_cache
def tokenizer(*, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; every text survives encoding and decoding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>" if eos else None)  # type: ignore[no-untyped-call]


def encode(text: str) -> list[int]:
    return tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids


def kept(sequences: Sequences) -> list[int]:
    """All tokens with a label, in order."""
    return sequences.input_ids[sequences.labels != IGNORE].tolist()


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Reading


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab \t\r\n\x0b\u2028é"), max_size=60).filter(lambda text: text.strip()))
def test_paragraphs_joined_are_the_file(tmp_path: Path, text: str) -> None:
    documents = read_documents(write(tmp_path, "a.txt", text), TextSettings())
    assert "".join(document.text for document in documents) == text
    assert all(document.text.strip() and not document.record for document in documents)


def test_paragraphs_keep_their_trailing_blank_lines_and_indentation(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\n\none\r\ntwo\r\n \t\r\n\r\n  three\n\nfour\r\rfive")
    texts = [document.text for document in read_documents(path, TextSettings())]
    assert texts == ["\n\none\r\ntwo\r\n \t\r\n\r\n", "  three\n\n", "four\r\r", "five"]


@pytest.mark.parametrize(("name", "text"), [("a.txt", "x"), ("a.jsonl", '{"text": "x"}'), ("a.csv", "text,n\nx,1\n")])
def test_byte_order_mark_is_dropped(tmp_path: Path, name: str, text: str) -> None:
    (document,) = read_documents(write(tmp_path, name, b"\xef\xbb\xbf" + text.encode()), TextSettings())
    assert document.text == "x"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(
        st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda text: text.strip()), min_size=1, max_size=5
    )
)
def test_jsonl_and_csv_give_back_what_was_written(tmp_path: Path, values: list[str]) -> None:
    lines = "".join(json.dumps({"id": i, "text": value}, ensure_ascii=False) + "\n" for i, value in enumerate(values))
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["id", "text"], *enumerate(values)])
    expected = [Document(value, record=True) for value in values]
    assert read_documents(write(tmp_path, "a.jsonl", lines), TextSettings()) == expected
    assert read_documents(tmp_path / "a.csv", TextSettings()) == expected


def test_csv_with_quotes_and_line_breaks_and_prompt_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'q, a\r\n"He said ""hi"",\r\nand left","b\nc"\r\n\r\n1,2\r\n')
    config = TextSettings(prompt_column="q", completion_column="a")
    assert read_documents(path, config) == [
        Document("b\nc", 'He said "hi",\r\nand left', record=True),
        Document("2", "1", record=True),
    ]


def test_only_column_of_a_csv_needs_no_name_and_long_fields_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "story\n" + "x" * 200_000 + "\n")
    (document,) = read_documents(path, TextSettings())
    assert len(document.text) == 200_000


SECRET = "Zanzibar"
PAIR = TextSettings(prompt_column="q", completion_column="a")


@pytest.mark.parametrize(
    ("name", "content", "config", "says"),
    [
        ("a.pdf", SECRET, TextSettings(), "a .txt, .jsonl or .csv file"),
        ("a.txt", "", TextSettings(), "is empty"),
        ("a.txt", " \n\n", TextSettings(), "is empty"),
        ("a.txt", SECRET, PAIR, "has no columns"),
        ("a.txt", f"{SECRET}\n{SECRET}".encode() + b"\xff", TextSettings(), r"not UTF-8 at line 2 \(byte 17\)"),
        ("a.txt", b"\xef\xbb\xbfab\xff", TextSettings(), r"not UTF-8 at line 1 \(byte 5\)"),
        ("a.jsonl", "", TextSettings(), "is empty"),
        ("a.jsonl", '{"text": "ok"}\n\n{"text": "' + SECRET, TextSettings(), "invalid JSON at line 3"),
        ("a.jsonl", "[" * 100_000, TextSettings(), "invalid JSON at line 1"),
        ("a.jsonl", f'"{SECRET}"', TextSettings(), "no JSON object at line 1"),
        ("a.jsonl", '{"text": 5}', TextSettings(), "something else than text in column 'text' at line 1"),
        ("a.jsonl", '{"text": null}', TextSettings(), "something else than text"),
        ("a.jsonl", '{"text": "\\ud800"}', TextSettings(), "something else than text"),
        ("a.jsonl", '{"body": "b", "id": 1}', TextSettings(), "no column 'text' in line 1, it has body, id:"),
        ("a.csv", "", TextSettings(), "is empty"),
        ("a.csv", "text\n\n  \n", TextSettings(), "is empty"),
        ("a.csv", "q,b\n1,2\n", PAIR, "no column 'a' in the header, it has q, b:"),
        ("a.csv", f"My secret: {SECRET},id\n1,2", TextSettings(), "it has id and 1 that do not look like names"),
        ("a.csv", f"text,id\n{SECRET},1,{SECRET}\n", TextSettings(), "3 values in the row that ends at line 2 and 2"),
        ("a.csv", f'text,id\n"{SECRET}', TextSettings(), "not valid CSV at line 2"),
    ],
)
def test_unusable_file_is_one_line_that_keeps_the_text_private(
    tmp_path: Path, name: str, content: str | bytes, config: TextSettings, says: str
) -> None:
    with pytest.raises(BadData, match=says) as caught:
        read_documents(write(tmp_path, name, content), config)
    message = str(caught.value)
    assert message.startswith(name)
    assert "\n" not in message
    assert SECRET not in message
    assert str(tmp_path) not in message


def test_missing_file_and_folder_are_bad_data(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"gone\.txt is not there"):
        read_documents(tmp_path / "gone.txt", TextSettings())
    (tmp_path / "texts.txt").mkdir()
    with pytest.raises(BadData, match=r"texts\.txt is a folder"):
        read_documents(tmp_path / "texts.txt", TextSettings())


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_length": 1},
        {"packing": "dense"},
        {"prompt_column": "q"},
        {"completion_column": "a"},
        {"text_column": "t", "prompt_column": "q", "completion_column": "a"},
        {"prompt_column": "q", "completion_column": "q"},
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"validation_fraction": float("nan")},
    ],
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(BadRequest, match=r"choose|give|name"):
        TextSettings(**options)  # type: ignore[arg-type]


# Splitting


def test_split_is_the_same_on_every_machine() -> None:
    # as `printf 'paragraph 1' | sha256sum` says: those whose digest starts below 40 (hexadecimal), a quarter of 100
    train, validation = split_documents([Document(f"paragraph {i}\n\n") for i in range(20)], 0.25)
    assert [int(document.text.split()[1]) for document in validation] == [1, 2, 6, 14]
    assert len(train) == 16


@given(
    order=st.permutations(range(60)),
    fraction=st.floats(0.2, 0.8),
)
def test_split_does_not_depend_on_order_and_keeps_it(order: list[int], fraction: float) -> None:
    documents = [Document(f"text {i}") for i in range(60)]
    shuffled = [documents[i] for i in order]
    train, validation = split_documents(shuffled, fraction)
    assert (set(train), set(validation)) == tuple(map(set, split_documents(documents, fraction)))
    assert train == [document for document in shuffled if document in train]
    assert validation == [document for document in shuffled if document in validation]
    assert len(train) + len(validation) == 60


def test_no_prompt_and_no_paragraph_is_in_both_parts() -> None:
    records = [Document(f"answer {i}", f"question {i % 9}", record=True) for i in range(90)]
    train, validation = split_documents(records, 0.4)
    assert not {document.prompt for document in train} & {document.prompt for document in validation}
    train, validation = split_documents([Document(f"p {i % 9}" + "\n" * (i % 4)) for i in range(90)], 0.4)
    assert not {document.text.strip() for document in train} & {document.text.strip() for document in validation}


def test_split_share_is_about_the_fraction() -> None:
    _, validation = split_documents([Document(str(i)) for i in range(5000)], 0.1)
    assert 400 < len(validation) < 600


def test_a_part_may_not_be_empty_unless_nothing_is_held_out() -> None:
    with pytest.raises(BadData, match=r"of 1 documents .* give more documents"):
        split_documents([Document("alone")], 0.5)
    assert split_documents([Document("alone")], 0) == ([Document("alone")], [])


# Sequences


@given(texts=documents_of_text, length=st.integers(2, 9))
def test_packed_running_text_loses_and_doubles_no_token(texts: list[str], length: int) -> None:
    documents, ids = [Document(text) for text in texts], encode("".join(texts))
    config = TextSettings(sequence_length=length)
    if len(ids) < 2:
        with pytest.raises(BadData, match="give more text"):
            build_sequences(documents, tokenizer(), config, keep_last=True)
        return
    sequences = build_sequences(documents, tokenizer(), config, keep_last=True)
    counted = len(ids) - (len(ids) % length == 1)  # a last window of one token has nothing to predict
    assert kept(sequences) == ids[:counted]
    assert sequences.input_ids.shape == sequences.labels.shape == (-(-counted // length), length)
    assert sequences.loss_tokens == counted - len(sequences)
    if len(ids) >= length:
        full = build_sequences(documents, tokenizer(), config, keep_last=False)
        assert full.input_ids.flatten().tolist() == ids[: len(ids) // length * length]
        assert torch.equal(full.input_ids, full.labels)


@given(texts=documents_of_text, length=st.integers(2, 9))
def test_packed_records_are_each_followed_by_eos(texts: list[str], length: int) -> None:
    ids = [token for text in texts for token in [*encode(text), 1]]
    documents = [Document(text, record=True) for text in texts]
    sequences = build_sequences(documents, tokenizer(), TextSettings(sequence_length=length), keep_last=True)
    assert kept(sequences) == ids[: len(ids) - (len(ids) % length == 1)]


@given(
    pairs=st.lists(st.tuples(st.text(min_size=1, max_size=9), st.text(min_size=1, max_size=9)), min_size=1, max_size=6)
)
def test_packed_prompts_are_read_but_not_predicted(pairs: list[tuple[str, str]]) -> None:
    ids = [token for prompt, text in pairs for token in [*encode(prompt), *encode(text), 1]]
    wanted = [on for prompt, text in pairs for on in [False] * len(encode(prompt)) + [True] * (len(encode(text)) + 1)]
    documents = [Document(text, prompt, record=True) for prompt, text in pairs]
    sequences = build_sequences(documents, tokenizer(), TextSettings(sequence_length=512), keep_last=True)
    assert sequences.input_ids.flatten()[: len(ids)].tolist() == ids
    assert (sequences.labels.flatten() != IGNORE)[: len(ids)].tolist() == wanted
    assert sequences.loss_tokens == sum(wanted)


@given(texts=documents_of_text, length=st.integers(2, 9))
def test_padded_rows_are_one_document_each(texts: list[str], length: int) -> None:
    documents = [Document(text, record=True) for text in texts]
    config = TextSettings(sequence_length=length, packing="padded")
    sequences = build_sequences(documents, tokenizer(), config, keep_last=False)
    assert len(sequences) == len(texts)
    for text, row, labels in zip(texts, sequences.input_ids.tolist(), sequences.labels.tolist(), strict=True):
        ids = [*encode(text), 1][:length]
        assert row == ids + [1] * (length - len(ids))  # padded with EOS, as there is no token for padding
        assert labels == ids + [IGNORE] * (length - len(ids))


def test_running_text_is_tokenised_in_one_go() -> None:
    texts = ["The old mi", "ll stands by", " the river."]
    sequences = build_sequences(
        [Document(text) for text in texts], tokenizer(), TextSettings(sequence_length=64), keep_last=True
    )
    assert kept(sequences) == encode("".join(texts)) != [token for text in texts for token in encode(text)]


def test_a_tokenizer_that_adds_bos_adds_it_once_a_text() -> None:
    documents = [Document("mill"), Document(" by"), Document("river", record=True), Document("a", "q")]
    sequences = build_sequences(documents, tokenizer(bos=True), TextSettings(sequence_length=64), keep_last=True)
    ids = [0, *encode("mill by"), 0, *encode("river"), 1, 0, *encode("q"), *encode("a"), 1]
    assert sequences.input_ids[0, : len(ids)].tolist() == ids


def test_a_tokenizer_without_eos_joins_records_and_pads_with_zero() -> None:
    documents = [Document("river", record=True), Document("mill", record=True)]
    sequences = build_sequences(documents, tokenizer(eos=False), TextSettings(sequence_length=32), keep_last=True)
    assert kept(sequences) == encode("river") + encode("mill")
    assert sequences.input_ids[0, -1] == 0


def test_eos_that_a_text_or_a_tokenizer_brings_is_not_doubled() -> None:
    bpe = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    bpe.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    own = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")  # type: ignore[no-untyped-call]
    documents = [Document("river", record=True), Document("a<eos>", "q", record=True)]
    sequences = build_sequences(documents, own, TextSettings(sequence_length=32), keep_last=True)
    ids = [*encode("river"), 1, *encode("q"), *encode("a"), 1]
    assert sequences.input_ids[0].tolist() == ids + [1] * (32 - len(ids))
    assert sequences.loss_tokens == len(ids) - 2


def test_rows_with_nothing_to_predict_are_left_out() -> None:
    documents = [Document("a", "long prompt " * 9, record=True), Document("river", "q", record=True)]
    for packing in ("packed", "padded"):
        config = TextSettings(sequence_length=8, packing=packing)
        sequences = build_sequences(documents, tokenizer(), config, keep_last=True)
        assert ((sequences.labels[:, 1:] != IGNORE).sum(1) > 0).all()
    with pytest.raises(BadData, match=r"nothing to predict in .* larger sequence_length"):
        build_sequences(documents[:1], tokenizer(), config, keep_last=True)


def test_training_text_shorter_than_a_sequence_says_how_long_it_is() -> None:
    tokens = len(encode("The old mill"))
    with pytest.raises(BadData, match=f"{tokens} tokens .* less than 128"):
        build_sequences([Document("The old mill")], tokenizer(), TextSettings(), keep_last=False)


# Batches


@given(
    count=st.integers(1, 12), batch_size=st.integers(1, 30), epochs=st.integers(1, 4), seed=st.integers(-(2**63), 2**63)
)
def test_every_epoch_uses_each_sequence_once(count: int, batch_size: int, epochs: int, seed: int) -> None:
    steps = -(-count * epochs // batch_size)
    batches = [batch_indices(count, batch_size, step, seed) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    order = [index for batch in batches for index in batch]
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_batches_need_no_state_and_differ_between_epochs_and_seeds() -> None:
    assert batch_indices(100, 8, 40, seed=3) == batch_indices(100, 8, 40, seed=3)
    epochs = [tuple(batch_indices(100, 100, epoch, seed)) for epoch in range(5) for seed in range(5)]
    assert max(Counter(epochs).values()) == 1


@pytest.mark.parametrize(("count", "batch_size", "step"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_batches_are_refused(count: int, batch_size: int, step: int) -> None:
    with pytest.raises(BadRequest, match="positive"):
        batch_indices(count, batch_size, step, seed=0)
