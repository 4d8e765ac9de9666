"""A coordinator and device daemons on this machine, each a process of its own: for the demo, benchmarks and tests."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from isthmus.coordinator.connection import Connection, connected
from isthmus.coordinator.emulation import LinkProcess, LinkSpec, Pair, link_process
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError, LinkLost, WrongState

_START_SECONDS = 120.0
_STOP_SECONDS = 30.0
_HERE = "127.0.0.1"
_STAGE_PORTS = (20_000, 32_000)  # below those that Linux gives to connections


def alive_after(processes: Iterable[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Which of the processes have not ended within so many seconds.

    psutil's own `wait_procs` fails where a process ends while it looks: pidfd_open says ENOENT on newer kernels.
    """
    end = time.monotonic() + timeout
    alive = list(processes)
    while True:
        alive = [one for one in alive if _is_alive(one)]
        if not alive or time.monotonic() > end:
            return alive
        time.sleep(0.05)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class LocalCluster:
    """Processes on free loopback ports, with state and logs under `folder`. A context manager: none is left behind.

    A device may have a link of its own to the coordinator. It then knows it by another loopback address, on which an
    emulated link listens on the same ports: control, enrolment, and those that stages may have.
    """

    folder: Path
    coordinator_threads: int = 0
    ports: tuple[int, int] = (0, 0)
    stage_ports: range = range(0)
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    links: dict[str, LinkProcess] = field(default_factory=dict)  # by device
    _open_links: ExitStack = field(default_factory=ExitStack)
    _seen: dict[int, psutil.Process] = field(default_factory=dict)
    _handles_sigterm: bool = False

    @property
    def state(self) -> Path:
        return self.folder / "coordinator"

    @property
    def credentials(self) -> Path:
        return self.state / "admin"

    def __enter__(self) -> LocalCluster:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # which would leave the children behind
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            self._handles_sigterm = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._handles_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def start_coordinator(
        self, *, port: int = 0, enrolment_port: int = 0, stage_ports: int = 0, arguments: Sequence[str] = ()
    ) -> dict[str, Any]:
        """`isthmus up`; returns what it says when it is ready.

        stage_ports: how many stages there may be at a time, where devices have links of their own; a coordinator that
        is started again keeps its ports for them.
        """
        command = [sys.executable, "-m", "isthmus.coordinator.cli.main", "up", "--state-dir", str(self.state)]
        if stage_ports and not self.stage_ports:
            self.stage_ports = _free_ports(stage_ports)
        if self.stage_ports:
            command += ["--stage-ports", f"{self.stage_ports[0]}-{self.stage_ports[-1]}"]
        command += ["--host", _HERE, "--port", str(port), "--enrolment-port", str(enrolment_port), "--json"]
        command += ["--threads", str(self.coordinator_threads)]
        process = self._spawn("coordinator", [*command, *arguments], stdout=subprocess.PIPE)
        line = _first_line(process, _START_SECONDS)
        if line is None:
            last = self.last_line("coordinator")
            raise LinkLost(f"the coordinator did not start: {last}")
        started: dict[str, Any] = json.loads(line)
        self.ports = (started["port"], started["enrolment_port"])
        self._remember(process.pid)
        return started

    def connect(self) -> Any:
        """A context with the user's Connection."""
        return connected(self.credentials, "")

    def token(self, name: str) -> str:
        with self.connect() as connection:
            return str(connection.stub.CreateToken(pb.CreateTokenRequest(name=name)).token)

    def start_device(
        self,
        name: str,
        data: Mapping[str, Path],
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        enrolled: bool = False,
        link: LinkSpec | None = None,
        host: str = _HERE,
    ) -> subprocess.Popen[str]:
        """`isthmus-client run`, with a fresh token in its environment unless it is enrolled already.

        link: that it reaches the coordinator by, a process of its own; once it has one it keeps it. host: under which
        the device knows the coordinator, where the caller has made a link there.
        """
        if link is not None:
            host = self._link_to(name, link)
        command = [sys.executable, "-m", "isthmus.client.cli", "run", "--state-dir", str(self.folder / name)]
        for dataset, path in data.items():
            command += ["--data", f"{dataset}={path}"]
        variables = dict(environment or {})
        if not enrolled:
            variables["ISTHMUS_TOKEN"] = self.token(name)  # not on the command line, which every user can read
            variables["ISTHMUS_COORDINATOR"] = f"{host}:{self.ports[0]}"
        return self._spawn(name, [*command, *arguments], environment=variables)

    def link_pairs(self, host: str) -> list[Pair]:
        """What a link has to carry for a device that knows the coordinator as `host`. Raises WrongState where this
        system has no such address."""
        if not self.stage_ports:
            raise WrongState("stages may listen on any port: start the coordinator with stage_ports for a link to them")
        try:
            socket.create_server((host, 0)).close()
        except OSError as error:
            raise WrongState(
                f"a link for each device needs loopback addresses of its own, and {host} cannot be listened on here "
                f"({error.strerror}): Linux has all of 127.0.0.0/8; leave the link out on other systems"
            ) from None
        return [((host, port), (_HERE, port)) for port in (*self.ports, *self.stage_ports)]

    def _link_to(self, device: str, spec: LinkSpec) -> str:
        """The host under which the device reaches the coordinator through a link of its own, started if need be."""
        if device not in self.links:
            pairs = self.link_pairs(f"127.0.0.{2 + len(self.links)}")
            log = self.log(f"link-{device}")
            log.parent.mkdir(parents=True, exist_ok=True)
            self.links[device] = self._open_links.enter_context(link_process(spec, pairs, log))
            self._remember(self.links[device].pid)
        return self.links[device].addresses[0][0]

    def wait_connected(self, names: Sequence[str], seconds: float = _START_SECONDS) -> None:
        """Until the devices are connected. Raises LinkLost naming one that has ended or does not come."""
        deadline = time.monotonic() + seconds
        with self.connect() as connection:
            while True:
                listed = connection.stub.ListDevices(pb.ListDevicesRequest()).devices
                missing = set(names) - {device.name for device in listed if device.connected}
                if not missing:
                    return
                for name in sorted(missing):
                    if self.processes[name].poll() is not None:
                        raise LinkLost(f"device {name} has ended: {self.last_line(name)}")
                if time.monotonic() > deadline:
                    raise LinkLost(f"devices did not connect: {', '.join(sorted(missing))}")
                time.sleep(0.1)

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def last_line(self, name: str) -> str:
        lines = self.log(name).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one process by its pid, and waits for its end."""
        process = self.processes.pop(name)
        self._remember(process.pid)
        process.send_signal(number)
        process.wait(_STOP_SECONDS)

    def stop(self) -> None:
        """Ends everything: politely, then not. Waits until none of the processes or their children is left."""
        for process in self.processes.values():
            self._remember(process.pid)
        for name in [*(n for n in self.processes if n != "coordinator"), "coordinator"]:
            running = self.processes.get(name)
            if running is not None and running.poll() is None:
                running.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self.processes.clear()
        self._open_links.close()
        left = alive_after(self._seen.values(), 10)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        alive_after(left, 10)
        self._seen.clear()

    def _spawn(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> subprocess.Popen[str]:
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        with self.log(name).open("a") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout or log, stderr=log, text=True, env=variables,
                start_new_session=True,  # Ctrl-C is the parent's to handle: it ends its children in order
            )  # fmt: skip
        self.processes[name] = process
        return process

    def _remember(self, pid: int) -> None:
        """The process and its present children (Ray's), so that stop() can wait for them all."""
        try:
            process = psutil.Process(pid)
            for one in [process, *process.children(recursive=True)]:
                self._seen[one.pid] = one
        except psutil.NoSuchProcess:
            return


def submit(connection: Connection, spec: pb.JobSpec, resume: str = "") -> pb.Job:
    """Submits a job, or goes on with one."""
    job: pb.Job = connection.stub.SubmitJob(pb.SubmitJobRequest(spec=None if resume else spec, resume=resume))
    return job


def wait_for_job(connection: Connection, job: str) -> dict[str, Any]:
    """The report of a job once it is done. Raises IsthmusError with its message when it ends otherwise."""
    for _ in connection.stub.WatchJob(pb.WatchJobRequest(id=job)):
        pass
    ended = connection.stub.GetJob(pb.JobRequest(id=job))
    if ended.state != pb.SUCCEEDED:
        raise IsthmusError(f"job {job} {pb.JobState.Name(ended.state).lower()}: {ended.message}")
    report: dict[str, Any] = json.loads(ended.report)
    return report


def events_of(connection: Connection, job: str, kind: str = "", *, timeout: float | None = None) -> list[pb.Event]:
    """All events of a job that has ended, or those of a kind. timeout: seconds."""
    events = connection.stub.WatchJob(pb.WatchJobRequest(id=job), timeout=timeout)
    return [event for event in events if not kind or event.WhichOneof("kind") == kind]


def _free_ports(count: int) -> range:
    """So many ports one after the other, free on every loopback address. Raises WrongState."""
    for _ in range(100):
        first = random.randrange(_STAGE_PORTS[0], _STAGE_PORTS[1] - count)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("0.0.0.0", port)))
            except OSError:
                continue
            return range(first, first + count)
    raise WrongState(f"no {count} free ports from {_STAGE_PORTS[0]} to {_STAGE_PORTS[1]}")


def _first_line(process: subprocess.Popen[str], seconds: float) -> str | None:
    """The first line of JSON that the process prints; None if it ends or takes too long."""
    assert process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                lines.put(line)
                break
        else:
            lines.put(None)
        for _ in process.stdout:  # an unread pipe would fill and stop the process
            pass

    threading.Thread(target=read, daemon=True).start()
    try:
        return lines.get(timeout=seconds)
    except queue.Empty:
        return None
