"""Content addressing: every tensor and file of a model by the SHA-256 of its bytes.

A device that has a folder compares digests with the coordinator's manifest; one that has none fetches blobs by digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadModelFolder, BadRequest, BadTensor, NotFound
from isthmus.split.models.safetensors_file import DTYPES, TensorPlace, byte_size
from isthmus.split.models.source import ADAPTER_FILES, MODEL_FILES

CHUNK_BYTES = 1 << 20

DTYPES_BY_NAME: Mapping[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class Folder(Protocol):
    """The folder of a model or an adapter. files: names of those that may be sent besides the tensors, if they
    exist.
    """

    path: Path
    files: Sequence[str]

    def tensor_names(self) -> frozenset[str]: ...

    def place(self, name: str) -> TensorPlace: ...


@dataclass(frozen=True)
class Blob:
    """Some bytes. digest: their SHA-256, 64 lower-case hexadecimal characters. size: their number."""

    digest: str
    size: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint.

    name: in the whole causal LM. dtype: torch's name of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blob: Blob


@dataclass(frozen=True)
class Manifest:
    """The contents of a model or of a part of it: files by name (config.json, tokenizer), tensors by name."""

    files: Mapping[str, Blob]
    tensors: Mapping[str, TensorEntry]

    def blobs(self) -> tuple[Blob, ...]:
        """The distinct blobs, files first."""
        entries = (*self.files.values(), *(entry.blob for entry in self.tensors.values()))
        return tuple(dict.fromkeys(entries))

    def to_proto(self) -> pb.Manifest:
        return pb.Manifest(
            files=[pb.FileEntry(name=name, blob=_blob_to_proto(blob)) for name, blob in self.files.items()],
            tensors=[
                pb.TensorEntry(name=entry.name, dtype=entry.dtype, shape=entry.shape, blob=_blob_to_proto(entry.blob))
                for entry in self.tensors.values()
            ],
        )

    @classmethod
    def from_proto(cls, message: pb.Manifest) -> Manifest:
        """Read a manifest and check its file names, digests, and that sizes fit the shapes. Raises BadTensor."""
        files: dict[str, Blob] = {}
        for file in message.files:
            if file.name not in (*MODEL_FILES, *ADAPTER_FILES) or file.name in files:
                raise BadTensor(f"a manifest may not have the file {file.name!r}, or not twice")
            files[file.name] = _blob_from_proto(file.blob)
        tensors: dict[str, TensorEntry] = {}
        for tensor in message.tensors:
            entry = TensorEntry(tensor.name, tensor.dtype, tuple(tensor.shape), _blob_from_proto(tensor.blob))
            if entry.dtype not in DTYPES_BY_NAME:
                raise BadTensor(f"{entry.name!r} has unknown data type {entry.dtype!r}")
            if entry.name in tensors or byte_size(DTYPES_BY_NAME[entry.dtype], entry.shape) != entry.blob.size:
                raise BadTensor(f"{entry.name!r} is in the manifest twice, or its size does not fit its shape")
            tensors[entry.name] = entry
        return cls(files, tensors)


def check_digest(digest: str) -> str:
    """Return a digest that is one, and so is safe in a file name. Raises BadTensor for another text."""
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise BadTensor(f"{digest[:80]!r} is not a SHA-256 digest")
    return digest


def build_manifest(folder: Folder, names: Iterable[str] | None = None, *, cache: Path | None = None) -> Manifest:
    """Hash the folder's files (configuration, tokenizer) and the named tensors (none given: all of them).

    Bytes are hashed as they are in the files. cache: a JSON file that remembers digests as long as a file's
    path, size and modification time stay the same. Raises BadModelFolder.
    """
    digests = _DigestCache(cache)
    files = {}
    for name in folder.files:
        path = folder.path / name
        if path.is_file():
            size = path.stat().st_size
            files[name] = Blob(digests.of(path, name, 0, size), size)
    tensors = {}
    for name in sorted(folder.tensor_names() if names is None else set(names)):
        place = folder.place(name)
        blob = Blob(digests.of(place.path, name, place.offset, place.size), place.size)
        tensors[name] = TensorEntry(name, str(place.dtype).removeprefix("torch."), place.shape, blob)
    digests.save()
    return Manifest(files, tensors)


def restrict(manifest: Manifest, names: Iterable[str]) -> Manifest:
    """Make the manifest of a holder: all files, and only the named tensors. Raises BadRequest if one is missing."""
    return Manifest(manifest.files, {entry.name: entry for entry in _select(manifest, names)})


def holder_digest(manifest: Manifest, names: Iterable[str]) -> str:
    """Compute one digest over names, dtypes, shapes and contents of the named tensors: equal only where these are."""
    rows = [[entry.name, entry.dtype, list(entry.shape), entry.blob.digest] for entry in _select(manifest, names)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def with_adapters(digest: str, adapters: Iterable[Manifest]) -> str:
    """Compute one digest of a holder's tensors, whose digest is given, and of its parts of adapters."""
    parts = [[*(blob.digest for blob in part.files.values()), holder_digest(part, part.tensors)] for part in adapters]
    return hashlib.sha256(json.dumps([digest, *parts]).encode()).hexdigest() if parts else digest


