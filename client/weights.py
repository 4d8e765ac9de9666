"""Gets this device's part of a model: from a folder that its owner named, or from the coordinator by stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc

from protos.v1 import coordinator_pb2 as pb
from protos.v1.coordinator_pb2_grpc import CoordinatorStub
from split.errors import BadModelFolder, BadTensor, LinkLost
from split.models.blobs import BlobModel, Blobs, BlobStore
from split.models.manifest import Manifest, build_manifest, holder_digest, restrict
from split.models.source import TOKENIZER_FILES, ModelFolder, TensorSource
from split.tls import error_of

Tell = Callable[[int, int], None]  # bytes that are here, bytes in all
_DECIDING = {"config.json", *TOKENIZER_FILES} - {"chat_template.jinja", "chat_template.json"}  # files, for training
_ATTEMPTS = 5  # of one blob, each going on where the last one broke off


def device_source(
    stub: CoordinatorStub, address: str, job: str, state: Path, folder: Path | None, tell: Tell
) -> tuple[TensorSource, str]:
    """The source of this device's tensors, and their digest.

    folder: the owner's own copy of the model. Raises BadModelFolder when its files are not the coordinator's.
    What is streamed is kept under its digests in the state folder, so the next job of this model fetches nothing.
    """
    manifest = _manifest(stub, address, job)
    if folder is not None:
        return _own_copy(folder, manifest, state / "digests.json"), holder_digest(manifest, manifest.tensors)
    store = BlobStore(state / "blobs")
    _fetch_missing(stub, address, job, manifest, store, tell)
    return BlobModel(store, manifest), holder_digest(manifest, manifest.tensors)


def device_adapter(
    stub: CoordinatorStub, address: str, job: str, state: Path, name: str, tell: Tell
) -> tuple[Blobs, Manifest]:
    """This device's part of an adapter that is served with the model, streamed and kept as the model's is."""
    manifest = _manifest(stub, address, job, name)
    store = BlobStore(state / "blobs")
    _fetch_missing(stub, address, job, manifest, store, tell)
    return Blobs(store, manifest), manifest


def _manifest(stub: CoordinatorStub, address: str, job: str, adapter: str = "") -> Manifest:
    try:
        message = stub.GetManifest(pb.ManifestRequest(job=job, adapter=adapter), timeout=60)
    except grpc.RpcError as error:
        raise error_of(error, address) from None
    return Manifest.from_proto(message)


def _own_copy(folder: Path, manifest: Manifest, cache: Path) -> ModelFolder:
    own = ModelFolder(folder)
    missing = sorted(set(manifest.tensors) - own.tensor_names())
    if missing:
        raise BadModelFolder(f"{folder} has no tensor {missing[0]}, which the coordinator's model has")
    mine = restrict(build_manifest(own, manifest.tensors, cache=cache), manifest.tensors)
    for name, entry in manifest.tensors.items():
        if mine.tensors[name] != entry:
            raise BadModelFolder(
                f"the model files in {folder} differ from the coordinator's (first in {name}): bring them up to date, "
                "or leave --model away to get them from the coordinator"
            )
    for name in sorted(manifest.files.keys() & _DECIDING):
        if mine.files.get(name) != manifest.files[name]:
            raise BadModelFolder(
                f"{folder}/{name} differs from the coordinator's: bring it up to date, or leave --model away"
            )
    return own


def _fetch_missing(
    stub: CoordinatorStub, address: str, job: str, manifest: Manifest, store: BlobStore, tell: Tell
) -> None:
    total = sum(blob.size for blob in manifest.blobs())
    here = total - sum(blob.size - store.received(blob.digest) for blob in store.missing(manifest))
    for blob in store.missing(manifest):
        attempt = 0
        while not store.has(blob.digest):
            offset = store.received(blob.digest)
            try:
                request = pb.FetchRequest(job=job, digest=blob.digest, offset=offset)
                with store.writer(blob, offset) as writer:
                    for chunk in stub.Fetch(request):
                        writer.write(chunk.data)
                        here += len(chunk.data)
                        tell(here, total)
            except (grpc.RpcError, LinkLost, BadTensor) as error:
                lost = error_of(error, address) if isinstance(error, grpc.RpcError) else error
                attempt += store.received(blob.digest) == offset  # an attempt that brought something is none
                # BadTensor: what was kept of an earlier download was damaged and is thrown away; it starts anew.
                if not isinstance(lost, LinkLost | BadTensor) or attempt >= _ATTEMPTS:
                    raise lost from None
