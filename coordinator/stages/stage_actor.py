"""The Ray actor that hosts one job's stage and serves Stage.Exchange itself: activations pass no other process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import ray
import torch
from torch import Tensor

from isthmus.coordinator.control.interceptors import ErrorInterceptor
from isthmus.coordinator.stages.exchange import ExchangeServicer
from isthmus.protos.v1 import stage_pb2_grpc
from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.errors import IsthmusError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.events import Tell
from isthmus.split.job.shapes import asked, from_plain
from isthmus.split.link.coding import Terms
from isthmus.split.lora.lora import lora_config, save_adapter
from isthmus.split.methods import method_of
from isthmus.split.models.precision import pick_device
from isthmus.split.models.source import open_model
from isthmus.split.plan.costs import Costs
from isthmus.split.plan.cut_mover import CutMover
from isthmus.split.resources.ledger import Ledger
from isthmus.split.resources.traffic import Traffic
from isthmus.split.tls import SERVER_OPTIONS, Peer, bind_one_of, server_credentials
from isthmus.split.training.checkpoint import CheckpointFolder
from isthmus.split.training.host import JobHost
from isthmus.split.training.hosted_job import HostContext
from isthmus.split.training.method import StageResources

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StageTask:
    """What a stage actor is told, as plain values, for they travel through Ray."""

    job: str
    model: str  # folder on this machine
    base_model: str  # as whoever submitted the job named it
    training: str  # JSON of TrainingConfig
    devices: dict[str, str]  # name -> serial of its certificate
    stage_digests: dict[int, str]  # digest of what a device holds, by cut
    shapes: dict[str, list[int]]  # cut and rank of each device
    memory: dict[str, float]  # bytes of memory of each device; 0 if not known
    folder: str  # the job's folder, for checkpoints and the adapter
    resume: bool


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """How a stage actor computes and listens."""

    host: str
    certificate: bytes
    ca: bytes
    threads: int  # 0: all cores
    device: str  # torch device: auto, cpu, cuda
    ports: tuple[int, int]  # first and last port that a stage may listen on; (0, 0) for any free one
    key: bytes = dataclasses.field(repr=False)
    slow_down: float = 1.0  # in training it emulates a machine that is this many times slower
    stage_certificate: bytes = b""  # with it a gateway's own holders come to the gateway
    stage_key: bytes = dataclasses.field(default=b"", repr=False)


class StageActor:
    """Hosts one job's stage. `start_stage_actor` makes it a Ray actor; `control` is told of every event."""

    def __init__(self, task: StageTask, serving: ServingOptions, control: Any) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        self._task, self._serving, self._control = task, serving, control
        self._devices = dict(task.devices)
        self._finished: asyncio.Future[dict[str, Any]] | None = None
        self._traffic = {name: Traffic() for name in task.devices}
        self._server: grpc.aio.Server | None = None
        self._host: JobHost | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._telling: asyncio.Task[None] | None = None

    async def start(self) -> tuple[int, dict[str, str]]:
        """Loads the stage and serves it at a free port; returns the port, and this node's id and address."""
        torch.set_num_threads(self._serving.threads or os.cpu_count() or 1)
        loop = asyncio.get_running_loop()
        self._finished = loop.create_future()
        self._config = TrainingConfig.from_json(self._task.training)
        self._telling = asyncio.create_task(self._tell_events())

        def tell(event: Event) -> None:  # in the host's thread
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._host, terms = host, terms = await asyncio.to_thread(self._build, tell)
        self._servicer = ExchangeServicer(host, self._task.job, terms, self._allowed, self._traffic)
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=SERVER_OPTIONS)
        stage_pb2_grpc.add_StageServicer_to_server(self._servicer, self._server)
        credentials = server_credentials(self._serving.certificate, self._serving.key, self._serving.ca)
        port = bind_one_of(self._server, self._serving.host, self._serving.ports, credentials)
        await self._server.start()
        return port, {"id": ray.get_runtime_context().get_node_id(), "address": ray.util.get_node_ip_address()}

    async def finished(self) -> dict[str, Any]:
        """Waits for the end, and returns the report's parts that only this side knows, with the adapter's folder."""
        assert self._finished is not None
        return await self._finished

    async def start_without(self, missing: list[str]) -> None:
        assert self._host is not None
        self._host.start_without(set(missing))

    async def allow(self, device: str, serial: str) -> None:
        """Lets a device of this job come with this certificate from now on, and with no other."""
        if self._devices.get(device) != serial:
            self._devices[device] = serial
            self._servicer.drop(device)

    async def revoke(self, device: str) -> None:
        self._devices.pop(device, None)
        self._servicer.drop(device)

    async def stop(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
        if self._server is not None:
            await self._server.stop(grace=1)
        if self._host is not None:
            await asyncio.to_thread(self._host.close)

    def _build(self, tell: Tell) -> tuple[JobHost, Terms]:
        """Makes the job's host, and the terms that frames are checked by.

        The host knows what differs between devices.
        """
        source, config = open_model(self._task.model), self._config
        ledger = Ledger(slow_down=self._serving.slow_down)
        if ledger.slow_down > 1:
            log.warning("job %s: emulating a machine %g times slower", self._task.job, ledger.slow_down)
        moves = asked(config)[0].automatic
        resources = StageResources(
            source,
            config,
            from_plain(self._task.shapes),
            pick_device(self._serving.device),
            ledger,
            digests=self._task.stage_digests,
            mover=CutMover(Costs(source.config, config), self._task.memory) if moves else None,
        )
        checkpoints = CheckpointFolder(Path(self._task.folder) / "checkpoints")
        last = checkpoints.last() if self._task.resume else None
        context = HostContext(config, set(self._task.devices), checkpoints=checkpoints, resume=last, tell=tell)
        self._lora = lora_config(config, source.config)
        host = JobHost(method_of(config).host_steps(resources), context)
        model = source.config
        return host, Terms(config, 1, (), model.hidden_size, model.vocab_size)

    def _allowed(self, peer: Peer) -> bool:
        return self._devices.get(peer.name) == peer.serial

    async def _tell_events(self) -> None:
        """Tells events one after the other, and the end after all others.

        Ray may run an async actor's calls in any order.
        """
        while True:
            event = await self._events.get()
            if event.HasField("finished"):
                try:
                    self._end(await asyncio.to_thread(self._result))
                except Exception as error:  # whatever it is, the job ends with it and does not wait for ever
                    log.exception("job %s: the adapter cannot be written", self._task.job)
                    self._give_up(f"the adapter cannot be written: {error}")
            elif event.HasField("failed"):
                self._give_up(event.failed.message)
            else:
                try:
                    await self._control.stage_event.remote(self._task.job, event.SerializeToString())
                except Exception as error:  # such as a full disk: what cannot be recorded must not go on unseen
                    log.exception("job %s: the coordinator did not take an event", self._task.job)
                    self._give_up(f"the coordinator could not record the job's progress: {error}")

    def _result(self) -> dict[str, Any]:
        """Writes the adapter, where the job has one, and returns the report's parts that only this side knows."""
        assert self._host is not None
        outcome = self._host.outcome()
        adapter = None if outcome.adapter is None else self._write(outcome.adapter)
        losses = {"losses": outcome.losses} if outcome.losses else {}
        counted = self._counted(self._host.ledger)
        return {"adapter": adapter, "resources": outcome.resources, **losses, **counted}

    def _write(self, tensors: Mapping[str, Tensor]) -> str:
        folder = Path(self._task.folder) / "adapter"
        shutil.rmtree(folder, ignore_errors=True)  # left by an earlier run that ended before it could say so
        save_adapter(folder, dict(sorted(tensors.items())), self._lora, self._task.base_model)
        return str(folder)

    def _counted(self, ledger: Ledger) -> dict[str, Any]:
        for traffic in self._traffic.values():
            ledger.traffic.add(traffic)
        rows = {name: traffic.rows() for name, traffic in self._traffic.items()}
        return {"coordinator": ledger.summary(), "traffic": rows}

    def _end(self, result: dict[str, Any]) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(result)

    def _give_up(self, message: str) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(IsthmusError(message))
