"""The Ray actor that serves one model: the engine with both ends of the model, the chain's holders, and HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from isthmus.coordinator.control.interceptors import ErrorInterceptor
from isthmus.coordinator.gateway import make_app, serve
from isthmus.coordinator.gateway.chain import ChainServicer
from isthmus.coordinator.gateway.holder_actor import HolderActor, HolderTask
from isthmus.coordinator.gateway.models import ServedModel
from isthmus.coordinator.stages.stage_actor import ServingOptions
from isthmus.protos.v1 import chain_pb2_grpc
from isthmus.protos.v1.events_pb2 import Event, HolderTookOver, ServingStarted
from isthmus.split.errors import IsthmusError
from isthmus.split.inference.chain import Span, Takeover
from isthmus.split.inference.drafters import Drafter
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.exits import parse_exit
from isthmus.split.inference.local import make_drafter
from isthmus.split.inference.serving import CLOUD, ServingConfig, SpanConfig
from isthmus.split.job.events import log_line
from isthmus.split.link.backoff import Backoff
from isthmus.split.models.source import ModelFolder, end_tokens, open_model
from isthmus.split.printable import log_to_stderr
from isthmus.split.runtime.choose import RuntimeChoice
from isthmus.split.tls import DEVICE, SERVER_OPTIONS, STAGE, Peer, bind_one_of, join_address, server_credentials

log = logging.getLogger(__name__)

_AGAIN, _AT_MOST = 2.0, 30.0  # seconds up to which the first wait for a new holder actor, and any, is drawn
_SOON = 10.0  # seconds; one that lived for longer is made again at once


@dataclass(frozen=True)
class GatewayTask:
    """What a gateway is told, in plain values, since they travel through Ray."""

    job: str
    model: str  # folder on this machine
    serving: str  # JSON of ServingConfig
    devices: dict[str, str]  # name -> serial of its certificate
    digests: dict[str, str]  # by span: of its tensors
    user_digests: dict[int, str]  # by number of blocks: of the tensors of a device that uses the chain with so many
    cache: str  # folder for graphs


class GatewayActor:
    """Serves one model: a Ray actor that the coordinator makes. `control` is told of every event."""

    def __init__(self, task: GatewayTask, options: ServingOptions, control: Any) -> None:
        log_to_stderr("%(asctime)s %(name)s: %(message)s")
        self._task, self._options, self._control = task, options, control
        self._serving = ServingConfig.from_json(task.serving)
        self._devices = dict(task.devices)
        self._closing = contextlib.AsyncExitStack()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._failed: asyncio.Future[dict[str, Any]] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._url = ""

    async def start(self) -> tuple[int, dict[str, str]]:
        """Serve the chain and HTTP at free ports. Returns the chain's port, and this node's id and address."""
        torch.set_num_threads(self._options.threads or os.cpu_count() or 1)
        self._failed = asyncio.get_running_loop().create_future()
        serving = self._serving
        folder, ends, drafter = await asyncio.to_thread(self._load)
        self._ends = ends
        hidden_size = folder.config.hidden_size
        self._spans = [
            Span(
                one.first,
                one.last,
                hidden_size,
                chunk=serving.chain.chunk,
                patience=serving.chain.patience,
                tell=self._tell_recovery,
            )
            for one in serving.spans
        ]
        engine = Engine(
            ends,
            self._spans,
            context=serving.limits.context,
            sequences=serving.limits.sequences,
            queue=serving.limits.queue,
            chunk=serving.chain.chunk,
            drafter=drafter,
            exits=parse_exit(serving.drafts.exit_threshold),
        )
        await self._closing.enter_async_context(engine)
        self._servicer = ChainServicer(
            self._task.job,
            serving,
            self._spans,
            folder.config,
            self._task.digests,
            self._task.user_digests,
            self._allowed,
            self._events.put_nowait,
        )
        server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=SERVER_OPTIONS)
        chain_pb2_grpc.add_ChainServicer_to_server(self._servicer, server)
        credentials = server_credentials(self._options.certificate, self._options.key, self._options.ca)
        port = bind_one_of(server, self._options.host, self._options.ports, credentials)
        await server.start()
        self._closing.push_async_callback(server.stop, 1)
        self._closing.callback(self._servicer.close)
        tokenizer = await asyncio.to_thread(folder.tokenizer)
        model = ServedModel(engine, tokenizer, stop_tokens=end_tokens(folder, tokenizer), vocabulary=ends.vocabulary)
        models = {serving.name: model}
        for number, adapter in enumerate(serving.adapters, start=1):
            models[adapter.name] = dataclasses.replace(model, adapter=number)

        def stats() -> dict[str, Any]:
            return {**engine.stats(), "guests": self._servicer.guests.load}

        app = make_app(models, key_sha256=serving.http.key_sha256 or None, stats=stats)
        http = await serve(
            app,
            serving.http.host,
            serving.http.port,
            certificate=serving.http.tls_certificate,
            key=serving.http.tls_key,
        )
        self._closing.push_async_callback(http.close)
        scheme = "https" if serving.http.tls_certificate else "http"
        self._url = f"{scheme}://{join_address(serving.http.host, http.port)}/v1"
        self._tasks = [asyncio.create_task(self._tell_events()), asyncio.create_task(self._tell_when_complete())]
        for span in serving.spans:
            for number in range(span.holders.count(CLOUD)):
                self._tasks.append(asyncio.create_task(self._hold(span, number, port)))
        return port, {"id": ray.get_runtime_context().get_node_id(), "address": ray.util.get_node_ip_address()}

    async def finished(self) -> dict[str, Any]:
        """Wait for a failure: a model is served until somebody cancels. Raises it."""
        assert self._failed is not None
        return await self._failed

    async def resources(self) -> dict[str, Any]:
        """What the model has taken so far, at the gateway, its holders and the devices that use it: JSON-ready."""
        await self._servicer.ledger.ask()
        return self._servicer.ledger.report(self._ends.rows_scored)

    async def start_without(self, missing: list[str]) -> None:
        """Do nothing: a chain waits for its holders whoever is missing."""

    async def allow(self, device: str, serial: str) -> None:
        """Let a device in with this certificate and with no other: one of this job, or one that may use the chain."""
        if self._devices.get(device) != serial:
            self._devices[device] = serial
            self._servicer.drop(device)

    async def revoke(self, device: str) -> None:
        self._devices.pop(device, None)
        self._servicer.drop(device)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._closing.aclose()

    def _load(self) -> tuple[ModelFolder, Ends, Drafter | None]:
        folder, serving = open_model(self._task.model), self._serving
        choice = RuntimeChoice(
            serving.chain.runtime, serving.chain.weights, self._options.device, Path(self._task.cache)
        )
        ends = Ends(folder, choice)
        room = {"context": serving.limits.context, "sequences": serving.limits.sequences}
        return folder, ends, make_drafter(serving.drafts.draft, folder, ends, choice, None, **room)

    def _here(self) -> str:
        """The host under which the gateway's own holders reach it, on this node or on another."""
        everywhere = self._options.host in ("", "0.0.0.0", "::")
        return ray.util.get_node_ip_address() if everywhere else self._options.host

    def _allowed(self, peer: Peer) -> bool:
        if peer.role == STAGE:
            return peer.name == self._task.job
        return peer.role == DEVICE and self._devices.get(peer.name) == peer.serial

    async def _hold(self, span: SpanConfig, number: int, port: int) -> None:
        """Keep one holder actor alive."""
        task = HolderTask(
            job=self._task.job,
            model=self._task.model,
            first=span.first,
            last=span.last,
            digest=self._task.digests[str(span)],
            sequences=self._serving.room,
            tokens=self._serving.limits.context,
            gateway=join_address(self._here(), port),
            threads=self._options.threads,
            device=self._options.device,
            runtime=self._serving.chain.runtime,
            weights=self._serving.chain.weights,
            cache=self._task.cache,
            adapters=tuple((one.name, one.folder) for one in self._serving.adapters),
            ca=self._options.ca,
            certificate=self._options.stage_certificate,
            key=self._options.stage_key,
        )
        backoff = Backoff(_AGAIN, _AT_MOST)
        while True:
            actor: Any = ray.remote(HolderActor).options(num_cpus=0, scheduling_strategy="SPREAD").remote(task)
            began = time.monotonic()
            try:
                pid = await actor.pid.remote()
                self._events.put_nowait(log_line(f"blocks {span}: actor {number}, process {pid}"))
                await actor.run.remote()
                why = "the stream ended"
            except (RayError, IsthmusError) as error:
                why = " ".join(str(error.cause if isinstance(error, RayTaskError) else error).split())[:300]
            finally:
                ray.kill(actor)
            lived = time.monotonic() - began > _SOON
            if lived:
                backoff.reset()
            self._events.put_nowait(log_line(f"blocks {span}: actor {number} died ({why}); again"))
            await asyncio.sleep(0.0 if lived else backoff.wait())

    async def _tell_when_complete(self) -> None:
        """Tell that the model is served, once every span has a holder."""
        for span in self._spans:
            await span.complete()
        self._events.put_nowait(Event(serving=ServingStarted(url=self._url, model=self._serving.name)))

    def _tell_recovery(self, one: Takeover) -> None:
        message = (
            f"blocks {one.span}: {one.holder} took over from {one.lost or 'nobody'}: {one.tokens} tokens of a sequence "
            f"sent again, {one.seconds:.2f} s"
        )
        self._events.put_nowait(Event(took_over=HolderTookOver(message=message, **dataclasses.asdict(one))))

    async def _tell_events(self) -> None:
        while True:
            event = await self._events.get()
            try:
                await self._control.stage_event.remote(self._task.job, event.SerializeToString())
            except Exception as error:  # a full disk, say: what cannot be recorded must not go on unseen
                log.exception("job %s: the coordinator did not take an event", self._task.job)
                assert self._failed is not None
                if not self._failed.done():
                    self._failed.set_exception(IsthmusError(f"the coordinator could not record an event: {error}"))
