"""`isthmus` as a user types it: what it prints, as text and as JSON, and one line for each thing that can go wrong."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from isthmus.protos.v1 import coordinator_pb2 as pb
from tests.cluster.house import LIMIT, TINY, House, run_cli
from tests.split.tiny_models import change_config, make_model

pytestmark = pytest.mark.cluster

SMALL = ["--batch-size", "2", "--sequence-length", "16", "--precision", "float32"]


@dataclass(frozen=True)
class Finished:
    """A job that was run by `isthmus finetune`."""

    id: str
    adapter: Path
    lines: list[dict[str, Any]]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def finished(shared_house: House, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    shared_house.start("d0", "d1", "d2")
    adapter = tmp_path_factory.mktemp("out") / "adapter"
    words = ["finetune", "--model", str(shared_house.model), "--dataset", "notes", "--devices", "2", "--steps", "3"]
    status, out, err = shared_house.cli(*words, *SMALL, "--out", str(adapter), "--json")
    assert (status, err) == (0, "")
    *lines, report = [json.loads(line) for line in out.splitlines()]
    return Finished(report["job"], adapter, lines, report)


@pytest.fixture
def interrupted(shared_house: House) -> str:
    """A job that its user has stopped with Ctrl-C."""
    shared_house.start("d0", "d1", "d2")
    command = [
        sys.executable,
        "-m",
        "isthmus.coordinator.cli.main",
        "finetune",
        "--model",
        str(shared_house.model),
        "--json",
    ]
    command += ["--dataset", "notes", "--devices", "d1", "--steps", "100000", *SMALL]
    command += ["--credentials", str(shared_house.cluster.credentials)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored here
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["kind"] == "step":
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    with shared_house.connect() as connection:
        job = connection.stub.ListJobs(pb.ListJobsRequest()).jobs[-1]
    assert (job.state, job.message) == (pb.CANCELLED, "cancelled by a user")
    assert f"job {job.id} is cancelled" in out + err
    return job.id


def one_line(result: tuple[int, str, str]) -> str:
    """The line of a command that failed as it should: on standard error, with nothing else."""
    status, out, err = result
    assert status == 1, out + err
    assert err.startswith("isthmus: ")
    assert err.count("\n") == 1, err
    return err


def finetune(house: House, *words: str, model: Path | None = None, devices: str = "d0", dataset: str = "notes") -> str:
    """The line with which `isthmus finetune` fails."""
    given = ["finetune", "--model", str(model or house.model), "--dataset", dataset, "--devices", devices, *SMALL]
    return one_line(house.cli(*given, *words, "--json"))


def test_finetune_prints_events_and_the_report_as_json_and_writes_the_adapter(house: House, finished: Finished) -> None:
    kinds = [line["kind"] for line in finished.lines]
    assert kinds.count("step") == 3
    assert {"state", "device", "joined", "evaluation", "checkpoint", "left"} <= set(kinds)
    states = [
        line["data"] for line in finished.lines if line["kind"] == "state"
    ]  # a device may say later that it is done
    assert states[-1] == {"state": "succeeded", "message": ""}
    assert finished.report["adapter"] == str(finished.adapter)
    assert {path.name for path in finished.adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_finished_job_is_listed_watched_and_exported(house: House, finished: Finished, tmp_path: Path) -> None:
    status, out, _ = house.cli("jobs", "--json")
    row = next(row for row in json.loads(out) if row["id"] == finished.id)
    assert (status, row["state"], row["step"], row["steps"]) == (0, "SUCCEEDED", "3", "3")
    assert row["spec"]["training"]["batch_size"] == 2
    status, out, _ = house.cli("watch", finished.id, "--json")
    assert json.loads(out.splitlines()[-1])["losses"] == finished.report["losses"]
    status, out, _ = house.cli("watch", finished.id)
    assert status == 0
    assert "held-out perplexity" in out
    status, out, _ = house.cli("export", finished.id, "--out", str(tmp_path / "again"))
    assert status == 0
    names = sorted(path.name for path in finished.adapter.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (finished.adapter / name).read_bytes()


def test_what_cannot_be_done_with_a_finished_job_is_said(house: House, finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    said = one_line(house.cli("export", finished.id, "--out", str(tmp_path / "full")))
    assert "is there already and not an empty folder; choose another --out" in said
    said = one_line(house.cli("cancel", finished.id))
    assert f"job {finished.id} is not at work: it is succeeded" in said
    said = one_line(house.cli("finetune", "--resume", finished.id))
    assert f"job {finished.id} is done; `isthmus export {finished.id} --out DIR` writes its adapter" in said


def test_ctrl_c_cancels_the_job_that_finetune_started(house: House, interrupted: str, tmp_path: Path) -> None:
    assert "is not at work: it is cancelled" in one_line(house.cli("cancel", interrupted))
    said = one_line(house.cli("export", interrupted, "--out", str(tmp_path / "out")))
    assert f"job {interrupted} has no adapter yet: it is cancelled" in said
    assert not (tmp_path / "out").exists()
    assert f"job {interrupted} was cancelled" in one_line(house.cli("watch", interrupted))


def test_devices_are_enrolled_listed_and_revoked(house: House) -> None:
    status, out, _ = house.cli("enroll", "new-one", "--json")
    enrolled = json.loads(out)
    assert (status, enrolled["name"], enrolled["coordinator"]) == (0, "new-one", house.address)
    assert enrolled["token"] in enrolled["command"]
    status, out, _ = house.cli("enroll", "new-one")
    assert f"isthmus-client run --coordinator {house.address} --token ist1." in out
    status, out, _ = house.cli("devices", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["d0"]["connected"] is True
    assert [offer["name"] for offer in rows["d0"]["profile"]["datasets"]] == ["notes"]
    status, out, _ = house.cli("devices")
    assert "connected" in out
    assert "no device 'nobody': `isthmus devices` lists them" in one_line(house.cli("revoke", "nobody"))
    assert "'No Name' is not a name" in one_line(house.cli("enroll", "No Name"))


def test_a_job_that_cannot_be_is_refused_at_once(house: House, tmp_path: Path) -> None:
    said = finetune(house, "--cut-layer", "4")
    assert "cut_layer 4" in said
    assert "choose" in said
    assert "sequence_length 500 is more than" in finetune(house, "--sequence-length", "500")
    assert "no device 'nobody'" in finetune(house, devices="d0,nobody")
    said = finetune(house, dataset="diary")
    assert "device d0 does not offer the dataset 'diary' (it offers notes)" in said
    assert "--data diary=FILE" in said
    assert "a device is named twice" in finetune(house, devices="d0,d0")

    bare = make_model(tmp_path / "bare", "llama", layers=2)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in finetune(house, model=bare)
    empty = make_model(tmp_path / "empty", "llama", layers=2)
    for path in empty.glob("*.safetensors"):
        path.unlink()
    assert "safetensors" in finetune(house, model=empty)
    strange = make_model(tmp_path / "strange", "llama", layers=2)
    change_config(strange, model_type="rwkv", architectures=["RwkvForCausalLM"])
    assert "rwkv" in finetune(house, model=strange).lower()
    assert "nowhere" in finetune(house, model=tmp_path / "nowhere")


def test_too_few_devices_are_waited_for_by_name_or_number_and_not_for_ever(house: House) -> None:
    status, out, err = house.cli(
        *("finetune", "--model", str(house.model), "--dataset", "notes", "--devices", "5", "--wait", "1", "--json")
    )
    assert status == 1
    assert err.count("\n") == 1
    assert "gave up after 1 s of waiting for 2 more free devices that offer 'notes'" in err
    said = [json.loads(line)["data"].get("message") for line in out.splitlines()]
    assert "waiting for 2 more free devices that offer 'notes'" in said


def test_text_that_cannot_be_used_fails_the_job_with_the_devices_line(house: House, tmp_path: Path) -> None:
    lines = {
        "columns.jsonl": "columns.jsonl has no column 'text' in line 1, it has body",
        "empty.txt": "empty.txt is empty: give a file with text in it",
        "short.txt": "tokens of text do not fill a sequence: give more text or less than 16 a sequence",
    }
    for name, text in zip(lines, ['{"body": "some text"}\n', "", "One line.\n"], strict=True):
        (tmp_path / name).write_text(text)
    offers = {name: tmp_path / name for name in lines}
    house.cluster.start_device("careless", offers, arguments=["--threads", "1"])
    house.cluster.wait_connected(["careless"])
    for name, line in lines.items():
        said = finetune(house, "--validation-fraction", "0", devices="careless", dataset=name)
        assert "failed: device careless: " in said
        assert line in said
    house.cluster.kill("careless", signal.SIGTERM)


def test_a_coordinator_that_is_not_there_is_one_line(house: House, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody answers there, and nobody else gets it
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        said = one_line(house.cli("jobs", "--coordinator", f"127.0.0.1:{port}"))
    assert f"the coordinator at 127.0.0.1:{port} cannot be reached" in said
    said = one_line(run_cli("devices", "--credentials", str(tmp_path / "none")))
    assert "start the coordinator with `isthmus up`" in said


def test_options_that_would_be_ignored_are_refused(house: House, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "--detach returns before there is an adapter" in finetune(house, "--detach", *out)
    text = str(house.texts["d0"])
    said = one_line(house.cli("finetune", "--method", "centralised", "--data", text, "--resume", "job", *out))
    assert "--method centralised trains here" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["centralised", "splitlora"])
def test_a_folder_that_holds_something_is_refused_before_training_and_left_alone(
    house: House, tmp_path: Path, method: str
) -> None:
    (tmp_path / "kept").touch()
    given = ["--data", str(house.texts["d0"])] if method == "centralised" else ["--dataset", "notes"]
    said = one_line(house.cli("finetune", "--method", method, *given, "--out", str(tmp_path)))
    assert f"{tmp_path} is there already and not an empty folder; choose another --out" in said
    (tmp_path / "file").touch()
    said = one_line(house.cli("finetune", "--method", method, *given, "--out", str(tmp_path / "file" / "out")))
    assert f"{tmp_path / 'file'} is not a folder that you may write to" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept"]


def test_centralised_training_writes_an_adapter_and_its_figures(house: House, tmp_path: Path) -> None:
    words = ["finetune", "--method", "centralised", "--model", str(house.model), "--data", str(house.texts["d0"])]
    status, out, err = house.cli(*words, *SMALL, "--steps", "3", "--out", str(tmp_path / "unsplit"), "--json")
    assert status == 0, err
    report = json.loads(out)
    assert len(report["losses"]) == 3
    assert (tmp_path / "unsplit" / "adapter_model.safetensors").is_file()


def test_brackets_in_what_devices_and_users_name_are_text(house: House) -> None:
    with house.connect() as connection:
        spec = pb.JobSpec(
            method="splitlora", model=str(house.model), dataset="[/x]", device_count=1, wait_seconds=LIMIT
        )
        spec.training = TINY.to_json()
        job = connection.stub.SubmitJob(pb.SubmitJobRequest(spec=spec)).id
        connection.stub.CancelJob(pb.JobRequest(id=job))
    status, out, err = house.cli("jobs")
    assert (status, err) == (0, "")
    assert "[/x]" in out
    assert f"job {job} was cancelled" in one_line(house.cli("watch", job))


def test_an_unknown_job_is_one_line(house: House) -> None:
    for words in (
        ["watch", "nojob"],
        ["cancel", "nojob"],
        ["export", "nojob", "--out", "x"],
        ["finetune", "--resume", "nojob"],
    ):
        assert "'nojob'" in one_line(house.cli(*words))


def test_a_ray_cluster_that_cannot_be_joined_is_one_line_soon(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "isthmus.coordinator.cli.main", "up", "--state-dir", str(tmp_path / "state")]
        done = subprocess.run(
            [*command, "--ray-address", address], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"isthmus: the Ray cluster at {address} cannot be joined: Connection refused")
    assert done.stderr.count("\n") == 1, done.stderr
