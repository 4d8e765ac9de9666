"""Gets this device's part of a model: from a folder that its owner named, or from the coordinator by stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.split.errors import BadModelFolder, BadTensor, LinkLost, WrongState
from isthmus.split.models.blobs import BlobModel, Blobs, BlobStore
from isthmus.split.models.manifest import Manifest, build_manifest, holder_digest, restrict, with_adapters
from isthmus.split.models.source import TOKENIZER_FILES, ModelFolder, TensorSource
from isthmus.split.tls import error_of

Tell = Callable[[int, int], None]  # bytes that are here, bytes in all
_DECIDING = {"config.json", *TOKENIZER_FILES} - {"chat_template.jinja", "chat_template.json"}  # what training needs
_OTHERS_TURN = 0.2  # seconds to wait for another process of this device
_ATTEMPTS = 5  # at one blob, each of which goes on where the last one broke off


def device_source(
    stub: CoordinatorStub,
    address: str,
    job: str,
    state: Path,
    folder: Path | None,
    tell: Tell,
    *,
    adapters: Sequence[str] = (),
    user_blocks: int | None = None,
    cut: int = 0,
) -> tuple[TensorSource, list[Blobs], str]:
    """This device's part of the model, its parts of these adapters, and one digest of all their tensors.

    folder: the owner's own copy of the model; None to get it from the coordinator.
    tell: gets (bytes that are here, bytes in all).
    user_blocks: number of own blocks of a guest of the model; None for what the device holds.
    cut: the cut that this device moves to, in a job that it takes part in; 0 for its task's.

    What is streamed is kept by digest in the state folder, so that the next job of this model fetches nothing. Raises
    BadModelFolder where the owner's files are not the coordinator's, and LinkLost.
    """

    def part(adapter: str = "") -> pb.ManifestRequest:
        blocks = cut if user_blocks is None else user_blocks
        return pb.ManifestRequest(job=job, adapter=adapter, user=user_blocks is not None, blocks=blocks)

    def fetched(adapter: str, manifest: Manifest) -> BlobStore:
        store = BlobStore(state / "blobs")
        _fetch_missing(stub, address, part(adapter), manifest, store, tell)
        return store

    manifest = _manifest(stub, address, part())
    if folder is None:
        source: TensorSource = BlobModel(fetched("", manifest), manifest)
    else:
        source = _own_copy(folder, manifest, state / "digests.json")
    manifests = {name: _manifest(stub, address, part(name)) for name in adapters}
    loras = [Blobs(fetched(name, one), one) for name, one in manifests.items()]
    return source, loras, with_adapters(holder_digest(manifest, manifest.tensors), list(manifests.values()))


def _manifest(stub: CoordinatorStub, address: str, part: pb.ManifestRequest) -> Manifest:
    try:
        message = stub.GetManifest(part, timeout=60)
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
    stub: CoordinatorStub, address: str, part: pb.ManifestRequest, manifest: Manifest, store: BlobStore, tell: Tell
) -> None:
    total = sum(blob.size for blob in manifest.blobs())
    here = total - sum(blob.size - store.received(blob.digest) for blob in store.missing(manifest))
    for blob in store.missing(manifest):
        attempt = 0
        while not store.has(blob.digest):
            offset = store.received(blob.digest)
            try:
                request = pb.FetchRequest(
                    job=part.job, digest=blob.digest, offset=offset, user=part.user, blocks=part.blocks
                )
                with store.writer(blob, offset) as writer:
                    for chunk in stub.Fetch(request):
                        writer.write(chunk.data)
                        here += len(chunk.data)
                        tell(here, total)
            except WrongState:  # another process of this device fetches it, or has just done so
                tell(here, total)
                time.sleep(_OTHERS_TURN)
            except (grpc.RpcError, LinkLost, BadTensor) as error:
                lost = error_of(error, address) if isinstance(error, grpc.RpcError) else error
                attempt += store.received(blob.digest) == offset  # an attempt that brought something does not count
                # BadTensor: what was kept of an earlier download was damaged and is thrown away; it starts anew.
                if not isinstance(lost, LinkLost | BadTensor) or attempt >= _ATTEMPTS:
                    raise lost from None
