"""Devices with cuts and ranks of their own, over real sockets and processes: as in one process, whatever dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from isthmus.coordinator.emulation.local_cluster import submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.data.sequences import sequences_of_file
from isthmus.split.models.source import ModelFolder
from tests.cluster.house import TINY, House, ended, events_of, events_until, step_reached, succeeded
from tests.split.jobs import split_run

pytestmark = pytest.mark.cluster

MIXED = TINY.but(cuts="d0=3,d1=1,2", ranks="d0=8,d1=0,4")


@pytest.mark.parametrize("aggregation", ["stacking", ""])
def test_a_job_of_devices_that_differ_equals_the_same_job_in_one_process(
    house: House, tmp_path: Path, aggregation: str
) -> None:
    config, devices = MIXED.but(aggregation=aggregation), ["d0", "d1", "d2"]
    with house.connect() as connection:
        job = house.submit(connection, config, devices)
        report = succeeded(connection, job)
        told = {event.device: event.shape for event in events_of(connection, job, "shape")}
    assert {name: (shape.cut, shape.rank) for name, shape in told.items()} == {
        "d0": (3, 8), "d1": (1, 0), "d2": (2, 4),
    }  # fmt: skip
    status, _, _ = house.cli("export", job, "--out", str(tmp_path / "adapter"), "--json")
    assert status == 0
    tokenizer = ModelFolder(house.model).tokenizer()
    texts = [sequences_of_file(house.texts[name], config.text, tokenizer) for name in devices]
    local = split_run(house.model, config, [train for train, _ in texts], [held_out for _, held_out in texts])
    assert report["losses"] == pytest.approx(local.outcome.losses, rel=1e-5)
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in exported} == local.adapter.keys()
    assert report["aggregation"]["method"] == (aggregation or "svd")
    assert len(report["aggregation"]["aggregation_error"]) == 6
    assert [(one["cut"], one["rank"]) for one in report["devices"]] == [(3, 8), (1, 0), (2, 4)]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(house.model), tmp_path / "adapter")
    ids = torch.ones(1, 8, dtype=torch.long)
    with torch.no_grad(), model.disable_adapter():
        without = model(input_ids=ids).logits
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, without)


@pytest.mark.processes
def test_the_deaths_of_a_device_and_of_the_stage_lose_nothing(house: House) -> None:
    config = MIXED.but(steps=900, aggregate_every=5, checkpoint_every=20, learning_rate=1e-4)
    with house.connect() as connection:
        job = house.submit(connection, config, ["d0", "d1", "d2"])
        step_reached(connection, job, 10)
        house.cluster.kill("d0")
        left = events_until(connection, job, lambda event: event.HasField("left"))
        assert left.left.done is False
        with house.stopped("d1"), house.stopped("d2"):  # without whom the job does not come to its end meanwhile
            house.start("d0")
            events_until(connection, job, lambda event: event.HasField("joined"), after=left.number)
        events_until(connection, job, lambda event: event.HasField("checkpoint"))
        house.stage().kill()
        row = ended(connection, job)
        assert row.state == pb.FAILED
        assert row.checkpoint_step > 0
        submit(connection, pb.JobSpec(), resume=job)
        report = succeeded(connection, job)
        steps = [event.step.step for event in events_of(connection, job, "step")]
    assert len(report["losses"]) == config.steps
    assert set(steps) == set(range(1, config.steps + 1))
    assert report["perplexity_after"] < report["perplexity_before"]


def test_auto_is_decided_from_what_devices_measured_and_told_with_the_reasons(house: House) -> None:
    status, out, err = house.cli(
        "finetune", "--model", str(house.model), "--dataset", "notes", "--devices", "d0,d1,d2", "--json",
        "--cut", "d1=1,auto", "--rank", "d2=2,auto", "--steps", "6", "--batch-size", "2", "--sequence-length", "16",
        "--aggregate-every", "2", "--validation-fraction", "0.2",
    )  # fmt: skip
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    told = {line["device"]: line["data"] for line in lines[:-1] if line["kind"] == "shape"}
    assert told.keys() == {"d0", "d1", "d2"}
    assert (told["d1"]["cut"], told["d2"]["rank"]) == (1, 2)
    for name, data in told.items():
        assert 1 <= data["cut"] <= 3
        assert 1 <= data["rank"] <= 8
        assert data["step_seconds"] > 0
        assert data["memory_bytes"] > 2**28
        assert data["message"].startswith(f"{name}: cut {data['cut']}, rank {data['rank']}; about ")
    assert [one["cut"] for one in lines[-1]["devices"]] == [told[name]["cut"] for name in ("d0", "d1", "d2")]


def test_a_cut_for_a_device_that_has_no_part_is_refused_at_once(house: House) -> None:
    status, _, err = house.cli(
        "finetune", "--model", str(house.model), "--dataset", "notes", "--devices", "d0", "--cut", "phone=2,1"
    )
    assert status == 1
    assert "--cut names phone, which is not among the devices: d0" in err
