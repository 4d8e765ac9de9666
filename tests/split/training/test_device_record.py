"""What a device keeps of a job is read back, also as version 0.1 wrote it, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from isthmus.split.errors import WrongState
from isthmus.split.training.checkpoint import DeviceRecord, DeviceState


def written(folder: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> DeviceRecord:
    """A record as a file says it was written after 4 steps."""
    place = folder / "step-00000004"
    place.mkdir(parents=True)
    save_file(tensors, place / "state.safetensors")
    (place / "state.json").write_text(json.dumps(described))
    return DeviceRecord(folder)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    record = DeviceRecord(tmp_path)
    record.save(DeviceState(4, torch.ones(3), {"a|exp_avg": torch.zeros(2)}, {"controller": {}}, {"nll": 1.5}))
    state = record.last()
    assert state is not None
    assert torch.equal(state.adapter, torch.ones(3))
    assert state.optimizer.keys() == {"a|exp_avg"}
    assert (state.step, state.method, state.told) == (4, {"controller": {}}, {"nll": 1.5})


def test_the_optimiser_that_version_0_1_kept_of_splitlora_is_read(tmp_path: Path) -> None:
    moments = {"model.layers.0.q_proj.lora_A.weight|exp_avg": torch.full((2,), 0.5)}
    state = written(tmp_path, moments, {"step": 4}).at(4)
    assert state is not None
    assert state.step == 4
    assert torch.equal(state.optimizer[next(iter(moments))], torch.full((2,), 0.5))
    assert not state.method


@pytest.mark.parametrize("trained", [None, ["model.layers.0.q_proj"]])
def test_what_version_0_1_kept_of_dlora_is_read(tmp_path: Path, trained: list[str] | None) -> None:
    described = {"step": 4, "controller": {"credit": 1.0}, "trained": trained, "told": {"nll": 2.0}}
    tensors = {"adapter": torch.ones(3), "optimizer/x|exp_avg": torch.zeros(2)}
    state = written(tmp_path, tensors, described).last()
    assert state is not None
    assert state.method == {"controller": {"credit": 1.0}} | ({} if trained is None else {"trained": trained})
    assert state.optimizer.keys() == {"x|exp_avg"}
    assert state.told == {"nll": 2.0}


@pytest.mark.parametrize(
    ("tensors", "described"),
    [
        ({"x": torch.ones(1)}, {"step": 4, "something": 1}),
        ({"x": torch.ones(1)}, {"step": 4, "method": {}, "told": {}}),
        ({"adapter": torch.ones(1)}, {"step": 4, "controller": {}}),
        ({"adapter": torch.ones(1)}, {}),
    ],
)
def test_another_file_is_refused_in_one_line(
    tmp_path: Path, tensors: dict[str, Tensor], described: dict[str, Any]
) -> None:
    with pytest.raises(WrongState, match="is no device's record that this version can read") as refused:
        written(tmp_path, tensors, described).last()
    assert "\n" not in str(refused.value)
