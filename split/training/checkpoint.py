"""Checkpoints of what a job has made: on disk whole or not at all, as safetensors and JSON only."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.split.codecs.finite import DIVERGED, is_finite
from isthmus.split.errors import WrongState

_KEPT = 2  # the last one, and the one before it in case the other side had not got that far


@dataclass(frozen=True)
class Checkpoint:
    """The server's side after `step` steps: its adapter and optimiser, and the devices' averaged adapter."""

    step: int
    server: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    device_adapter: Tensor | None  # flat, (values,); None before the first aggregation
    losses: list[float]
    stage_digest: str = ""  # digest of the model files that the devices hold
    merged: dict[str, Tensor] = field(default_factory=dict)  # of devices that differ: see split/aggregation/merger.py
    shapes: dict[str, list[int]] = field(default_factory=dict)  # each device's cut and rank, where they differ

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names on the disk."""
        tensors = {
            **{f"server/{name}": value for name, value in self.server.items()},
            **{f"optimizer/{name}": value for name, value in self.optimizer.items()},
            **{f"merged/{name}": value for name, value in self.merged.items()},
        }
        return tensors if self.device_adapter is None else {**tensors, "device_adapter": self.device_adapter}

    def check_finite(self) -> None:
        """Raises WrongState for NaN or infinity, from which a job cannot go on."""
        _check_finite(self.step, {**self.tensors(), "losses": torch.tensor(self.losses, dtype=torch.float64)})


class CheckpointFolder:
    """The checkpoints of one job: FOLDER/step-00000100/{state.safetensors, state.json}."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint and returns its folder.

        Raises WrongState for NaN or infinity in it; the earlier checkpoints then stay as they are.
        """
        checkpoint.check_finite()
        described = {
            "step": checkpoint.step,
            "losses": checkpoint.losses,
            "stage_digest": checkpoint.stage_digest,
            "shapes": checkpoint.shapes,
        }
        return _save(self.folder, checkpoint.step, checkpoint.tensors(), described)

    def last(self) -> Checkpoint | None:
        """The newest checkpoint, or None before the first. Raises WrongState if it cannot be read."""
        steps = _steps(self.folder)
        if not steps:
            return None
        tensors, described = _load(self.folder, steps[-1])
        return Checkpoint(
            described["step"],
            _part(tensors, "server/"),
            _part(tensors, "optimizer/"),
            tensors.get("device_adapter"),
            described["losses"],
            described["stage_digest"],
            _part(tensors, "merged/"),
            described.get("shapes", {}),
        )


@dataclass(frozen=True)
class DeviceState:
    """A device's side after `step` steps.

    adapter: the adapter's values, flat.
    optimizer: the optimiser's tensors, by name.
    method: what the method has to know besides, as JSON has it.
    told: the values of the last STEP.
    """

    step: int
    adapter: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)


class DeviceRecord:
    """What a device keeps of a job on its own disk, at the steps at which the job has checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: DeviceState) -> None:
        """Writes a state. Raises WrongState for NaN or infinity; what was saved before then stays as it is."""
        tensors = {"adapter": state.adapter, **{f"optimizer/{name}": value for name, value in state.optimizer.items()}}
        _check_finite(state.step, tensors)
        _save(self.folder, state.step, tensors, {"step": state.step, "method": state.method, "told": state.told})

    def last(self) -> DeviceState | None:
        """The newest state, or None before the first. Raises WrongState if it cannot be read."""
        steps = _steps(self.folder)
        return self.at(steps[-1]) if steps else None

    def at(self, step: int) -> DeviceState | None:
        """The state after `step` steps, or None if none was kept; deletes later ones, for the job goes on from here.

        Raises WrongState if it cannot be read.
        """
        for later in (known for known in _steps(self.folder) if known > step):
            shutil.rmtree(self.folder / f"step-{later:08d}")
        if step not in _steps(self.folder):
            return None
        try:
            return _device_state(*_load(self.folder, step))
        except KeyError as error:
            raise WrongState(
                f"{self.folder / f'step-{step:08d}'} is no device's record that this version can read: it has no "
                f"{error.args[0]}; remove it, and the device goes on from the last average without its moments"
            ) from None


def _device_state(tensors: dict[str, Tensor], described: Mapping[str, Any]) -> DeviceState:
    """Read a device's record of this version, or of version 0.1, which had a kind of its own for each method.

    Raises KeyError for what neither has written.
    """
    step, told = described["step"], described.get("told", {})
    if "method" in described:
        return DeviceState(step, tensors["adapter"], _part(tensors, "optimizer/"), described["method"], told)
    if "controller" in described:  # of dlora
        method = {name: described[name] for name in ("controller", "trained") if described[name] is not None}
        return DeviceState(step, tensors["adapter"], _part(tensors, "optimizer/"), method, told)
    if set(described) != {"step"}:
        raise KeyError("method")
    return DeviceState(step, torch.empty(0), tensors)  # of splitlora: the adapter was the coordinator's to remember


def _save(folder: Path, step: int, tensors: dict[str, Tensor], described: Mapping[str, object]) -> Path:
    final = folder / f"step-{step:08d}"
    partial = folder / f"partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps(described))
    for path in (partial / "state.safetensors", partial / "state.json", partial):
        _sync(path)
    if final.exists():  # a resumed job passes the same step again
        shutil.rmtree(final)
    os.rename(partial, final)
    _sync(folder)
    for old in _steps(folder)[:-_KEPT]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    return final


def _check_finite(step: int, tensors: Mapping[str, Tensor]) -> None:
    """Raises WrongState for NaN or infinity: whoever goes on from a state with that could not train."""
    broken = next((name for name, value in tensors.items() if not is_finite(value)), None)
    if broken is not None:
        raise WrongState(
            f"{broken} is not finite after step {step}, so nothing is kept of it: {DIVERGED}; "
            "--resume goes on from the last checkpoint"
        )


def _load(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = folder / f"step-{step:08d}"
    try:
        return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise WrongState(f"the checkpoint {path} cannot be read ({error}); remove it to use the one before") from None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d{8})", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _sync(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
