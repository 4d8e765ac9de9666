"""ONNX graphs on disk, each in a folder named by what it was made from, so that a restart makes none again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import torch

from split.errors import BadRequest
from split.models.source import ModelFolder, TensorSource
from split.runtime.onnx_graph import VERSION

_DIGESTS = "digests.json"


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus" / "onnx"


def cached_graph(
    cache: Path, source: TensorSource, tensors: Iterable[str], what: object, write: Callable[[Path], None]
) -> Path:
    """The folder of a graph; `write` is called with an empty one if there is none yet, or only a damaged one.

    what: besides the model's configuration and the named tensors, whatever the graph depends on, as JSON.
    Two processes that want the same graph make it once. Raises BadRequest if the cache cannot be written.
    """
    versions = [VERSION, onnxruntime.__version__]
    key = [versions, what, source.config.to_dict(), [_identity(source, name) for name in sorted(tensors)]]
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    final, partial = cache / name, cache / f"{name}.part"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{name}.lock"):
            if not _is_whole(final):
                for leftover in (final, partial):
                    shutil.rmtree(leftover, ignore_errors=True)
                partial.mkdir()
                write(partial)
                _seal(partial)
                os.rename(partial, final)
    except OSError as error:
        raise BadRequest(
            f"cannot keep ONNX graphs in {cache}: {error.strerror or error}; choose another folder"
        ) from None
    return final


def _identity(source: TensorSource, name: str) -> list[object]:
    """Something that changes with the tensor's values: where they are and since when, or their digest."""
    if isinstance(source, ModelFolder):
        place = source.place(name)
        stat = place.path.stat()
        return [name, str(place.path.resolve()), place.offset, place.size, stat.st_mtime_ns]
    tensor = source.read(name)
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return [name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]


def _seal(folder: Path) -> None:
    """Write down the digests of the folder's files, and bring all to the disk."""
    (folder / _DIGESTS).write_text(json.dumps(_digests(folder)), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(digests == _digests(folder))


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files, by name."""
    digests = {}
    for path in folder.iterdir():
        if path.name != _DIGESTS:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
