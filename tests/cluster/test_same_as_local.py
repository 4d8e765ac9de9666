"""Over real sockets and processes, a job trains what it trains in one process, and what it reports is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.data.sequences import read_documents, sequences_of_file, split_documents
from isthmus.split.models.source import ModelFolder
from isthmus.split.training.evaluate import evaluate_files
from tests.cluster.house import TINY, House, succeeded
from tests.split.jobs import split_run

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("devices", "labels"),
    [
        (["d0"], "device"),
        (["d0"], "server"),
        (["d0", "d1", "d2"], "server"),
        pytest.param(["d0", "d1", "d2"], "device", marks=pytest.mark.processes),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} devices",
)
def test_a_job_over_the_network_equals_the_same_job_in_one_process(
    house: House, tmp_path: Path, labels: str, devices: list[str]
) -> None:
    config = TINY.but(labels=labels, cut_layer=2)
    with house.connect() as connection:
        job = house.submit(connection, config, devices)
        report = succeeded(connection, job)
        row = connection.stub.GetJob(pb.JobRequest(id=job))
    assert (row.step, row.checkpoint_step) == (config.steps, config.steps)
    status, out, _ = house.cli("export", job, "--out", str(tmp_path / "adapter"), "--json")
    assert (status, json.loads(out)) == (0, {"job": job, "adapter": str(tmp_path / "adapter")})

    tokenizer = ModelFolder(house.model).tokenizer()
    texts = [sequences_of_file(house.texts[name], config.text, tokenizer) for name in devices]
    local = split_run(house.model, config, [train for train, _ in texts], [held_out for _, held_out in texts])

    assert report["losses"] == pytest.approx(local.outcome.losses, rel=1e-6)
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    exported = {name.removeprefix("base_model.model."): value for name, value in exported.items()}
    assert exported.keys() == local.adapter.keys()
    for name, value in local.adapter.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-5, atol=1e-7, msg=name)

    perplexities = {int(step): value for step, value in report["perplexities"].items()}
    assert perplexities == pytest.approx(local.outcome.perplexities, rel=1e-5)
    files = [
        held_out_file(house.texts[name], tmp_path / f"{name}.txt", config.text.validation_fraction) for name in devices
    ]
    unsplit = evaluate_files(str(house.model), files, adapter=tmp_path / "adapter", data=config.text)
    assert report["perplexity_after"] == pytest.approx(unsplit.perplexity, rel=1e-3)
    assert report["perplexity_after"] < report["perplexity_before"]

    base = AutoModelForCausalLM.from_pretrained(house.model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    values = {name: value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert len(values) == len(exported)

    assert [device["name"] for device in report["devices"]] == devices
    for device in report["devices"]:
        assert device["bytes_sent"] > 0
        assert device["bytes_received"] > 0
        assert device["peak_bytes"] > 0
        kinds = {row["kind"] for row in device["traffic"]}
        assert ("backward" in kinds) == (labels == "device")


def held_out_file(text: Path, path: Path, fraction: float) -> Path:
    """What a device holds out of its text, as a file of its own."""
    _, held_out = split_documents(read_documents(text, TINY.but(validation_fraction=fraction).text), fraction)
    path.write_text("".join(document.text for document in held_out))
    return path
