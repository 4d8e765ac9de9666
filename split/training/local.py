"""Split training in one process: the devices are threads, and LocalLinks join them to the server's stage.

No network and no processes, the same algorithm: what tests compare with and benchmarks measure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from isthmus.split.data.sequences import Sequences
from isthmus.split.errors import IsthmusError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, fixed_shapes
from isthmus.split.link.coding import Terms
from isthmus.split.link.device import Link, LocalLink
from isthmus.split.link.profile import LinkProfile
from isthmus.split.link.stage import Host
from isthmus.split.lora.lora import initial_adapter, unflatten
from isthmus.split.models.precision import pick_device, pick_precision
from isthmus.split.models.source import TensorSource
from isthmus.split.models.stage import Stage
from isthmus.split.plan.moving import Mover
from isthmus.split.plan.parts import device_stages, merging_of, parts_of, server_stages
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.checkpoint import CheckpointFolder, OptimizerRecord
from isthmus.split.training.device import DeviceTrainer
from isthmus.split.training.host import Outcome, StageHost
from isthmus.split.training.server import ServerTrainer

Text = tuple[Sequences, Sequences | None]  # to train on, and held out


@dataclass(frozen=True)
class LocalRun:
    """What a split run in this process left. adapter: both sides' tensors, by their names in the whole model."""

    outcome: Outcome
    adapter: dict[str, Tensor]
    ledgers: dict[str, Ledger]  # of the devices


class Trainer(Protocol):
    """A device's, of either method."""

    ledger: Ledger

    @property
    def terms(self) -> Terms: ...
    def run(self, link: Link, *, cancelled: threading.Event) -> None: ...


class LocalJob:
    """Devices as threads. `told` is what the host is to tell; it passes everything on to `tell`."""

    def __init__(self, tell: Callable[[str, str, dict[str, Any]], None]) -> None:
        self._tell = tell
        self._ended = threading.Event()
        self._errors: list[BaseException] = []

    def told(self, kind: str, name: str, data: dict[str, Any]) -> None:
        self._tell(kind, name, data)
        if kind == "failed":
            self._errors.append(IsthmusError(str(data["message"])))
        if kind in ("finished", "failed"):
            self._ended.set()

    def run(self, host: Host, trainers: Mapping[str, Trainer], profile: LinkProfile) -> None:
        """To the job's end; closes the host. Raises the first error of a device or of the stage."""
        pairs = [(host, name, trainer, profile) for name, trainer in trainers.items()]
        threads = [threading.Thread(target=self._work, args=pair, name=pair[1], daemon=True) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not self._errors:
            self._ended.wait()
        host.close()
        if self._errors:
            raise self._errors[0]

    def _work(self, host: Host, name: str, trainer: Trainer, profile: LinkProfile) -> None:
        link = LocalLink(host, name, trainer.terms, trainer.ledger, profile=profile)
        try:
            trainer.run(link, cancelled=threading.Event())
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            self._errors.append(error)
        finally:
            link.close()  # after an error the others go on without it


def train_split_locally(
    source: TensorSource,
    config: TrainingConfig,
    texts: Sequence[Text],
    *,
    device: str = "cpu",
    profile: LinkProfile = LinkProfile(),
    checkpoints: Path | None = None,
    resume: bool = False,
    shapes: Mapping[str, Shape] | None = None,
    mover: Mover | None = None,
    tell: Callable[[str, str, dict[str, Any]], None] = lambda kind, device, data: None,
) -> LocalRun:
    """Trains the devices d0, d1, ... on their texts, each in a thread with stages of its own.

    device: torch device of all stages. profile: of the network that the links stand for, for `auto`. checkpoints: a
    folder for the server's and the devices' records; `resume` goes on from the last. shapes: of the devices by name;
    None: as the configuration says. mover: says when cuts move. tell(kind, device, data): the host's events, in its
    thread (see StageHost).
    Raises the first error of a device or of the stage.
    """
    where = pick_device(device)
    dtype = pick_precision(config.optimizer.precision, where)
    names = [f"d{index}" for index in range(len(texts))]
    shapes = dict(shapes) if shapes else fixed_shapes(config, names)
    parts = parts_of(source.config, config, shapes["d0"])
    devices: dict[str, DeviceTrainer] = {}

    def reshape(shape: Shape) -> tuple[list[Stage], str]:
        return device_stages(source, config, shape, where), ""

    for name, (train, validation) in zip(names, texts, strict=True):
        devices[name] = DeviceTrainer(
            device_stages(source, config, shapes[name], where),
            config,
            train,
            validation,
            Ledger(),
            dtype=dtype,
            record=OptimizerRecord(checkpoints / name) if checkpoints else None,
            shape=shapes[name] if mover else None,
            reshape=reshape,
        )
    segments = server_stages(source, config, shapes, where)
    kept = CheckpointFolder(checkpoints / "server") if checkpoints else None
    job = LocalJob(tell)
    cuts = {name: shape.cut for name, shape in shapes.items()}
    host = StageHost(
        ServerTrainer(segments, config, Ledger(), dtype=dtype, cuts=cuts),
        config,
        set(devices),
        initial_adapter=initial_adapter(parts.adapter, config.seed),
        merging=merging_of(source.config, config, shapes),
        mover=mover,
        segments=lambda shapes: server_stages(source, config, shapes, where),
        checkpoints=kept,
        resume=kept.last() if kept and resume else None,
        tell=job.told,
    )

    job.run(host, devices, profile)
    outcome = host.outcome()
    adapter = outcome.merged or {**unflatten(parts.adapter, outcome.device_adapter), **outcome.server}
    return LocalRun(outcome, dict(sorted(adapter.items())), {name: one.ledger for name, one in devices.items()})
