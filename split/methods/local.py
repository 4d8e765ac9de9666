"""Training in one process, whatever the method: devices are threads, which LocalLinks join to the job's stage.

It is the same algorithm, without a network and without processes. Tests compare with it, and benchmarks measure it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.data.sequences import Sequences
from isthmus.split.errors import IsthmusError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.events import Tell, tell_nobody
from isthmus.split.job.shapes import Shape, fixed_shapes
from isthmus.split.link.device import LocalLink
from isthmus.split.link.profile import LinkProfile
from isthmus.split.methods import method_of
from isthmus.split.models.precision import pick_device, pick_precision
from isthmus.split.models.source import TensorSource
from isthmus.split.plan.cut_mover import CutMover
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.checkpoint import CheckpointFolder, DeviceRecord
from isthmus.split.training.device import DeviceTrainer
from isthmus.split.training.device_steps import DeviceContext
from isthmus.split.training.host import JobHost
from isthmus.split.training.hosted_job import HostContext, Outcome
from isthmus.split.training.method import DeviceResources, Method, StageResources

Text = tuple[Sequences, Sequences | None]  # text to train on, and held-out text


@dataclass(frozen=True)
class LocalRun:
    """What a run in this process left.

    adapter: the job's adapter, by names in the whole model; empty where devices keep their own.
    adapters: each device's own adapter.
    ledgers: each device's ledger.
    server: the stage's ledger.
    """

    outcome: Outcome
    adapter: dict[str, Tensor]
    adapters: dict[str, dict[str, Tensor]]
    ledgers: dict[str, Ledger]
    server: Ledger


class LocalJob:
    """A job whose devices are threads. Give `told` to its host, for it passes each event on to `tell`."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._ended = threading.Event()
        self._errors: list[BaseException] = []

    def told(self, event: Event) -> None:
        self._tell(event)
        if event.HasField("failed"):
            self._errors.append(IsthmusError(event.failed.message))
        if event.HasField("finished") or event.HasField("failed"):
            self._ended.set()

    def run(self, host: JobHost, trainers: Mapping[str, DeviceTrainer], profile: LinkProfile) -> None:
        """Runs the job to its end and closes the host. Raises the first error of a device or of the stage."""
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

    def _work(self, host: JobHost, name: str, trainer: DeviceTrainer, profile: LinkProfile) -> None:
        link = LocalLink(host, name, trainer.terms, trainer.ledger, profile=profile)
        try:
            trainer.run(link, cancelled=threading.Event())
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            self._errors.append(error)
        finally:
            link.close()  # after an error the others go on without this device


def local_trainer(
    source: TensorSource,
    config: TrainingConfig,
    text: Text,
    shape: Shape,
    *,
    device: str = "cpu",
    record: DeviceRecord | None = None,
    moves: bool = False,
    method: Method | None = None,
) -> DeviceTrainer:
    """Makes the trainer of a device of this shape.

    source: the whole model.
    text: the device's text.
    moves: whether its cut may move.
    method: None for the job's method.
    """
    where = pick_device(device)
    dtype = pick_precision(config.optimizer.precision, where)
    context = DeviceContext(config, *text, Ledger(), dtype)
    resources = DeviceResources(source, shape, where, (lambda cut: (source, "")) if moves else None)
    steps = (method or method_of(config)).device_steps(context, resources)
    return DeviceTrainer(context, steps, record=record)


def train_locally(
    source: TensorSource,
    config: TrainingConfig,
    texts: Sequence[Text],
    *,
    device: str = "cpu",
    profile: LinkProfile = LinkProfile(),
    checkpoints: Path | None = None,
    resume: bool = False,
    shapes: Mapping[str, Shape] | None = None,
    mover: CutMover | None = None,
    tell: Tell = tell_nobody,
) -> LocalRun:
    """Trains the devices d0, d1, ... on their texts, each in a thread with stages of its own, by the job's method.

    device: torch device of all stages.
    profile: the network that the links stand for, which `auto` plans for.
    checkpoints: folder for the server's checkpoints and the devices' records; `resume` goes on from the last ones.
    shapes: the devices' shapes, by name; None for those of the configuration.
    mover: decides when cuts move; None to keep them.
    tell: is called with each event, in the host's thread.

    Raises the first error of a device or of the stage.
    """
    names = [f"d{index}" for index in range(len(texts))]
    shapes = dict(shapes) if shapes else fixed_shapes(config, names)
    trainers = {
        name: local_trainer(
            source,
            config,
            text,
            shapes[name],
            device=device,
            record=DeviceRecord(checkpoints / name) if checkpoints else None,
            moves=mover is not None,
        )
        for name, text in zip(names, texts, strict=True)
    }
    resources = StageResources(source, config, shapes, pick_device(device), Ledger(), mover=mover)
    kept = CheckpointFolder(checkpoints / "server") if checkpoints else None
    job = LocalJob(tell)
    last = kept.last() if kept and resume else None
    context = HostContext(config, names, checkpoints=kept, resume=last, tell=job.told)
    host = JobHost(method_of(config).host_steps(resources), context)
    job.run(host, trainers, profile)
    outcome = host.outcome()
    return LocalRun(
        outcome,
        dict(sorted((outcome.adapter or {}).items())),
        {name: trainer.adapter() for name, trainer in trainers.items()},
        {name: trainer.ledger for name, trainer in trainers.items()},
        host.ledger,
    )
