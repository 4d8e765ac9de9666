"""A device's part of a model, when two of its processes want it at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isthmus.client.weights import device_source
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.models.blobs import BlobStore
from isthmus.split.models.manifest import build_manifest, read_blob
from isthmus.split.models.source import ModelFolder
from tests.split.tiny_models import make_model


class Coordinator:
    """Gives out a whole model."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder, self.manifest = folder, build_manifest(folder)
        self.parts: list[pb.ManifestRequest] = []
        self.fetched: list[pb.FetchRequest] = []

    def GetManifest(self, request: pb.ManifestRequest, timeout: float) -> pb.Manifest:
        self.parts.append(request)
        return self.manifest.to_proto()

    def Fetch(self, request: pb.FetchRequest) -> Iterator[pb.Chunk]:
        self.fetched.append(request)
        for data in read_blob(self.folder, self.manifest, request.digest, request.offset):
            yield pb.Chunk(data=data)


def test_what_another_process_fetches_is_waited_for_and_comes_once(tmp_path: Path) -> None:
    coordinator: Any = Coordinator(ModelFolder(make_model(tmp_path / "model", "llama", layers=1)))
    blob = max(coordinator.manifest.blobs(), key=lambda blob: blob.size)
    data = b"".join(read_blob(coordinator.folder, coordinator.manifest, blob.digest))
    waiting, others = threading.Event(), BlobStore(tmp_path / "state" / "blobs").writer(blob, 0)
    told: list[int] = []

    def tell(here: int, total: int) -> None:
        told.append(here)
        if len(told) > 1 and told[-1] == told[-2]:  # nothing came: it waits
            waiting.set()

    def other() -> None:
        assert waiting.wait(60)
        with others:
            others.write(data)

    thread = threading.Thread(target=other)
    thread.start()
    source, _, _ = device_source(coordinator, "here", "job", tmp_path / "state", None, tell, user_blocks=1)
    thread.join(60)
    assert source.tensor_names() == coordinator.folder.tensor_names()
    assert blob.digest not in {request.digest for request in coordinator.fetched}
    for request in (*coordinator.parts, *coordinator.fetched):
        assert (request.job, request.user, request.blocks) == ("job", True, 1)