def read_blob(folder: Folder, manifest: Manifest, digest: str, offset: int = 0) -> Iterator[bytes]:
    """Read a tensor or file in the manifest from an offset on, in chunks of at most 1 MiB.

    Raises NotFound (no such digest in the manifest), BadRequest (an offset behind its end), BadModelFolder.
    """
    path, start, size = _locate(folder, manifest, digest)
    if not 0 <= offset <= size:
        raise BadRequest(f"blob {digest} has {size} bytes; {offset} is not a place to go on from")
    return _read_range(path, start + offset, size - offset)


def _locate(folder: Folder, manifest: Manifest, digest: str) -> tuple[Path, int, int]:
    for name, blob in manifest.files.items():
        if blob.digest == digest:
            return folder.path / name, 0, blob.size
    for entry in manifest.tensors.values():
        if entry.blob.digest == digest:
            place = folder.place(entry.name)
            return place.path, place.offset, place.size
    raise NotFound(f"no blob {digest[:80]!r} among those of this part of the model")


def _read_range(path: Path, start: int, size: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(start)
            while size:
                chunk = file.read(min(size, CHUNK_BYTES))
                if not chunk:
                    raise BadModelFolder(f"{path} has become shorter while it was read; copy or download it again")
                size -= len(chunk)
                yield chunk
    except OSError as error:
        raise BadModelFolder(f"cannot read {path}: {error.strerror}") from None


def _select(manifest: Manifest, names: Iterable[str]) -> list[TensorEntry]:
    wanted = sorted(set(names))
    if missing := [name for name in wanted if name not in manifest.tensors]:
        raise BadRequest(f"the model has no tensor {missing[0]} ({len(missing)} of {len(wanted)} are missing)")
    return [manifest.tensors[name] for name in wanted]


def _blob_to_proto(blob: Blob) -> pb.Blob:
    return pb.Blob(digest=blob.digest, size=blob.size)


def _blob_from_proto(message: pb.Blob) -> Blob:
    return Blob(check_digest(message.digest), message.size)


class _DigestCache:
    """Digests by file path and name inside it, valid while the file's size and modification time are the same."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._files: dict[str, dict[str, Any]] = {}
        self._changed = False
        if path is not None and path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                self._files = {str(key): dict(value) for key, value in stored.items()}
            except (OSError, ValueError, TypeError, AttributeError):
                self._files = {}  # only a cache: made again

    def of(self, path: Path, name: str, start: int, size: int) -> str:
        """The digest of `size` bytes from `start` on, which the file has under that name."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = self._files.get(str(path.resolve()))
        if entry is None or entry.get("stamp") != stamp or not isinstance(entry.get("digests"), dict):
            entry = self._files[str(path.resolve())] = {"stamp": stamp, "digests": {}}
        known = entry["digests"].get(name)
        if isinstance(known, list) and len(known) == 3 and known[:2] == [start, size]:
            return str(known[2])
        hasher = hashlib.sha256()
        for chunk in _read_range(path, start, size):
            hasher.update(chunk)
        entry["digests"][name] = [start, size, hasher.hexdigest()]
        self._changed = True
        return hasher.hexdigest()

    def save(self) -> None:
        if self._path is None or not self._changed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self._files, file)
        os.replace(temporary, self._path)
