"""A coordinator and devices as threads of this process: all of their code, gRPC and TLS included, without interpreters.

Ray's actors are objects here, and their methods run on one event loop. What ends a process cannot be shown this way:
such tests are marked `processes` and get real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import typer
from ray.exceptions import RayActorError, RayTaskError

from isthmus.client import measurements
from isthmus.client.cli import _files, _folders, _kinds
from isthmus.client.cli import app as client_app
from isthmus.client.daemon import Daemon
from isthmus.client.identity import Identity, enrol
from isthmus.client.runner import TASK_KINDS, DeviceOptions
from isthmus.coordinator import actor as control
from isthmus.coordinator.actor import ControlActor, ControlOptions
from isthmus.coordinator.cli.main import app as coordinator_app
from isthmus.coordinator.cli.up import _port_range
from isthmus.coordinator.emulation import local_cluster
from isthmus.coordinator.emulation.local_cluster import LocalCluster
from isthmus.coordinator.gateway import actor as gateway_actor
from isthmus.coordinator.jobs import driver
from isthmus.coordinator.stages import stage_actor
from isthmus.split.errors import IsthmusError, NotEnrolled
from isthmus.split.runtime import speed
from isthmus.split.runtime.speed import measure_speeds
from isthmus.split.runtime.training_speed import measure_training

_LIMIT = 120.0  # seconds
_POLITE = (signal.SIGTERM, signal.SIGINT)

_actor: ContextVar[Actor] = ContextVar("actor")  # the one whose method runs
_device: ContextVar[str] = ContextVar("device")  # the one whose daemon runs


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(64))  # holders of blocks keep a thread each
        self._thread = threading.Thread(target=self._loop.run_forever, name="house", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Returns a concurrent.futures.Future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.start(coroutine).result(_LIMIT)

    def soon(self, call: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(call)

    def close(self) -> None:
        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.run(end())
        self.soon(self._loop.stop)
        self._thread.join(_LIMIT)
        self._loop.close()


class Actor:
    """A handle: `await actor.method.remote(...)`, as of Ray. A cancelled caller does not cancel the method."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance
        self._calls: set[asyncio.Task[Any]] = set()
        self._dead = self._stopped = False

    def __getattr__(self, name: str) -> _Remote:
        return _Remote(lambda *arguments: self._start(name, arguments))

    def _start(self, name: str, arguments: Sequence[Any]) -> Awaitable[Any]:
        task = asyncio.get_running_loop().create_task(self._call(name, arguments))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return asyncio.shield(task)

    async def _call(self, name: str, arguments: Sequence[Any]) -> Any:
        if self._dead:
            raise RayActorError
        self._stopped = self._stopped or name == "stop"
        _actor.set(self)
        try:
            return await _as_ray_raises(getattr(self._instance, name)(*arguments), name)
        except asyncio.CancelledError:
            if self._dead:
                raise RayActorError from None
            raise

    def kill(self) -> None:
        if self._dead:
            return
        self._dead = True
        for call in self._calls:
            call.cancel()
        if not self._stopped and hasattr(self._instance, "stop"):  # a process would take its servers with it
            self._ending = asyncio.get_running_loop().create_task(self._instance.stop())


async def _as_ray_raises(running: Awaitable[Any], name: str) -> Any:
    try:
        return await running
    except Exception as error:
        raise RayTaskError(name, traceback.format_exc(), error).as_instanceof_cause() from error


