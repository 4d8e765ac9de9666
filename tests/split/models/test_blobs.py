"""Content addressing: manifests, downloads that go on after a cut, and models made of blobs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadModelFolder, BadRequest, BadTensor, LinkLost, NotFound, WrongState
from isthmus.split.models.blobs import BlobModel, BlobStore
from isthmus.split.models.manifest import Blob, Manifest, build_manifest, holder_digest, read_blob, restrict
from isthmus.split.models.source import ModelFolder
from isthmus.split.models.stage import build_stages, cut_u_shaped
from tests.examples import examples
from tests.split.tiny_models import make_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(make_model(tmp_path_factory.mktemp("model"), "gpt2", layers=3, tied=True, shards=2))


@pytest.fixture(scope="module")
def manifest(source: ModelFolder) -> Manifest:
    return build_manifest(source)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def fetch(store: BlobStore, source: ModelFolder, manifest: Manifest) -> None:
    for blob in store.missing(manifest):
        with store.writer(blob, store.received(blob.digest)) as writer:
            for chunk in read_blob(source, manifest, blob.digest, store.received(blob.digest)):
                writer.write(chunk)


def blob_of(data: bytes) -> Blob:
    return Blob(hashlib.sha256(data).hexdigest(), len(data))


def test_digests_are_of_the_bytes_of_files_and_tensors(source: ModelFolder, manifest: Manifest) -> None:
    assert set(manifest.tensors) == source.tensor_names()
    for name, entry in manifest.tensors.items():
        tensor = source.read(name)
        assert (entry.dtype, entry.shape) == ("float32", tuple(tensor.shape))
        assert entry.blob == blob_of(tensor.numpy().tobytes())
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(manifest.files)
    for name, blob in manifest.files.items():
        assert blob == blob_of((source.path / name).read_bytes())


def test_a_manifest_survives_the_wire(manifest: Manifest) -> None:
    message = pb.Manifest.FromString(manifest.to_proto().SerializeToString())
    assert Manifest.from_proto(message) == manifest


DISHONEST: dict[str, Callable[[pb.Manifest], object]] = {
    "a file elsewhere": lambda m: setattr(m.files[0], "name", "../../.ssh/authorized_keys"),
    "code": lambda m: setattr(m.files[0], "name", "modeling_own.py"),
    "a file twice": lambda m: m.files.append(m.files[0]),
    "a path as digest": lambda m: setattr(m.tensors[0].blob, "digest", "../" * 21 + "a"),
    "a short digest": lambda m: setattr(m.files[0].blob, "digest", "abc"),
    "an upper-case digest": lambda m: setattr(m.files[0].blob, "digest", "A" * 64),
    "a size that does not fit the shape": lambda m: setattr(m.tensors[0].blob, "size", 1 << 60),
    "a shape that does not fit the size": lambda m: m.tensors[0].shape.append(2),
    "an unknown dtype": lambda m: setattr(m.tensors[0], "dtype", "object"),
    "a tensor twice": lambda m: m.tensors.append(m.tensors[0]),
}


@pytest.mark.parametrize("case", DISHONEST)
def test_a_dishonest_manifest_is_refused(manifest: Manifest, case: str) -> None:
    message = manifest.to_proto()
    DISHONEST[case](message)
    with pytest.raises(BadTensor):
        Manifest.from_proto(message)


def test_a_holders_digest_is_of_its_own_tensors_only(source: ModelFolder, manifest: Manifest, tmp_path: Path) -> None:
    front, middle, _ = cut_u_shaped(source.config, 1)
    mine, others = front.tensor_names(source.config), middle.tensor_names(source.config)
    one_shard = ModelFolder(make_model(tmp_path / "same", "gpt2", layers=3, tied=True, shards=1))
    assert holder_digest(build_manifest(one_shard, mine), mine) == holder_digest(manifest, mine)
    assert holder_digest(manifest, reversed(mine)) == holder_digest(manifest, mine)
    assert holder_digest(manifest, others) != holder_digest(manifest, mine)

    other = ModelFolder(make_model(tmp_path / "other", "gpt2", layers=3, tied=True, seed=1))
    assert holder_digest(build_manifest(other), mine) != holder_digest(manifest, mine)
    entry = manifest.tensors[mine[0]]
    reshaped = replace(manifest, tensors={**manifest.tensors, mine[0]: replace(entry, shape=entry.shape[::-1])})
    assert holder_digest(reshaped, mine) != holder_digest(manifest, mine)


def test_a_restricted_manifest_has_all_files_and_the_named_tensors(manifest: Manifest) -> None:
    names = sorted(manifest.tensors)[:3]
    part = restrict(manifest, names)
    assert part.files == manifest.files
    assert list(part.tensors) == names
    with pytest.raises(BadRequest, match=r"no tensor lm_tail\.weight"):
        restrict(manifest, ["lm_tail.weight"])


def test_hashing_named_tensors_reads_no_others(source: ModelFolder, manifest: Manifest) -> None:
    names = sorted(manifest.tensors)[:2]
    assert build_manifest(source, names) == restrict(manifest, names)


def test_remembered_digests_are_used_until_the_file_changes(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", layers=2)
    cache = tmp_path / "state" / "digests.json"
    first = build_manifest(ModelFolder(folder), cache=cache)
    assert build_manifest(ModelFolder(folder), cache=cache) == first

    remembered = json.loads(cache.read_text())
    digests = remembered[str((folder / "model.safetensors").resolve())]["digests"]
    digests["model.norm.weight"][2] = "0" * 64  # shows that it is looked up, not hashed again
    cache.write_text(json.dumps(remembered))
    looked_up = build_manifest(ModelFolder(folder), cache=cache)
    assert looked_up.tensors["model.norm.weight"].blob.digest == "0" * 64

    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert build_manifest(ModelFolder(folder), cache=cache) == first
    cache.write_text("not JSON")
    assert build_manifest(ModelFolder(folder), cache=cache) == first
    assert [path.name for path in cache.parent.iterdir()] == ["digests.json"]  # no temporary file is left


def test_blobs_are_read_in_bounded_chunks_from_any_offset(tmp_path: Path) -> None:
    folder = ModelFolder(make_model(tmp_path, "llama", layers=1, vocab_size=20_000))
    manifest = build_manifest(folder, ["model.embed_tokens.weight"])
    data = folder.read("model.embed_tokens.weight").numpy().tobytes()
    digest = manifest.tensors["model.embed_tokens.weight"].blob.digest
    chunks = list(read_blob(folder, manifest, digest))
    assert len(chunks) > 1
    assert max(map(len, chunks)) <= 1 << 20
    assert b"".join(chunks) == data
    assert b"".join(read_blob(folder, manifest, digest, 1_234_567)) == data[1_234_567:]
    assert list(read_blob(folder, manifest, digest, len(data))) == []
    with pytest.raises(BadRequest, match="not a place to go on from"):
        read_blob(folder, manifest, digest, len(data) + 1)
    unlisted = build_manifest(folder, ["model.norm.weight"]).tensors["model.norm.weight"].blob.digest
    for other in (unlisted, "f" * 64, "../config.json", ""):
        with pytest.raises(NotFound):
            read_blob(folder, manifest, other)


def test_a_model_of_fetched_blobs_is_the_folders_model(
    source: ModelFolder, manifest: Manifest, store: BlobStore
) -> None:
    front, middle, tail = cut_u_shaped(source.config, 1)
    names = {*front.tensor_names(source.config), *tail.tensor_names(source.config)}
    part = restrict(manifest, names)
    fetch(store, source, part)
    assert store.missing(part) == ()
    model = BlobModel(store, part)
    assert model.tensor_names() == names
    assert model.config.to_dict() == source.config.to_dict()
    text = "only hidden states leave it"
    assert model.tokenizer()(text)["input_ids"] == source.tokenizer()(text)["input_ids"]

    mine = build_stages(model, [front, tail])
    assert model.read_names == names
    assert mine[0].model.get_parameter("transformer.wte.weight") is mine[1].model.get_parameter("lm_head.weight")
    theirs = build_stages(ModelFolder(source.path), [front, tail])
    server = build_stages(source, [middle])[0]
    ids = torch.arange(10)[None]
    assert torch.equal(mine[1](server(mine[0](ids))), theirs[1](server(theirs[0](ids))))
    with pytest.raises(BadModelFolder, match="not among those of this part"):
        build_stages(model, [middle])
    before = {path.name: path.read_bytes() for path in store.directory.iterdir()}
    with torch.no_grad():
        mine[0].model.get_parameter("transformer.wte.weight").zero_()
    assert {path.name: path.read_bytes() for path in store.directory.iterdir()} == before  # the map is private


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=5))
@settings(max_examples=examples(40), deadline=None)
def test_a_download_goes_on_after_any_cuts(
    data: bytes, cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    blob = blob_of(data)
    for cut in sorted({cut for cut in cuts if cut < len(data)}):
        at = store.received(blob.digest)
        with pytest.raises(LinkLost, match="ended after"), store.writer(blob, at) as writer:
            writer.write(data[at:cut])
        assert store.received(blob.digest) == cut
        assert not store.has(blob.digest)
    at = store.received(blob.digest)
    with store.writer(blob, at) as writer:
        writer.write(data[at:])
    assert store.has(blob.digest)
    assert store.received(blob.digest) == len(data)
    assert store.path(blob.digest).read_bytes() == data
    assert [path.name for path in store.directory.iterdir()] == [blob.digest]


def test_another_error_in_the_middle_keeps_what_has_come(store: BlobStore) -> None:
    blob = blob_of(b"0123456789")

    def fail_after(chunk: bytes) -> None:
        with store.writer(blob, 0) as writer:
            writer.write(chunk)
            raise KeyError

    with pytest.raises(KeyError):
        fail_after(b"0123")
    assert store.received(blob.digest) == 4


@pytest.mark.parametrize("received", [b"0123456780", b"01234567890"], ids=["wrong bytes", "too many bytes"])
def test_a_corrupted_blob_is_thrown_away(store: BlobStore, received: bytes) -> None:
    blob = blob_of(b"0123456789")

    def receive() -> None:
        with store.writer(blob, 0) as writer:
            for byte in received:
                writer.write(bytes([byte]))

    with pytest.raises(BadTensor, match="was thrown away"):
        receive()
    assert not store.has(blob.digest)
    assert store.received(blob.digest) == 0
    assert list(store.directory.iterdir()) == []


def test_a_partial_file_that_was_changed_on_the_disk_is_found_out(store: BlobStore) -> None:
    blob = blob_of(b"0123456789")
    with pytest.raises(LinkLost), store.writer(blob, 0) as writer:
        writer.write(b"01234")
    (store.directory / f"{blob.digest}.part").write_bytes(b"01x34")
    with pytest.raises(BadTensor, match="thrown away"), store.writer(blob, 5) as writer:
        writer.write(b"56789")
    assert store.received(blob.digest) == 0


def test_a_writer_starts_where_the_partial_file_ends(store: BlobStore) -> None:
    blob = blob_of(b"0123456789")
    with pytest.raises(WrongState, match="0 bytes are here, the next ones start at 4"):
        store.writer(blob, 4)


def test_a_blob_has_one_writer_at_a_time(store: BlobStore) -> None:
    blob = blob_of(b"0123456789")
    with store.writer(blob, 0) as writer:
        writer.write(b"0123")
        with pytest.raises(WrongState, match="being downloaded already"):
            store.writer(blob, 4)
        writer.write(b"456789")
    with pytest.raises(WrongState, match="here already"):
        store.writer(blob, 10)
    assert store.path(blob.digest).read_bytes() == b"0123456789"


@pytest.mark.parametrize("digest", ["", "..", "../" * 21 + "a", "a" * 63, "a" * 65, "A" * 64, "a" * 63 + "/", "/" * 64])
def test_what_is_not_a_digest_never_becomes_a_path(store: BlobStore, digest: str) -> None:
    for use in (store.has, store.received, store.path, lambda digest: store.writer(Blob(digest, 1), 0)):
        with pytest.raises(BadTensor, match="not a SHA-256 digest"):
            use(digest)


def test_a_blob_of_another_size_is_not_read(source: ModelFolder, manifest: Manifest, store: BlobStore) -> None:
    fetch(store, source, manifest)
    name = "transformer.ln_f.weight"
    path = store.path(manifest.tensors[name].blob.digest)
    model = BlobModel(store, manifest)
    model.read(name)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadTensor, match="is not here with its 128 bytes; fetch it again"):
        model.read(name)
    path.unlink()
    with pytest.raises(BadTensor, match="fetch it again"):
        model.read(name)


def test_a_manifest_cannot_lay_out_other_files_or_ask_for_code(
    source: ModelFolder, manifest: Manifest, store: BlobStore
) -> None:
    blob = manifest.files["config.json"]
    for name in ("../config.json", "modeling_own.py", "/etc/passwd"):
        with pytest.raises(BadTensor, match="may not have the file"):
            BlobModel(store, Manifest({"config.json": blob, name: blob}, {}))
    with pytest.raises(BadModelFolder, match=r"no config.json"):
        BlobModel(store, Manifest({}, {}))
    own = json.dumps(json.loads((source.path / "config.json").read_text()) | {"auto_map": {"AutoConfig": "a.B"}})
    with store.writer(blob_of(own.encode()), 0) as writer:
        writer.write(own.encode())
    described = BlobModel(store, Manifest({"config.json": blob_of(own.encode())}, {})).config
    assert type(described).__module__.startswith("transformers.models.gpt2.")  # and not a.B
