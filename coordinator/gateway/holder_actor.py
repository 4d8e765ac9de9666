"""The Ray actor that holds a span's blocks at the coordinator. Like a device it dials the gateway."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from isthmus.split.inference.holding import Holding
from isthmus.split.lora.folder import AdapterFolder
from isthmus.split.lora.served import LoraAdapter
from isthmus.split.models.source import open_model
from isthmus.split.models.stage import StageSpec
from isthmus.split.printable import log_to_stderr
from isthmus.split.resources.ledger import Ledger
from isthmus.split.runtime.choose import RuntimeChoice, make_runtime
from isthmus.split.tls import Credentials, channel


@dataclass(frozen=True)
class HolderTask:
    """What a holder actor is told, in plain values, since they travel through Ray."""

    job: str
    model: str  # folder
    first: int
    last: int
    digest: str
    sequences: int
    tokens: int
    gateway: str  # HOST:PORT
    threads: int  # 0: all cores
    device: str
    runtime: str
    weights: str
    cache: str  # folder for graphs
    adapters: tuple[tuple[str, str], ...]  # name, folder
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


class HolderActor:
    """Made a Ray actor by the gateway, which makes another when this one dies."""

    def __init__(self, task: HolderTask) -> None:
        log_to_stderr("%(asctime)s %(name)s: %(message)s")
        self._task = task

    async def pid(self) -> int:
        return os.getpid()

    async def run(self) -> None:
        """Hold the blocks until the gateway closes the stream. Raises LinkLost when the stream breaks."""
        await asyncio.to_thread(self._run)

    def _run(self) -> None:
        task = self._task
        torch.set_num_threads(task.threads or os.cpu_count() or 1)
        ledger, source = Ledger(), open_model(task.model)
        spec = StageSpec(task.first, task.last, embeds=False, head=False)
        choice = RuntimeChoice(task.runtime, task.weights, task.device, Path(task.cache))
        runtime = make_runtime(
            source,
            task.first,
            task.last,
            choice,
            sequences=task.sequences,
            tokens=task.tokens,
            adapters=[LoraAdapter(name, AdapterFolder(folder), source.config) for name, folder in task.adapters],
        )
        with channel(task.gateway, Credentials(task.ca, task.certificate, task.key)) as gateway:
            hidden_size = source.config.hidden_size
            holding = Holding(
                gateway,
                runtime,
                spec,
                job=task.job,
                digest=task.digest,
                hidden_size=hidden_size,
                ledger=ledger,
            )
            holding.run()
