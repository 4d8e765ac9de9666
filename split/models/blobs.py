"""A device's weights by digest: what it has fetched, what it is fetching, and the model that these blobs make.

A download goes to `DIGEST.part`, can be broken off and gone on with at any byte, and gets its final name only when
its SHA-256 is right; so whatever has a final name is whole, and the next job downloads nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from isthmus.split.errors import BadModelFolder, BadTensor, LinkLost, WrongState
from isthmus.split.models.architectures import parse_config
from isthmus.split.models.manifest import CHUNK_BYTES, DTYPES_BY_NAME, Blob, Manifest, TensorEntry, check_digest
from isthmus.split.models.safetensors_file import byte_size
from isthmus.split.models.source import MODEL_FILES, load_tokenizer, read_text, settle_head


class BlobStore:
    """Blobs in a directory, each in a file named by its digest."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """The place where a whole blob is or will be. Raises BadTensor if digest is not a SHA-256 digest."""
        return self.directory / check_digest(digest)

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def received(self, digest: str) -> int:
        """Bytes of the blob that are here: its size if it is whole, those of a partial download, or 0."""
        for path in (self.path(digest), self._partial(digest)):
            if path.is_file():
                return path.stat().st_size
        return 0

    def missing(self, manifest: Manifest) -> tuple[Blob, ...]:
        """The manifest's blobs that are not (or not wholly) here."""
        return tuple(blob for blob in manifest.blobs() if not self.has(blob.digest))

    def writer(self, blob: Blob, offset: int) -> BlobWriter:
        """Take the bytes of a blob from offset on, which has to be received(digest).

        Raises BadRequest for another offset, WrongState if the blob is whole or another writer has it open.
        """
        if self.has(blob.digest):
            raise WrongState(f"blob {blob.digest} is here already")
        return BlobWriter(self._partial(blob.digest), self.path(blob.digest), blob, offset)

    def _partial(self, digest: str) -> Path:
        return self.directory / f"{check_digest(digest)}.part"


class BlobWriter:
    """A download that is under way; a context manager.

    Leaving the block with all bytes written makes the blob whole: checked, on the disk, under its final name.
    Leaving it earlier keeps what has come, to go on from there: with LinkLost, unless another error is on its way.
    Wrong bytes (too many, or another digest) raise BadTensor and are thrown away.
    """

    def __init__(self, partial: Path, final: Path, blob: Blob, offset: int) -> None:
        self._partial, self._final, self._blob = partial, final, blob
        self._file: BinaryIO = partial.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._file.fileno()), partial.stat()):
                raise OSError("another writer has renamed it since it was opened")
        except OSError:
            self._file.close()
            raise WrongState(f"blob {blob.digest} is being downloaded already") from None
        self.received = self._file.seek(0, os.SEEK_END)
        if offset != self.received:
            self._file.close()
            raise WrongState(f"blob {blob.digest}: {self.received} bytes are here, the next ones start at {offset}")
        self._hasher = hashlib.sha256()
        self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            self._hasher.update(chunk)

    def write(self, chunk: bytes) -> None:
        """Append the next bytes; raises BadTensor if there are more than the blob has."""
        if self.received + len(chunk) > self._blob.size:
            self._discard(f"more than its {self._blob.size} bytes came")
        self._file.write(chunk)
        self._hasher.update(chunk)
        self.received += len(chunk)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file.closed:
            return
        if self.received < self._blob.size:
            self._file.close()
            if kind is None:
                raise LinkLost(f"blob {self._blob.digest} ended after {self.received} of {self._blob.size} bytes")
            return
        self._publish()

    def _publish(self) -> None:
        if self.received > self._blob.size or self._hasher.hexdigest() != self._blob.digest:
            self._discard("its bytes do not have this digest")
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._partial, self._final)
        self._file.close()
        directory = os.open(self._final.parent, os.O_RDONLY)  # the new name has to survive a power cut too
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _discard(self, reason: str) -> None:
        self._partial.unlink(missing_ok=True)
        self._file.close()
        raise BadTensor(f"blob {self._blob.digest} was thrown away: {reason}; fetch it again")


class Blobs:
    """Files and tensors that are blobs of a store. Raises BadTensor if one is missing or of another size."""

    def __init__(self, store: BlobStore, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self.read_names: set[str] = set()

    def text(self, name: str) -> str:
        """The text of a file of the model."""
        blob = self._manifest.files.get(name)
        if blob is None:
            raise BadModelFolder(f"the manifest has no {name}")
        return read_text(self._whole(blob))

    def file(self, name: str) -> Path | None:
        blob = self._manifest.files.get(name)
        return None if blob is None else self._whole(blob)

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(self, name: str) -> Tensor:
        """The tensor, its bytes mapped from the blob (private: writing to it does not change the blob)."""
        entry = self._entry(name)
        dtype = DTYPES_BY_NAME.get(entry.dtype)
        if dtype is None or byte_size(dtype, entry.shape) != entry.blob.size:
            raise BadTensor(f"{name}: {entry.blob.size} bytes do not make {entry.dtype} {entry.shape}")
        path = self._whole(entry.blob)
        self.read_names.add(name)
        if not entry.blob.size:  # nothing to map
            return torch.empty(entry.shape, dtype=dtype)
        data = torch.from_file(str(path), shared=False, size=entry.blob.size, dtype=torch.uint8)
        return data.view(dtype).reshape(entry.shape)

    def _entry(self, name: str) -> TensorEntry:
        entry = self._manifest.tensors.get(name)
        if entry is None:
            raise BadModelFolder(f"tensor {name} is not among those of this part of the model")
        return entry

    def _whole(self, blob: Blob) -> Path:
        path = self._store.path(blob.digest)
        if not path.is_file() or path.stat().st_size != blob.size:
            raise BadTensor(f"blob {blob.digest} is not here with its {blob.size} bytes; fetch it again")
        return path


class BlobModel(Blobs):
    """A model, or a holder's part of one (a TensorSource). Raises BadModelFolder if the manifest has no config.json."""

    def __init__(self, store: BlobStore, manifest: Manifest) -> None:
        super().__init__(store, manifest)
        if unknown := sorted(set(manifest.files) - set(MODEL_FILES)):
            raise BadTensor(f"a manifest may not have the file {unknown[0]!r}")
        if "config.json" not in manifest.files:
            raise BadModelFolder("the manifest has no config.json")

    @cached_property
    def config(self) -> PreTrainedConfig:
        config = parse_config(self.text("config.json"), "config.json")
        settle_head(config, self.tensor_names())
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded from a folder with its files under their own names."""
        with tempfile.TemporaryDirectory(dir=self._store.directory, prefix="view.") as view:
            for name, blob in self._manifest.files.items():
                (Path(view) / name).symlink_to(self._whole(blob).resolve())
            return load_tokenizer(Path(view))
