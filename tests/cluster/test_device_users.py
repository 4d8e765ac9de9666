"""`isthmus-client generate` with real processes: the text stays on the device, and the answer is the whole model's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from isthmus.client.cli import main as client_main
from isthmus.client.weights import device_source
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.split.errors import NotAllowed
from isthmus.split.tls import channel, error_of
from tests.cluster.house import LIMIT, House, refusal, run_cli, wait_for
from tests.cluster.test_serving import COUNT, STREAMS, Served, served, texts_of

pytestmark = pytest.mark.cluster

PROMPT = STREAMS[1]


@dataclass
class Ended:
    status: int
    out: str
    error: str

    @property
    def told(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.out)
        return result

    @property
    def line(self) -> str:
        """What a command that failed said: one line."""
        assert self.status == 1, self
        assert self.error.count("\n") == 1, self.error
        return self.error


@pytest.fixture(scope="module")
def wanted(shared_house: House) -> list[str]:
    return texts_of(shared_house.model, STREAMS, COUNT)


def command(house: House, device: str, *arguments: str, prompt: str = PROMPT) -> list[str]:
    words = ["generate", "--state-dir", str(house.cluster.folder / device), "--prompt", prompt]
    return [*words, "--max-tokens", str(COUNT), "--temperature", "0", "--threads", "1", *arguments]


def generate(house: House, device: str, *arguments: str, prompt: str = PROMPT, text: str = "") -> Ended:
    """`isthmus-client generate` in this process (an interpreter with torch takes seconds to start)."""
    return Ended(*run_cli(*command(house, device, *arguments, prompt=prompt), main=client_main, text=text))


@contextlib.contextmanager
def generating(house: House, device: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """In a process of its own, and under way."""
    words = [sys.executable, "-m", "isthmus.client.cli", *command(house, device, *arguments)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def guests_of(model: Served) -> dict[str, int]:
    result: dict[str, int] = model.stats()["guests"]
    return result


def test_devices_answer_for_themselves_like_the_whole_model(house: House, wanted: list[str]) -> None:
    with served(house, "d0:0-2,cloud:2-4", users=("d1",)) as model:
        mine = generate(house, "d0", "--json").told  # its daemon holds the first span meanwhile
        assert mine["text"] == wanted[1]
        assert [(hop["span"], hop["holder"]) for hop in mine["stats"]["hops"]] == [("0-2", "here"), ("2-4", "gateway")]
        for blocks, spans in ((0, ["0-4"]), (2, ["0-2", "2-4"])):
            other = generate(house, "d1", "--blocks", str(blocks), "--json").told
            assert other["text"] == wanted[1]
            assert [hop["span"] for hop in other["stats"]["hops"]] == spans
        seeded = ("--temperature", "0.8", "--top-p", "0.9", "--seed", "7")
        assert len({generate(house, "d1", "--blocks", blocks, *seeded).out for blocks in "02"}) == 1
        house.cluster.kill("d1", signal.SIGTERM)  # the command needs no daemon
        told = generate(house, "d1", "--prompt", "-", "--stats", text=PROMPT)
        assert told.out.startswith(wanted[1] + "\n")
        assert "tokens a second" in " ".join(told.out.split())
        assert guests_of(model) == {"streams": 0, "free": 4}
        assert model.answers(STREAMS) == wanted


def test_a_copy_of_the_model_is_used_if_it_is_the_coordinators(house: House, wanted: list[str], tmp_path: Path) -> None:
    with served(house, "cloud:0-2,cloud:2-4", users=("d1",)) as model:
        identity = house.identity("d1")
        with channel(identity.address, identity.credentials) as control:
            stub = CoordinatorStub(control)
            source, _, _ = device_source(
                stub, identity.address, model.job, tmp_path / "state", None, lambda here, total: None, user_blocks=2
            )
            names = source.tensor_names()
            assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
            refused = refusal(lambda: stub.GetManifest(pb.ManifestRequest(job=model.job, user=True, blocks=1)))
            assert "may have 0, 2 of its blocks, not 1" in str(error_of(refused, ""))
            refused = refusal(lambda: stub.GetManifest(pb.ManifestRequest(job=model.job), timeout=LIMIT))
            assert isinstance(error_of(refused, ""), NotAllowed)
        assert generate(house, "d1", "--model", f"model={house.model}", "--blocks", "2").out == wanted[1] + "\n"
        other = tmp_path / "other"
        shutil.copytree(house.model, other)
        tensors = load_file(other / "model.safetensors")
        save_file({name: value + 1 for name, value in tensors.items()}, other / "model.safetensors")
        assert "differ from the coordinator's" in generate(house, "d1", "--model", f"={other}").line


@pytest.mark.processes
def test_a_holder_that_is_killed_in_the_middle_changes_no_answer(house: House, wanted: list[str]) -> None:
    with served(house, "cloud:0-1,d0+d1:1-4", users=("d2",)) as model:
        with generating(house, "d2", "--stats") as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            house.cluster.kill("d0")
            assert (first + process.stdout.read()).startswith(wanted[1] + "\n")
            assert process.wait(LIMIT) == 0
        assert {(one["lost"], one["holder"]) for one in model.stats()["recoveries"]} <= {("d0", "d1")}


@pytest.mark.processes
def test_a_user_that_is_killed_frees_its_sequences_and_ctrl_c_ends_the_command(house: House) -> None:
    with served(house, "d0:0-4", users=("d1", "d2"), guests=1, context=128) as model:
        holder = house.cluster.processes["d0"]
        for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
            with generating(house, "d1", "--max-tokens", "100", "--draft", "none") as process:
                assert process.stdout is not None
                process.stdout.read(1)
                holder.send_signal(signal.SIGSTOP)  # the answer cannot end
                assert guests_of(model) == {"streams": 1, "free": 0}
                assert "too few sequences for devices are free (0; 1 asked for)" in generate(house, "d2").line
                process.send_signal(number)
                assert process.wait(LIMIT) == status
            holder.send_signal(signal.SIGCONT)
            wait_for(lambda: guests_of(model) == {"streams": 0, "free": 1}, "the sequence is free")


def test_who_may_not_use_a_model_is_told_so_in_one_line(house: House, tmp_path: Path) -> None:
    assert "no model is served that device d1 may use" in generate(house, "d1").line
    assert "there is no device in" in generate(house, str(tmp_path)).line
    with served(house, "d0:0-2,cloud:2-4", users=("d1",)):
        assert (
            "device d2 may not use model: `isthmus serve --users d2`" in generate(house, "d2", "--model", "model").line
        )
        assert "no model 'other' is served that device d1 may use; there is: model" in (
            generate(house, "d1", "--model", "other").line
        )
        assert "--blocks 1: no span of model begins there; choose 0, 2" in generate(house, "d1", "--blocks", "1").line
        assert "are more than the context of 128" in generate(house, "d1", prompt="long " * 300).line
        assert "runtime 'jax' is not one of" in generate(house, "d1", "--runtime", "jax").line
        assert "cannot be reached" in generate(house, "d1", "--coordinator", "127.0.0.1:1").line
    with served(house, "d0:0-2,cloud:2-4", guests=0):
        assert "may not use" in generate(house, "d0", "--model", "model").line


def test_a_user_that_is_revoked_gets_nothing_any_more(house: House, wanted: list[str]) -> None:
    with served(house, "cloud:0-4", users=("d1", "d2")) as model:
        with generating(house, "d1", "--max-tokens", "100", "--temperature", "1", "--seed", "3") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(1)
            process.send_signal(signal.SIGSTOP)
            assert house.cli("revoke", "d1")[0] == 0
            wait_for(lambda: guests_of(model)["streams"] == 0, "its stream has ended")
            process.send_signal(signal.SIGCONT)
            assert process.wait(LIMIT) == 1
            assert "revoked" in process.stderr.read()
        assert "revoked" in generate(house, "d1").line
        assert generate(house, "d2").out == wanted[1] + "\n"
    house.cluster.processes["d1"].wait(LIMIT)
    house.cluster.start_device("d1", {"notes": house.texts["d1"]}, arguments=["--threads", "1"])
    house.cluster.wait_connected(["d1"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--users", "nobody"), "nobody"),
        (("--users", "D 1"), "'D 1' is not a name"),
        (("--users", "d1", "--guests", "0"), "guests is 0; choose 1 to 1024"),
    ],
)
def test_users_that_cannot_be_are_one_line(house: House, arguments: tuple[str, ...], line: str) -> None:
    status, _, error = house.cli("serve", "--model", str(house.model), *arguments)
    assert (status, error.count("\n")) == (1, 1)
    assert line in error
