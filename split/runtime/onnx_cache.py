"""ONNX graphs on disk, each in a folder named by what it was made from, so that a restart makes none again.

Beside each folder NAME are two empty files that processes lock: NAME.lock while the graph is looked at or made, and
NAME.use, shared, for as long as it is in use; when that was last is the file's time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import torch

from isthmus.split.errors import BadRequest
from isthmus.split.models.source import ModelFolder, TensorSource
from isthmus.split.runtime.onnx_graph import VERSION

log = logging.getLogger(__name__)

LIMIT = "ISTHMUS_GRAPH_CACHE_GIB"
"""The variable that says how much graphs may take on disk."""

_DEFAULT_GIB = 50
_DIGESTS = "digests.json"


def default_cache() -> Path:
    """The folder of graphs where nobody names one."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus" / "onnx"


def cache_limit() -> int:
    """Bytes that graphs may take. Raises BadRequest for a setting that is no number."""
    text = os.environ.get(LIMIT, str(_DEFAULT_GIB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 2**40:
        raise BadRequest(f"{LIMIT}={text!r}: give the GiB that graphs may take on disk, 0 or more")
    return int(limit * 2**30)


class CachedGraph:
    """A graph that is in use, and is not removed by anybody, for as long as this object lives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._use = _use_file(folder).open("w")
        fcntl.flock(self._use, fcntl.LOCK_SH)
        os.utime(self._use.fileno())


def cached_graph(
    cache: Path, source: TensorSource, tensors: Iterable[str], what: object, write: Callable[[Path], None]
) -> CachedGraph:
    """A graph; `write` is called with an empty folder if there is none yet, or only a damaged one.

    what: besides the model's configuration and the named tensors, whatever the graph depends on, as JSON.
    Two processes that want the same graph make it once. A new graph makes others go, the longest unused first, until
    all are within `cache_limit`, or in use. Raises BadRequest if the cache cannot be written.
    """
    limit = cache_limit()
    versions = [VERSION, onnxruntime.__version__]
    key = [versions, what, source.config.to_dict(), [_identity(source, name) for name in sorted(tensors)]]
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    final, partial = cache / name, cache / f"{name}.part"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(_lock_file(final)):
            if not _is_whole(final):
                for leftover in (final, partial):
                    shutil.rmtree(leftover, ignore_errors=True)
                partial.mkdir()
                write(partial)
                _seal(partial)
                os.rename(partial, final)
            graph = CachedGraph(final)
    except OSError as error:
        raise BadRequest(
            f"cannot keep ONNX graphs in {cache}: {error.strerror or error}; choose another folder"
        ) from None
    try:
        _prune(cache, limit)
    except OSError as error:  # this graph is there all the same
        log.warning("old graphs in %s could not be removed: %s", cache, error)
    return graph


def _prune(cache: Path, limit: int) -> None:
    sizes = {folder: _size(folder) for folder in _graphs(cache)}
    total = sum(sizes.values())
    for folder in sorted(sizes, key=_last_used):
        if total <= limit:
            return
        with _locked(_lock_file(folder), wait=False) as mine, _locked(_use_file(folder), wait=False) as unused:
            if mine and unused:
                shutil.rmtree(folder, ignore_errors=True)
                total -= sizes[folder]


def _graphs(cache: Path) -> list[Path]:
    """Folders of whole graphs; what another process removes meanwhile is passed over."""
    return [path.parent for path in cache.glob(f"*/{_DIGESTS}") if path.parent.suffix != ".part"]


def _size(folder: Path) -> int:
    """Bytes of a graph; 0 if another process has just removed it."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0


def _last_used(folder: Path) -> float:
    """When a graph was last used, in seconds since the epoch.

    For a graph of an earlier version this is when it was made; 0 if it is not there.
    """
    for path in (_use_file(folder), folder):
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            continue
    return 0.0


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _use_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.use")


def _identity(source: TensorSource, name: str) -> list[object]:
    """Facts that change when the tensor's values do: where they are and since when, or their digest."""
    if isinstance(source, ModelFolder):
        place = source.place(name)
        stat = place.path.stat()
        return [name, str(place.path.resolve()), place.offset, place.size, stat.st_mtime_ns]
    tensor = source.read(name)
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return [name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]


def _seal(folder: Path) -> None:
    """Write down the digests of the folder's files, and bring all of them to the disk."""
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
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a file. Gives whether it is locked now; False only without `wait`. The file's time stays as it was."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
