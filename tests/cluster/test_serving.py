"""A model that is served over devices and actors: the whole model's answers, whoever dies meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from transformers import AutoTokenizer

from isthmus.coordinator.connection import Connection
from isthmus.coordinator.emulation.local_cluster import submit
from isthmus.protos.v1 import chain_pb2, chain_pb2_grpc
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.split.codecs import FAMILIES
from isthmus.split.inference.serving import AdapterConfig, ServingConfig, parse_stages
from isthmus.split.lora.folder import AdapterFolder
from isthmus.split.models.blobs import BlobStore
from isthmus.split.models.manifest import Manifest, build_manifest
from isthmus.split.tls import channel
from tests.cluster.house import LIMIT, House, ended, events_until, refusal, run_cli, wait_for
from tests.split.inference.whole import greedy, whole_model
from tests.split.tiny_adapters import make_adapter, with_adapter
from tests.split.tiny_models import make_model

pytestmark = pytest.mark.cluster

_TEXT = "The two sides of a narrow land bridge trade through it, and what crosses it is counted."
STREAMS = [_TEXT[start : start + length] for start, length in enumerate((2, 20, 5, 11, 1, 7, 16, 9))]
COUNT = 90


@dataclass
class Served:
    """A model at work."""

    house: House
    connection: Connection
    job: str
    url: str

    def complete(self, prompt: str, count: int = COUNT, model: str = "model") -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0}
        response = httpx2.post(f"{self.url}/completions", json=body, timeout=LIMIT)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def answers(self, texts: Sequence[str], models: Sequence[str] = ("model",)) -> list[str]:
        """All at the same time; of each model to all texts, one model after the other."""
        asked = [(text, COUNT, name) for name in models for text in texts]
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda one: self.complete(*one), asked))

    def stats(self) -> dict[str, Any]:
        result: dict[str, Any] = httpx2.get(f"{self.url}/stats", timeout=LIMIT).json()
        return result

    def while_answering(self, act: Callable[[], None], models: Sequence[str] = ("model",)) -> list[str]:
        """The answers to all STREAMS; `act` is called when some of their tokens have been computed."""
        before = self.stats()["hops"][0]["tokens"] + 30
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.answers, STREAMS, models)
            wait_for(lambda: self.stats()["hops"][0]["tokens"] > before or running.done(), "tokens")
            assert not running.done()
            act()
            return running.result()

    def logged(self, pattern: str, after: int = 0) -> Any:
        event = events_until(
            self.connection,
            self.job,
            lambda event: re.search(pattern, _sentence(event)) is not None,
            after,
        )
        return re.search(pattern, _sentence(event))


def _sentence(event: pb.Event) -> str:
    return event.log.message or event.took_over.message


@contextlib.contextmanager
def served(house: House, stages: str, **settings: Any) -> Iterator[Served]:
    config = ServingConfig.of(spans=parse_stages(stages), name="model", **settings)
    spec = pb.JobSpec(
        method="serve",
        model=str(house.model),
        devices=config.devices,
        serving=config.to_json(),
        wait_seconds=LIMIT,
    )
    with house.connect() as connection:
        job = submit(connection, spec).id
        started = events_until(connection, job, lambda event: event.HasField("serving"))
        yield Served(house, connection, job, started.serving.url)
        connection.stub.CancelJob(pb.JobRequest(id=job))
        assert ended(connection, job).state == pb.CANCELLED


@pytest.fixture(scope="module")
def wanted(shared_house: House) -> list[str]:
    return texts_of(shared_house.model, STREAMS, COUNT)


def texts_of(model: Path, asked: Sequence[str], count: int, adapter: Path | None = None) -> list[str]:
    whole = whole_model(model) if adapter is None else with_adapter(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = []
    for prompt in asked:
        ids = greedy(whole, tokenizer.encode(prompt), count)
        ids = ids[: ids.index(0)] if 0 in ids else ids  # 0 ends an answer
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def test_devices_and_actors_together_answer_like_the_whole_model(house: House, wanted: list[str]) -> None:
    with served(house, "d0:0-1,cloud:1-3,d1:3-4") as model:
        assert model.answers(STREAMS) == wanted
        stats = model.stats()
        assert [hop["span"] for hop in stats["hops"]] == ["0-1", "1-3", "3-4"]
        assert stats["recoveries"] == []
        assert all(hop["sent"] > 0 and hop["received"] > 0 and hop["computing"] > 0 for hop in stats["hops"])


@pytest.fixture(scope="module")
def adapters(shared_house: House, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(folder / "formal", shared_house.model, seed=1),
        make_adapter(folder / "brief", shared_house.model, seed=2, r=2, target_modules=["q_proj", "down_proj"]),
    ]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=[pytest.mark.processes, pytest.mark.exhaustive])],
    ids=["ended", "killed"],
)
def test_adapters_are_chosen_by_the_requests_model_and_survive_a_holders_end(
    house: House, tmp_path: Path, number: int
) -> None:
    made = make_model(tmp_path / "model", "llama", layers=4, hidden=64)  # wide enough for a graph
    adapters = [
        make_adapter(tmp_path / "formal", made, seed=1),
        make_adapter(tmp_path / "brief", made, seed=2, r=2, target_modules=["q_proj", "down_proj"]),
    ]
    wanted = [text for adapter in (None, *adapters) for text in texts_of(made, STREAMS, COUNT, adapter)]
    configs, names = tuple(AdapterConfig(one.name, str(one)) for one in adapters), ["model", "formal", "brief"]
    with served(replace(house, model=made), "d0+d1:0-2,cloud:2-4", adapters=configs, runtime="onnxruntime") as model:
        assert [one["id"] for one in httpx2.get(f"{model.url}/models", timeout=LIMIT).json()["data"]] == names
        victim = model.stats()["hops"][0]["holder"]
        assert model.while_answering(lambda: house.cluster.kill(victim, number), names) == wanted
        assert {one["lost"] for one in model.stats()["recoveries"]} == {victim}
        body = {"model": "other", "prompt": "x"}
        unknown = httpx2.post(f"{model.url}/completions", json=body, timeout=LIMIT)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_a_device_gets_only_its_own_part_of_an_adapter(house: House, adapters: list[Path]) -> None:
    folder = AdapterFolder(adapters[0])
    served_too = (AdapterConfig("formal", str(folder.path)),)
    with served(house, "d0:0-2,cloud:2-4", adapters=served_too, runtime="torch") as model:
        assert [model.complete(STREAMS[1], 20, "formal")] == texts_of(house.model, STREAMS[1:2], 20, folder.path)
        identity = house.identity("d0")
        with channel(identity.address, identity.credentials) as opened:
            stub = CoordinatorStub(opened)
            asked = pb.ManifestRequest(job=model.job, adapter="formal")
            manifest = Manifest.from_proto(stub.GetManifest(asked, timeout=LIMIT))
            assert set(manifest.tensors) == {
                name for name in folder.tensor_names() if re.search(r"layers\.[01]\.", name)
            }
            own = BlobStore(house.cluster.folder / "d0" / "blobs")
            assert own.missing(manifest) == ()
            beyond = build_manifest(folder).tensors.keys() - manifest.tensors.keys()
            digest = build_manifest(folder).tensors[min(beyond)].blob.digest
            error = refusal(lambda: list(stub.Fetch(pb.FetchRequest(job=model.job, digest=digest), timeout=LIMIT)))
            assert "is not of this device's part" in str(error)
            asked.adapter = "brief"
            assert "no adapter 'brief'" in str(refusal(lambda: stub.GetManifest(asked, timeout=LIMIT)))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["model={formal}"], "no adapter can be called 'model' here"),
        (["{formal}", "formal={brief}"], "no adapter can be called 'formal' here"),
        (["/nowhere/x"], "/nowhere/x has no adapter_config.json"),
        (["x={model}"], "has no adapter_config.json; give a folder that peft or `isthmus export` wrote"),
        (["{other}"], "adapter other changes 'model.layers.0.mlp.down_proj', which is not a linear module"),
    ],
)
def test_adapters_that_cannot_be_served_are_one_line(
    house: House, adapters: list[Path], tmp_path: Path, given: list[str], line: str
) -> None:
    model = Path(shutil.copytree(house.model, tmp_path / "model"))
    places = {one.name: str(one) for one in adapters} | {"model": str(model), "other": str(tmp_path / "other")}
    if "{other}" in given:
        model = make_model(tmp_path / "gpt2", "gpt2")
        make_adapter(tmp_path / "other", house.model)
    words = [word for one in given for word in ("--adapter", one.format(**places))]
    status, _, error = house.cli("serve", "--model", str(model), *words)
    assert status == 1
    assert line in error
    assert error.count("\n") == 1


def test_a_lossy_codec_makes_fewer_bytes(house: House) -> None:
    sizes = {}
    for codec in ("none", "float16"):
        with served(house, "d0:0-2,cloud:2-4", codec=codec) as model:
            model.complete(STREAMS[1], 20)
            sizes[codec] = model.stats()["hops"][0]["sent"]
    assert sizes["float16"] < 0.7 * sizes["none"]


@pytest.mark.processes
def test_killed_devices_and_actors_change_no_answer(house: House, wanted: list[str]) -> None:
    chance = random.Random(7)
    with served(house, "d0+d1:0-2,cloud:2-4") as model:
        assert model.while_answering(lambda: house.cluster.kill("d0")) == wanted
        assert {one["holder"] for one in model.stats()["recoveries"]} == {"d1"}
        pid = int(model.logged(r"blocks 2-4: actor 0, process (\d+)")[1])
        assert model.while_answering(lambda: os.kill(pid, signal.SIGKILL)) == wanted
        recoveries = model.stats()["recoveries"]
        assert any(one["span"] == "2-4" and one["tokens"] > 0 for one in recoveries)
        house.start("d0")  # comes back by itself, and stands by
        wait_for(lambda: [hop["holder"] for hop in model.stats()["hops"]][:2] == ["d1", "d0"], "d0 stands by")
        victim = chance.choice(["d1"])
        assert model.while_answering(lambda: house.cluster.kill(victim)) == wanted
    house.start("d1")


@pytest.mark.processes
def test_drafts_change_no_answer_whoever_dies(house: House, wanted: list[str]) -> None:
    for draft in ("lookup", str(house.model)):
        with served(house, "d0+d1:0-2,cloud:2-4", draft=draft) as model:
            assert model.while_answering(lambda: house.cluster.kill("d0")) == wanted
            answers = model.stats()["answers"]
            assert 0 < answers["accepted"] <= answers["drafted"]
            assert answers["rounds"] == answers["tokens"] - answers["accepted"] - len(STREAMS)
            assert model.stats()["recoveries"]
        house.start("d0")


def test_early_exits_spare_the_second_span(house: House) -> None:
    with served(house, "d0:0-2,cloud:2-4", exit_threshold="0") as model:
        assert all(model.answers(STREAMS))
        answers = model.stats()["answers"]
        near, far = model.stats()["hops"]
        assert answers["exited"] == answers["tokens"] - len(STREAMS) - answers["rounds"] > 0
        assert near["batches"] > far["batches"]


def test_a_device_that_is_closed_hands_over(house: House, wanted: list[str]) -> None:
    with served(house, "d0+d1:0-2,cloud:2-4") as model:
        process = house.cluster.processes["d0"]
        assert model.while_answering(lambda: process.send_signal(signal.SIGTERM)) == wanted
        process.wait(LIMIT)
        (lost,) = {one["lost"] for one in model.stats()["recoveries"]}
        assert lost == "d0"


def test_a_revoked_device_holds_nothing_any_more(house: House, wanted: list[str]) -> None:
    with served(house, "d0+d1:0-2,cloud:2-4") as model:
        assert model.while_answering(lambda: house.cli("revoke", "d0")[0]) == wanted
        wait_for(lambda: [hop["holder"] for hop in model.stats()["hops"]][:1] == ["d1"], "d0 is gone")
    house.cluster.processes["d0"].wait(LIMIT)
    house.cluster.start_device("d0", {"notes": house.texts["d0"]}, arguments=["--threads", "1"])
    house.cluster.wait_connected(["d0"])


def test_strangers_and_wrong_holders_are_refused_and_nobody_else_notices(house: House, wanted: list[str]) -> None:
    with served(house, "d0:0-2,cloud:2-4") as model:
        address = _gateway_of(model)
        good = chain_pb2.Hello(
            job=model.job, first=0, last=2, digest="0" * 64, sequences=8, tokens=128, codecs=sorted(FAMILIES)
        )

        def hello(**changes: Any) -> chain_pb2.Hello:
            changed = chain_pb2.Hello()
            changed.CopyFrom(good)
            for name, value in changes.items():
                setattr(changed, name, value)
            return changed

        tries = [
            ("d1", hello(), "d1 holds no blocks 0-2"),
            ("d0", hello(), "are not the coordinator's"),
            ("d0", hello(first=1), "d0 holds no blocks 1-2"),
            ("d0", hello(job="other"), "d0 holds no blocks"),
        ]

        def act() -> None:
            for device, message, line in tries:
                with channel(address, house.identity(device).credentials) as opened:
                    call = chain_pb2_grpc.ChainStub(opened).Hold(iter([chain_pb2.FromHolder(hello=message)]))
                    error = refusal(lambda call=call: list(call))
                    assert isinstance(error, grpc.Call)
                    assert line in (error.details() or "") or "has no part" in (error.details() or "")
            with channel(address, house.user) as opened:
                call = chain_pb2_grpc.ChainStub(opened).Hold(iter([]))
                assert "has no part in job" in str(refusal(lambda: list(call)))

        assert model.while_answering(act) == wanted


def check_figures(report: dict[str, Any]) -> None:
    """Of a model with blocks 0-2 at d0 and 2-4 at an actor of the coordinator, which has answered."""
    assert [(row["span"], row["device"]) for row in report["holders"]] == [("0-2", "d0"), ("2-4", "")]
    for row in report["holders"]:
        assert row["tokens"] >= 2 * COUNT
        assert row["flops"] > 0
        assert min(row["bytes_sent"], row["bytes_received"]) > 4 * row["tokens"]
        assert row["peak_bytes"] > 2**24
        assert row["energy_joules"] > 0
        assert row["money"] > 0
    assert report["gateway"]["peak_bytes"] > 2**24
    assert report["gateway"]["bytes_sent"] == sum(row["bytes_received"] for row in report["holders"])
    assert report["guests"] == []


def test_the_command_serves_until_it_is_interrupted(house: House, wanted: list[str], adapters: list[Path]) -> None:
    command = [sys.executable, "-m", "isthmus.coordinator.cli.main", "serve", "--model", str(house.model), "--json"]
    command += [
        "--stages",
        "d0:0-2,cloud:2-4",
        "--adapter",
        f"polite={adapters[1]}",
        "--credentials",
        str(house.cluster.credentials),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        events = (json.loads(line) for line in process.stdout)
        started = next(event["data"] for event in events if event["kind"] == "started")
        url, key = started["url"], started["api_key"]
        asked = ("generate", "--url", url, "--prompt", STREAMS[1], "--max-tokens", str(COUNT), "--temperature", "0")
        assert run_cli(*asked, "--api-key", key)[1] == wanted[1] + "\n"
        polite = texts_of(house.model, STREAMS[1:2], COUNT, adapters[1])[0]
        assert run_cli(*asked, "--api-key", key, "--model", "polite")[1] == polite + "\n"
        status, _, error = run_cli(*asked, "--api-key", "another")
        assert (status, "API key is missing or wrong" in error) == (1, True)
        options = ("--credentials", str(house.cluster.credentials), "--json")
        job = json.loads(run_cli("jobs", *options)[1])[-1]["id"]
        check_figures(json.loads(run_cli("report", job, *options)[1]))
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 130
    check_figures(json.loads(run_cli("report", job, *options)[1]))
    assert "cannot be reached" in run_cli(*asked, "--api-key", key)[2]


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ("d0:0-2", "nobody holds blocks 2-4"),
        ("d0:0-3,cloud:2-4", "blocks 2-3 of cloud:2-4 are held already"),
        ("cloud:1-4", "nobody holds blocks 0-1"),
        ("cloud:0-5", "there are no blocks cloud:0-5 in this model, which has 0-4"),
        ("d0:0-2,d0:2-4", "a device is named twice"),
        ("d0 0-4", "write HOLDER:FIRST-LAST"),
        ("nobody:0-4", "nobody"),
    ],
)
def test_stages_that_cannot_be_are_one_line(house: House, stages: str, line: str) -> None:
    status, _, error = house.cli("serve", "--model", str(house.model), "--stages", stages)
    assert status == 1
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--draft", "early"), "the gateway holds no blocks"),
        (("--draft", "nowhere/model"), "nowhere/model"),
        (("--exit-threshold", "0.5"), "two spans at least"),
        (("--exit-threshold", "1.5"), "choose 0 to 1"),
    ],
)
def test_drafts_and_exits_that_cannot_be_are_one_line(house: House, options: tuple[str, ...], line: str) -> None:
    status, _, error = house.cli("serve", "--model", str(house.model), *options)
    assert status == 1
    assert line in error
    assert error.count("\n") == 1


def _gateway_of(model: Served) -> str:
    """Found as a device finds it: its address is in the task."""
    log = model.house.cluster.log("d0").read_text()
    port = re.findall(r"for the gateway at port (\d+)", log)[-1]
    return f"127.0.0.1:{port}"
