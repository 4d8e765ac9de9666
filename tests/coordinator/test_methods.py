"""What a job's method checks before devices are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.methods import Serving
from protos.v1 import coordinator_pb2 as pb
from split.errors import BadRequest
from split.serving import ServingConfig, memory_of, parse_stages
from tests.split.tiny_models import make_model


def test_a_device_without_the_memory_for_its_blocks_is_refused_with_the_figures(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", layers=4)
    config = ServingConfig(parse_stages("laptop:0-3,cloud:3-4"), "m", context=100, sequences=1024)  # and 4 guests
    spec = pb.JobSpec(method="serve", model=str(model), devices=["laptop"], serving=config.to_json())
    serving = Serving(spec, tmp_path / "digests.json")
    needed = memory_of(serving.folder, serving.config.spans[0], serving.config)
    assert needed > 3 * 8 * 1024 * 100 * 16  # keys and values alone
    for enough in (needed, 0):  # 0: the device has not said
        serving.check_device("laptop", pb.Profile(memory_bytes=enough))
    with pytest.raises(BadRequest) as refused:
        serving.check_device("laptop", pb.Profile(memory_bytes=needed - 1))
    with pytest.raises(BadRequest):  # blocks lie in the accelerator's memory
        serving.check_device("laptop", pb.Profile(memory_bytes=needed, accelerator_bytes=needed - 1))
    line = str(refused.value)
    gib = f"{needed / 2**30:.1f} GiB"
    assert line.startswith(f"device laptop has {gib} of memory; blocks 0-3 take {gib} with room for 1028 sequences")
    assert "give it fewer blocks" in line
    assert "\n" not in line
