"""DLoRA over real sockets and processes: what a job in one process trains, deaths included; a report that is true."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from isthmus.coordinator.emulation.local_cluster import submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.data.sequences import sequences_of_file
from isthmus.split.job.config import TrainingConfig
from isthmus.split.methods.local import LocalRun, train_locally
from isthmus.split.models.source import ModelFolder
from tests.cluster.house import TINY, House, ended, events_of, events_until, refusal, step_reached, succeeded

pytestmark = pytest.mark.cluster

DLORA = TINY.but(method="dlora", cut_layer=1, micro_batches=2, aggregate_every=10, target_modules=("q_proj", "v_proj"))
ALLOWED = ["--allow", "splitlora,dlora,labels-leave,serve,modules-leave"]


def local_run(house: House, config: TrainingConfig, devices: list[str]) -> LocalRun:
    tokenizer = ModelFolder(house.model).tokenizer()
    texts = [sequences_of_file(house.texts[name], config.text, tokenizer) for name in devices]
    return train_locally(ModelFolder(house.model), config, texts)


def own_adapter(house: House, device: str, job: str) -> dict[str, torch.Tensor]:
    """What a device has learnt, as it is in its own state folder."""
    folder = house.cluster.folder / device / "jobs" / job / "adapter"
    base = AutoModelForCausalLM.from_pretrained(house.model)
    assert any("lora_" in name for name in PeftModel.from_pretrained(base, folder).state_dict())
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): value for name, value in tensors.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def allowing(house: House) -> Iterator[House]:
    """d0 and d1 let what their modules learn go to the coordinator."""
    for name in ("d0", "d1"):
        house.cluster.kill(name, signal.SIGTERM)
        house.start(name, arguments=["--threads", "1", *ALLOWED])
    yield house
    for name in ("d0", "d1"):
        house.cluster.kill(name, signal.SIGTERM)


def test_each_device_gets_the_adapter_of_the_same_job_in_one_process(house: House) -> None:
    devices = ["d0", "d1"]
    with house.connect() as connection:
        job = house.submit(connection, DLORA, devices)
        report = succeeded(connection, job)
        refused = house.cli("export", job, "--out", str(house.cluster.folder / "nothing"))
    local = local_run(house, DLORA, devices)
    for number, name in enumerate(devices):
        assert_same(own_adapter(house, name, job), local.adapters[f"d{number}"])
    assert report["adapter"] is None
    assert refused[0] == 1
    assert f"jobs/{job}/adapter" in refused[2]
    assert len(report["losses"]) == DLORA.steps
    assert report["perplexity_after"] < report["perplexity_before"]
    for number, device in enumerate(report["devices"]):
        rows = {(row["direction"], row["kind"]): row["payload_bytes"] for row in device["traffic"]}
        ledger = local.ledgers[f"d{number}"].traffic
        for (way, kind, _), size in ledger.payload_bytes.items():
            there = "received" if way == "sent" else "sent"
            if "modules" in kind:
                assert rows[there, kind] == size, (way, kind)
    assert not (house.cluster.folder / "coordinator" / "jobs" / job / "adapter").exists()


@pytest.mark.processes
def test_a_device_that_is_killed_in_the_midst_of_an_exchange_does_each_step_once(house: House) -> None:
    config = DLORA.but(steps=60, checkpoint_every=10)
    with house.connect() as connection:
        job = house.submit(connection, config, ["d0", "d1"])
        events_until(connection, job, lambda event: event.HasField("step") and event.step.device_step >= 25)
        house.cluster.kill("d0")
        house.start("d0")
        report = succeeded(connection, job)
        told = [event.step for event in events_of(connection, job, "step")]
    local = local_run(house, config, ["d0", "d1"])
    for number, name in enumerate(("d0", "d1")):
        assert_same(own_adapter(house, name, job), local.adapters[f"d{number}"])
    assert [step.device_step for step in told if step.devices == ["d1"]] == list(range(1, 61))
    assert len(report["losses"]) == config.steps


@pytest.mark.processes
def test_a_job_survives_the_death_of_its_stage(house: House) -> None:
    config = DLORA.but(steps=120, checkpoint_every=10)
    with house.connect() as connection:
        job = house.submit(connection, config, ["d0", "d1"])
        step_reached(connection, job, 15)
        with house.stopped("d0"):  # without which the job does not come to its end meanwhile
            house.stage().kill()
            assert ended(connection, job).state == pb.FAILED
        submit(connection, pb.JobSpec(), resume=job)
        succeeded(connection, job)
    local = local_run(house, config, ["d0", "d1"])
    for number, name in enumerate(("d0", "d1")):
        assert_same(own_adapter(house, name, job), local.adapters[f"d{number}"])


def test_kill_and_revive_cuts_what_crosses_and_shows_it(allowing: House) -> None:
    config = DLORA.but(steps=60, active_fraction=0.25, kill_warmup=8, kill_anneal=4, kill_interval=2, killed="merge")
    with allowing.connect() as connection:
        job = allowing.submit(connection, config, ["d0"])
        report = succeeded(connection, job)
        all_active = succeeded(connection, allowing.submit(connection, DLORA.but(steps=60), ["d0"]))
    sizes = [
        sum(row["payload_bytes"] for row in one["devices"][0]["traffic"] if row["kind"].endswith("ward modules"))
        for one in (report, all_active)
    ]
    assert sizes[0] < 0.5 * sizes[1]
    assert report["modules"][0]["device"] == "d0"
    assert report["modules"][0]["step"] >= 8
    assert report["modules"][0]["killed"]
    picture = Path(report["heat_maps"]["d0"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all_active["modules"] == []
    assert all_active["heat_maps"] == {}
    assert_same(own_adapter(allowing, "d0", job), local_run(allowing, config, ["d0"]).adapters["d0"])


def test_what_modules_learn_leaves_only_where_the_owner_allows_it(allowing: House) -> None:
    config = DLORA.but(aggregate=True, aggregate_every=6)
    with allowing.connect() as connection:
        job = allowing.submit(connection, config, ["d0", "d1"])
        report = succeeded(connection, job)
        for asked in (config, DLORA.but(active_fraction=0.5, killed="merge")):
            refused = ended(connection, allowing.submit(connection, asked, ["d2"]))
            assert refused.state == pb.FAILED
            assert "the owner of this device keeps what its modules learn" in refused.message
            assert "modules-leave" in refused.message
    out = allowing.cluster.folder / "average"
    status, text, _ = allowing.cli("export", job, "--out", str(out), "--json")
    assert (status, json.loads(text)["adapter"]) == (0, str(out))
    average = load_file(out / "adapter_model.safetensors")
    assert_same(own_adapter(allowing, "d0", job), {n.removeprefix("base_model.model."): v for n, v in average.items()})
    assert report["adapter"]
    assert report["aggregation"]["method"] == "average"
    assert report["aggregation"]["aggregation_error"].keys() == {"6", "12"}


def test_a_device_without_the_memory_is_refused_with_the_figure(house: House) -> None:
    config = DLORA.but(batch_size=60000, sequence_length=16, micro_batches=0)
    with house.connect() as connection:
        error = refusal(lambda: house.submit(connection, config, ["d0"]))
        assert "do not fit a message" in error.details()
        huge = DLORA.but(rank=2**22)
        job = ended(connection, house.submit(connection, huge, ["d0"]))
    assert job.state == pb.FAILED
    assert "device d0 has" in job.message
    assert "its share" in job.message
    assert "GiB: choose a smaller" in job.message
