"""Text in files becomes documents: .txt, .jsonl and .csv, read strictly; and is split in two by hash.

Nothing here prints what is in a file: errors name the file, the line and the column, since they travel to the
coordinator and the text must not.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.split.errors import BadData
from isthmus.split.job.groups import TextSettings

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair, as JSON can hold it, cannot be hashed nor tokenised

csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents; the whole file is in memory anyway


@dataclass(frozen=True)
class Document:
    """A piece of running text, or a record that stands by itself (`record`, or any document with a prompt).

    Pieces are joined as they are and tokenised as one text; records are tokenised one by one and end with EOS.
    With a prompt the loss is on `text` only.
    """

    text: str
    prompt: str = ""
    record: bool = False


def read_documents(path: Path, config: TextSettings) -> list[Document]:
    """Reads a .txt, .jsonl or .csv file in UTF-8 (a byte order mark is dropped).

    .txt: the documents are the paragraphs, each with its trailing blank lines: joined, they are the file's text.
    .jsonl, .csv: a record a row; rows with blank text (or completion) are left out, blank lines too.
    Raises BadData, naming the file, the line and what to do, never what the file says.
    """
    reader = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}.get(path.suffix.lower())
    if os.path.isdir(path):  # unlike Path.is_dir(), also in a folder that may not be looked into
        raise BadData(f"{path.name} is a folder: name a .txt, .jsonl or .csv file")
    if reader is None:
        raise BadData(f"{path.name} is not a kind of file that can be read: give a .txt, .jsonl or .csv file")
    documents = [document for document in reader(path.name, _read_text(path), config) if document.text.strip()]
    if not documents:
        raise BadData(f"{path.name} is empty: give a file with text in it")
    return documents


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, each in the order given; fraction 0 holds nothing out.

    A document's part depends only on the SHA-256 of its prompt (of its stripped text if it has none), so it is the
    same on every machine and in every order, and equal prompts or paragraphs are never in both parts.
    Raises BadData if one of the parts would be empty.
    """
    if fraction == 0:
        return list(documents), []
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        key = (document.prompt or document.text).strip().encode()
        place = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
        (validation if place < fraction else train).append(document)
    if not train or not validation:
        raise BadData(
            f"of {len(documents)} documents {len(validation)} fall to validation and {len(train)} to training: give"
            f" more documents (paragraphs with a blank line between them, or rows), or another validation_fraction"
            f" than {fraction:g} (0 holds nothing out)"
        )
    return train, validation


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadData(f"{path.name} is not there: check the path") from None
    except OSError as error:
        raise BadData(f"{path.name} cannot be read ({error.strerror}): check the path and its permissions") from None
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    try:
        return data[len(mark) :].decode("utf-8")
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        line = data.count(b"\n", 0, place) + 1
        raise BadData(f"{path.name} is not UTF-8 at line {line} (byte {place}): save it as UTF-8") from None


def _read_txt(name: str, text: str, config: TextSettings) -> list[Document]:
    if config.prompt_column is not None:
        raise BadData(f"{name} has no columns: give a .jsonl or .csv file, or leave out prompt_column")
    paragraphs: list[list[str]] = [[]]
    content = ended = False  # the paragraph has a line with text; a blank line came after it
    for line in io.StringIO(text, newline=""):  # newline="": keeps line ends as they are
        if line.strip():
            if ended:
                paragraphs.append([])
            content, ended = True, False
        else:
            ended = content  # blank lines at the start of the file belong to its first paragraph
        paragraphs[-1].append(line)
    return [Document("".join(lines)) for lines in paragraphs]


def _read_jsonl(name: str, text: str, config: TextSettings) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): JSON may hold U+2028 as it is
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise BadData(f"{name} has invalid JSON at line {number}: put one JSON object on each line") from None
        if not isinstance(row, dict):
            raise BadData(f'{name} has no JSON object at line {number}: write rows as {{"text": "..."}}')
        columns = _columns(name, f"line {number}", list(row), config, "text")
        documents.append(_record(name, number, [row[column] for column in columns], columns))
    return documents


def _read_csv(name: str, text: str, config: TextSettings) -> list[Document]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    documents = []
    try:
        header = [column.strip() for column in next((row for row in rows if row), [])]
        if not header:
            return []
        columns = _columns(name, "the header", header, config, header[0] if len(header) == 1 else "text")
        places = [header.index(column) for column in columns]
        for row in rows:
            if len(row) < 2 and not "".join(row).strip():
                continue
            if len(row) != len(header):
                raise BadData(
                    f"{name} has {len(row)} values in the row that ends at line {rows.line_num} and {len(header)}"
                    " columns in its header: put quotes around values with commas or line breaks"
                )
            documents.append(_record(name, rows.line_num, [row[place] for place in places], columns))
    except csv.Error:
        raise BadData(f"{name} is not valid CSV at line {rows.line_num}: check the quotes there") from None
    return documents


def _columns(name: str, place: str, present: list[str], config: TextSettings, default: str) -> list[str]:
    """The column of the text, or those of prompt and completion. Raises BadData if one is missing."""
    if config.prompt_column is not None and config.completion_column is not None:
        wanted = [config.prompt_column, config.completion_column]
    else:
        wanted = [default if config.text_column is None else config.text_column]
    for column in wanted:
        if column not in present:
            # the first line of a CSV without a header is text: show only what looks like the name of a column
            names = [key for key in present if re.fullmatch(r"[A-Za-z_][\w.-]{0,39}", key)]
            others = (
                f" and {len(present) - len(names)} that do not look like names" if len(names) < len(present) else ""
            )
            raise BadData(
                f"{name} has no column {column!r} in {place}, it has {', '.join(names) or 'none'}{others}:"
                " choose with text_column, or prompt_column and completion_column"
            )
    return wanted


def _record(name: str, line: int, values: list[object], columns: list[str]) -> Document:
    texts = []
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str) or _SURROGATE.search(value):
            raise BadData(f"{name} has something else than text in column {column!r} at line {line}: make it a string")
        texts.append(value)
    return Document(texts[-1], texts[0] if len(texts) == 2 else "", record=True)
