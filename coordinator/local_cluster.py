"""A coordinator and device daemons on this machine, each a process of its own: for the demo, benchmarks and tests."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from coordinator.cli.common import Connection, connected
from protos.v1 import coordinator_pb2 as pb
from split.errors import IsthmusError, LinkLost

_START_SECONDS = 120.0
_STOP_SECONDS = 30.0


@dataclass
class LocalCluster:
    """Processes on free loopback ports, with state and logs under `folder`. A context manager: none is left behind."""

    folder: Path
    coordinator_threads: int = 0
    ports: tuple[int, int] = (0, 0)
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
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
        self, *, port: int = 0, enrolment_port: int = 0, arguments: Sequence[str] = ()
    ) -> dict[str, Any]:
        """`isthmus up`; returns what it says when it is ready."""
        command = [sys.executable, "-m", "coordinator.cli.main", "up", "--state-dir", str(self.state)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--enrolment-port", str(enrolment_port), "--json"]
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
    ) -> subprocess.Popen[str]:
        """`isthmus-client run`, with a fresh token in its environment unless it is enrolled already."""
        command = [sys.executable, "-m", "client.cli", "run", "--state-dir", str(self.folder / name)]
        for dataset, path in data.items():
            command += ["--data", f"{dataset}={path}"]
        variables = dict(environment or {})
        if not enrolled:
            variables["ISTHMUS_TOKEN"] = self.token(name)  # not on the command line, which every user can read
            variables["ISTHMUS_COORDINATOR"] = f"127.0.0.1:{self.ports[0]}"
        return self._spawn(name, [*command, *arguments], environment=variables)

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
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=10)
        for left in alive:
            left.kill()
        psutil.wait_procs(alive, timeout=10)
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