@dataclass(frozen=True)
class _Remote:
    """What `ray.remote` gives, and a method of an actor."""

    call: Callable[..., Any]

    def options(self, **_: Any) -> _Remote:
        return self

    def remote(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class _Ray:
    """What the coordinator's modules use of Ray."""

    util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    @staticmethod
    def get_runtime_context() -> SimpleNamespace:
        return SimpleNamespace(get_node_id=lambda: "here", current_actor=_actor.get(None))

    @staticmethod
    def kill(actor: Actor) -> None:
        actor.kill()

    @staticmethod
    def remote(made: Any) -> _Remote:
        if isinstance(made, type):
            return _Remote(lambda *arguments: Actor(made(*arguments)))
        return _Remote(lambda *arguments: _started(_as_ray_raises(asyncio.to_thread(made, *arguments), made.__name__)))


def _started(call: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
    return asyncio.shield(asyncio.get_running_loop().create_task(call))


def _measure(arguments: Sequence[str], stop: Callable[[], bool]) -> str:
    """As isthmus.client.measurements does in a process of its own."""
    what, device, threads, rest = arguments
    if what == "training":
        return str(measure_training(device, slow_down=float(rest), stop=stop))
    measure_speeds(Path(rest), device, int(threads), stop=stop)
    return ""


@contextlib.contextmanager
def quick_measurements() -> Iterator[None]:
    """Blocks that are measured are narrow ones: a tenth of a second and not twenty."""
    with mock.patch.multiple(speed, _WIDE=128, _LEAST=2**20, _cache_bytes=lambda: 0):
        yield


class Running:
    """A device or coordinator at work: what is asked of a subprocess.Popen."""

    stdout = None

    def __init__(self, loop: Loop, main: Coroutine[Any, Any, int], stop: Callable[[], object]) -> None:
        self._loop, self._stop = loop, stop
        self._ended = loop.start(main)

    def poll(self) -> int | None:
        return int(self._ended.result()) if self._ended.done() else None

    def wait(self, timeout: float = _LIMIT) -> int:
        return int(self._ended.result(timeout))

    def send_signal(self, number: int) -> None:
        assert number in _POLITE, "no process can be killed or halted here: mark the test with `processes`"
        self._loop.soon(self._stop)


class _Log(logging.Handler):
    """Writes what a device's daemon says into the device's log."""

    def __init__(self, cluster: InProcessCluster) -> None:
        super().__init__(logging.INFO)
        self._cluster = cluster

    def emit(self, record: logging.LogRecord) -> None:
        name = _device.get("") or self._cluster.device_of(threading.current_thread())
        if name in self._cluster.processes:
            with self._cluster.log(name).open("a") as file:
                file.write(self.format(record) + "\n")


@dataclass
class InProcessCluster(LocalCluster):
    """A LocalCluster of threads."""

    daemons: dict[str, Daemon] = field(default_factory=dict)
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> InProcessCluster:
        self._loop = Loop()
        for module in (control, driver, stage_actor, gateway_actor):
            self._undo.enter_context(mock.patch.object(module, "ray", _Ray))
        self._undo.enter_context(mock.patch.object(measurements, "_apart", _measure))
        self._undo.enter_context(quick_measurements())
        logger, handler = logging.getLogger("isthmus.client"), _Log(self)
        self._undo.callback(logger.setLevel, logger.level)
        self._undo.callback(logger.removeHandler, handler)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        return self

    def start_coordinator(
        self, *, port: int = 0, enrolment_port: int = 0, stage_ports: int = 0, arguments: Sequence[str] = ()
    ) -> dict[str, Any]:
        if stage_ports and not self.stage_ports:
            self.stage_ports = local_cluster._free_ports(stage_ports)
        given = _parsed(coordinator_app, "up", arguments)
        ports = (self.stage_ports[0], self.stage_ports[-1]) if self.stage_ports else _port_range(given["stage_ports"])
        options = ControlOptions(
            str(self.state),
            "127.0.0.1",
            port,
            enrolment_port,
            given["advertise"],
            self.coordinator_threads,
            given["device"],
            ports,
            given["slow_down"],
        )
        actor, stopping = Actor(ControlActor(options)), asyncio.Event()

        async def start() -> Any:
            return await actor.start.remote()

        async def until_stopped() -> int:
            await stopping.wait()
            await actor.stop.remote()
            return 0

        started: dict[str, Any] = self._loop.run(start())
        self.ports = (started["port"], started["enrolment_port"])
        self.processes["coordinator"] = Running(self._loop, until_stopped(), stopping.set)  # type: ignore[assignment]
        return started

    def device_of(self, thread: threading.Thread) -> str:
        """Of the device whose task runs in this thread; empty for other threads."""
        owners = (name for name, daemon in self.daemons.items() if thread in daemon._runners.values())
        return next(owners, "")

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        running = self.processes.pop(name)
        running.send_signal(number)
        running.wait(_LIMIT)

    def stop(self) -> None:
        with self._undo:
            for name in [*(name for name in self.processes if name != "coordinator"), "coordinator"]:
                if name in self.processes:
                    self.kill(name, signal.SIGTERM)
            self._open_links.close()
            self._loop.close()

    def _spawn(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> subprocess.Popen[str]:
        """A device: of its command, what follows `run` counts."""
        given, variables = _parsed(client_app, "run", command[command.index("run") + 1 :]), dict(environment or {})
        options = DeviceOptions(
            state=Path(given["state_dir"]),
            data=_files(given["data"] or []),
            models=_folders(given["model"] or []),
            allow=_kinds(given["allow"], TASK_KINDS),
            device=given["device"],
            threads=given["threads"],
            slow_down=given["slow_down"],
        )
        address, token = variables.get("ISTHMUS_COORDINATOR", ""), variables.get("ISTHMUS_TOKEN", "")
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        self.log(name).touch()
        running: Any = Running(
            self._loop, self._serve(name, options, address, token), lambda: self.daemons[name].stop()
        )
        self.processes[name] = running
        return running  # type: ignore[no-any-return]

    async def _serve(self, name: str, options: DeviceOptions, address: str, token: str) -> int:
        """As `isthmus-client run` does; returns its exit status."""
        _device.set(name)
        log = logging.getLogger("isthmus.client")
        try:
            try:
                identity = await asyncio.to_thread(Identity.open, options.state)
                if identity is not None:
                    await self._run(name, identity, options)
            except NotEnrolled:
                if not token:
                    raise
                identity = None
            if identity is None:
                await self._run(name, await asyncio.to_thread(enrol, options.state, address, token), options)
            log.info("left the coordinator")
            return 0
        except IsthmusError as error:
            log.error("isthmus-client: %s", error)
            return 1

    async def _run(self, name: str, identity: Identity, options: DeviceOptions) -> None:
        self.daemons[name] = daemon = Daemon(identity, options)
        await daemon.run()


def _parsed(app: typer.Typer, command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Options of a command, with its defaults."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands[command].make_context(command, list(arguments)).params)
