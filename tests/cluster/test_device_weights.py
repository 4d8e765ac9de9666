"""A device gets its own part of the model: from the coordinator, once, in as many goes as it takes, or from a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.torch import load_file, save_file

from isthmus.client.weights import device_source
from isthmus.coordinator.emulation.local_cluster import submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.split.errors import BadModelFolder, LinkLost
from isthmus.split.models.blobs import BlobStore
from isthmus.split.models.manifest import Manifest, build_manifest
from isthmus.split.models.source import ModelFolder
from isthmus.split.tls import channel
from tests.cluster.house import LIMIT, TINY, House, events_of, refusal, step_reached, succeeded
from tests.split.tiny_models import make_model

pytestmark = pytest.mark.cluster

ENDLESS = TINY.but(steps=100_000, checkpoint_every=100_000)


class CutStub:
    """The coordinator's real service, over a link that breaks after so many chunks of weights."""

    def __init__(self, stub: CoordinatorStub, chunks: int, error: BaseException) -> None:
        self._stub, self._left, self._error = stub, chunks, error
        self.requests: list[pb.FetchRequest] = []
        self.GetManifest = stub.GetManifest

    def Fetch(self, request: pb.FetchRequest) -> Iterator[pb.Chunk]:
        self.requests.append(request)
        for chunk in self._stub.Fetch(request):
            if self._left == 0:
                self._left = -1
                raise self._error
            self._left -= 1
            yield chunk


class PulledPlug(BaseException):
    """The end of the process, as far as the code that is running can tell."""


def test_a_device_fetches_its_own_part_once_and_goes_on_where_it_stopped(house: House, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", layers=3, hidden=512, seed=5)  # tensors of more than one chunk
    own = BlobStore(house.cluster.folder / "d0" / "blobs")
    before = {path.name for path in own.directory.iterdir()}
    whole = build_manifest(ModelFolder(model))
    with house.connect() as connection:
        job = house.submit(connection, ENDLESS, ["d0"], model=model)
        step_reached(connection, job, 1)

        identity = house.identity("d0")
        with channel(identity.address, identity.credentials) as opened:
            stub = CoordinatorStub(opened)
            manifest = Manifest.from_proto(stub.GetManifest(pb.ManifestRequest(job=job), timeout=LIMIT))
            part = {blob.digest for blob in manifest.blobs()}
            assert {path.name for path in own.directory.iterdir()} == before | part
            beyond = {entry.blob.digest for entry in whole.tensors.values()} - part
            assert len(beyond) > len(whole.tensors) / 2

            error = refusal(lambda: list(stub.Fetch(pb.FetchRequest(job=job, digest=min(beyond)), timeout=LIMIT)))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "is not of this device's part" in error.details()

            fetched_again_after_cuts(stub, job, tmp_path / "cut", manifest)
        other = house.identity("d1")
        with channel(other.address, other.credentials) as opened:
            for call in (
                lambda: CoordinatorStub(opened).GetManifest(pb.ManifestRequest(job=job), timeout=LIMIT),
                lambda: list(CoordinatorStub(opened).Fetch(pb.FetchRequest(job=job, digest=min(part)), timeout=LIMIT)),
            ):
                error = refusal(call)
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                assert f"device d1 has no part in job {job}" in error.details()
        assert connection.stub.CancelJob(pb.JobRequest(id=job)).state == pb.CANCELLED

        last = events_of(connection, job)[-1].number
        submit(connection, pb.JobSpec(), resume=job)
        step_reached(connection, job, 1, after=last)
        connection.stub.CancelJob(pb.JobRequest(id=job))
        said = [event.task.message for event in events_of(connection, job, "task")]
    runs = [index for index, line in enumerate(said) if line == "weights"]
    assert len(runs) == 2
    assert not any("%" in line for line in said[runs[1] :])  # the second run fetched nothing


def fetched_again_after_cuts(stub: CoordinatorStub, job: str, state: Path, manifest: Manifest) -> None:
    """A process that ends in the middle of a blob, a link that breaks there, a damaged file: no byte comes twice."""

    def source(cut: CutStub) -> Any:
        return device_source(cut, "coordinator", job, state, None, lambda here, total: None)  # type: ignore[arg-type]

    big = next(blob for blob in manifest.blobs() if blob.size > 2**20)
    small = sum(1 for blob in manifest.blobs()[: manifest.blobs().index(big)])
    killed = CutStub(stub, small + 1, PulledPlug())
    with pytest.raises(PulledPlug):
        source(killed)
    store = BlobStore(state / "blobs")
    assert store.received(big.digest) == 2**20
    assert not store.has(big.digest)

    again = CutStub(stub, 4, LinkLost("the link broke"))  # in the middle of the next blob but one
    source(again)
    assert (again.requests[0].digest, again.requests[0].offset) == (big.digest, 2**20)
    assert [request.offset for request in again.requests if request.offset] == [2**20, 2**20]
    assert not store.missing(manifest)
    starts = [request.digest for request in again.requests if request.offset == 0]
    assert len(starts) == len(set(starts)) == len(manifest.blobs()) - small - 1  # nothing from the start twice

    nothing = CutStub(stub, 0, PulledPlug())
    source(nothing)
    assert nothing.requests == []

    store.path(big.digest).unlink()
    (store.directory / f"{big.digest}.part").write_bytes(b"\0" * 1000)  # as a power cut may leave it
    damaged = CutStub(stub, -1, PulledPlug())
    source(damaged)
    assert [request.offset for request in damaged.requests] == [1000, 0]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_an_own_copy_that_would_train_on_other_tokens_is_refused(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "model", "llama", layers=2)
    own = Path(shutil.copytree(model, tmp_path / "own"))
    (own / name).write_text((own / name).read_text() + "\n")
    manifest = build_manifest(ModelFolder(model)).to_proto()

    class Stub:
        def GetManifest(self, request: pb.ManifestRequest, timeout: float) -> pb.Manifest:
            return manifest

    with pytest.raises(BadModelFolder, match=f"{own}/{name} differs from the coordinator's"):
        device_source(Stub(), "", "job", tmp_path / "state", own, lambda here, total: None)  # type: ignore[arg-type]


def test_an_owners_own_copy_is_used_if_it_is_the_same_and_refused_if_not(house: House, tmp_path: Path) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(house.model, same)
    shutil.copytree(house.model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 7] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for name, folder in (("m0", same), ("m1", other)):
        copies = ["--threads", "1", "--model", f"{house.model}={folder}"]
        house.cluster.start_device(name, {"notes": house.texts["d0"]}, arguments=copies)
    house.cluster.wait_connected(["m0", "m1"])
    with house.connect() as connection:
        succeeded(connection, house.submit(connection, TINY.but(steps=2), ["m0"]))
    assert not (house.cluster.folder / "m0" / "blobs").exists()

    status, out, err = house.cli(
        *("finetune", "--model", str(house.model), "--dataset", "notes", "--devices", "m0,m1", "--json"),
        *("--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--precision", "float32"),
    )
    assert status == 1
    assert err.count("\n") == 1
    assert f"device m1: the model files in {other} differ from the coordinator's" in err
    assert "leave --model away" in err
    assert [json.loads(line)["kind"] for line in out.splitlines()][-1] == "state"
    for name in ("m0", "m1"):
        house.cluster.kill(name, 15)
