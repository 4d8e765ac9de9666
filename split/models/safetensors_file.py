"""Reading one safetensors file by byte ranges: its header, single tensors, and their raw bytes.

The safetensors library maps the whole file and gives tensors; what is needed here too is where a tensor's
bytes are (to hash them and to send them), and a tensor in memory of its own without the file's pages beside it.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.split.errors import BadModelFolder

MAX_HEADER_BYTES = 100_000_000  # the library's own bound

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorPlace:
    """The place of a tensor's bytes, and what they mean. offset: from the start of the file. Both in bytes."""

    path: Path
    offset: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file by name; raises BadModelFolder if the file is not whole or not valid."""
    try:
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _broken(path, "it is too short")
            (header_size,) = struct.unpack("<Q", prefix)
            if header_size > min(MAX_HEADER_BYTES, file_size - 8):
                raise _broken(path, "its header is longer than the file or than 100 MB")
            header = json.loads(file.read(header_size))
    except OSError as error:
        raise BadModelFolder(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # of json and of utf-8
        raise _broken(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    start = 8 + header_size
    places = {
        name: _place(path, start, file_size, name, entry) for name, entry in header.items() if name != "__metadata__"
    }
    _check_layout(path, start, file_size, places)
    return places


def read_tensor(place: TensorPlace) -> Tensor:
    """The tensor in fresh memory of exactly its size; raises BadModelFolder if the file has become shorter."""
    data = torch.empty(place.size, dtype=torch.uint8)
    if place.size:
        view = data.numpy().data
        done = 0
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            while done < place.size:  # one call reads at most 2 GiB
                count = file.readinto(view[done:])
                if not count:
                    raise _broken(place.path, "it ends before its last tensor")
                done += count
    return data.view(place.dtype).reshape(place.shape)


def byte_size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _place(path: Path, start: int, file_size: int, name: str, entry: Any) -> TensorPlace:
    try:
        begin, end = (int(value) for value in entry["data_offsets"])
        shape = tuple(int(value) for value in entry["shape"])
        code = str(entry["dtype"])
    except (KeyError, TypeError, ValueError):
        raise _broken(path, f"the entry of {name} is not valid") from None
    if code not in DTYPES:
        raise BadModelFolder(f"{path}: {name} has data type {code}, which cannot be split; convert it to float")
    if not 0 <= begin <= end or any(value < 0 for value in shape) or byte_size(DTYPES[code], shape) != end - begin:
        raise _broken(path, f"the size of {name} does not fit its shape")
    if start + end > file_size:
        raise _broken(path, f"it has {file_size} bytes and needs {start + end}: it was not copied to its end")
    return TensorPlace(path, start + begin, end - begin, DTYPES[code], shape)


def _check_layout(path: Path, start: int, file_size: int, places: Mapping[str, TensorPlace]) -> None:
    """The format's own rule: tensors follow one another without gaps or overlap, to the end of the file."""
    at = start
    for place in sorted(places.values(), key=lambda place: (place.offset, place.size)):
        if place.offset != at:
            raise _broken(path, "its tensors overlap or leave gaps")
        at += place.size
    if at != file_size:
        raise _broken(path, f"it has {file_size} bytes, its header speaks of {at}")


def _broken(path: Path, reason: str) -> BadModelFolder:
    return BadModelFolder(f"{path} is not a whole safetensors file ({reason}); copy or download it again")
