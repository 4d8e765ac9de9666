"""What the cluster tests share: texts, jobs, and waiting for what a job does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import psutil
import torch

from isthmus.client.identity import Identity
from isthmus.coordinator.cli import main as cli
from isthmus.coordinator.connection import Connection
from isthmus.coordinator.emulation import local_cluster
from isthmus.coordinator.emulation.local_cluster import LocalCluster, submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.job.config import TrainingConfig
from isthmus.split.tls import Credentials

LIMIT = 120.0  # seconds for anything that a test waits for; nothing takes as long on an idle machine

TINY = TrainingConfig.of(
    steps=12,
    batch_size=2,
    sequence_length=16,
    precision="float32",
    codec="none",
    micro_batches=1,
    aggregate_every=2,
    checkpoint_every=4,
    validation_fraction=0.2,
)


@dataclass(frozen=True)
class House:
    """A running coordinator and its devices."""

    cluster: LocalCluster
    model: Path
    texts: dict[str, Path]  # by device

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        with self.cluster.connect() as connection:
            yield connection

    def identity(self, device: str) -> Identity:
        identity = Identity.open(self.cluster.folder / device)
        assert identity is not None
        return identity

    @property
    def user(self) -> Credentials:
        return Credentials.load(self.cluster.credentials)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.cluster.ports[0]}"

    def submit(
        self,
        connection: Connection,
        config: TrainingConfig,
        devices: Sequence[str],
        *,
        dataset: str = "notes",
        model: Path | None = None,
        wait: float = LIMIT,
    ) -> str:
        spec = pb.JobSpec(
            method=config.method,
            model=str(model or self.model),
            dataset=dataset,
            devices=devices,
            training=config.to_json(),
            wait_seconds=wait,
        )
        return submit(connection, spec).id

    def start(self, *devices: str, **settings: Any) -> None:
        """Starts what is not running, and waits until all of the devices are connected."""
        coordinator = self.cluster.processes.get("coordinator")
        if coordinator is None or coordinator.poll() is not None:
            port, enrolment_port = self.cluster.ports
            self.cluster.start_coordinator(port=port, enrolment_port=enrolment_port)
        for name in devices:
            process = self.cluster.processes.get(name)
            if process is None or process.poll() is not None:
                enrolled = (self.cluster.folder / name / "coordinator.json").exists()
                chosen = {"arguments": ["--threads", "1"], **settings}
                self.cluster.start_device(name, {"notes": self.texts[name]}, enrolled=enrolled, **chosen)
        self.cluster.wait_connected(devices)

    def stage(self) -> psutil.Process:
        """Of the only job at work; those of earlier ones may take a moment to end."""
        coordinator = psutil.Process(self.cluster.processes["coordinator"].pid)
        found: list[psutil.Process] = []

        def one_is_left() -> bool:
            children = coordinator.children(recursive=True)
            found[:] = [child for child in children if "StageActor" in " ".join(_command(child))]
            return len(found) == 1

        wait_for(one_is_left, "one stage is left")
        return found[0]

    @contextlib.contextmanager
    def stopped(self, device: str) -> Iterator[None]:
        """The device stands still."""
        process = self.cluster.processes[device]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def cancel_all(self) -> None:
        """Cancels what a test, perhaps one that failed, has left at work."""
        with self.connect() as connection:
            for job in connection.stub.ListJobs(pb.ListJobsRequest()).jobs:
                if job.state in (pb.WAITING, pb.PREPARING, pb.RUNNING):
                    connection.stub.CancelJob(pb.JobRequest(id=job.id))

    def cli(self, *arguments: str) -> tuple[int, str, str]:
        """`isthmus ARGUMENTS` in this process (an interpreter with torch takes seconds to start)."""
        words = [*arguments, "--credentials", str(self.cluster.credentials)]
        return run_cli(*words)


def _command(process: psutil.Process) -> list[str]:
    """Empty once it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def run_cli(*arguments: str, main: Callable[[], None] = cli.main, text: str = "") -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `isthmus ARGUMENTS`, or of another program's entry point.

    text: its standard input. What it does to the environment and to torch's threads ends with it.
    """
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with mock.patch.object(sys, "argv", ["isthmus", *arguments]), mock.patch.object(sys, "stdin", io.StringIO(text)):
        try:
            with mock.patch.dict(os.environ), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            torch.set_num_threads(threads)
    return status, out.getvalue(), err.getvalue()


def write_text(path: Path, device: int, paragraphs: int = 40) -> Path:
    """A device's own text, of paragraphs that no other device has."""
    lines = [
        f"Bridge {device}-{i} carries {i * 7919 % 997} boats and {i * 31 % 101} carts a day." for i in range(paragraphs)
    ]
    path.write_text("\n\n".join(lines) + "\n")
    return path


def events_until(connection: Connection, job: str, wanted: Callable[[pb.Event], bool], after: int = 0) -> pb.Event:
    """Follows a job to the first event that is wanted. Fails when the job ends, or LIMIT passes, before it."""
    call = connection.stub.WatchJob(pb.WatchJobRequest(id=job, after=after), timeout=LIMIT)
    for event in call:
        if wanted(event):
            call.cancel()
            return event
    ended = connection.stub.GetJob(pb.JobRequest(id=job))
    raise AssertionError(f"the job ended first: {pb.JobState.Name(ended.state)}: {ended.message}")


def step_reached(connection: Connection, job: str, step: int, after: int = 0) -> pb.Event:
    return events_until(connection, job, lambda event: event.HasField("step") and event.step.step >= step, after)


def ended(connection: Connection, job: str) -> pb.Job:
    """The job once it has ended, however that was."""
    for _ in connection.stub.WatchJob(pb.WatchJobRequest(id=job), timeout=LIMIT):
        pass
    return connection.stub.GetJob(pb.JobRequest(id=job))


def succeeded(connection: Connection, job: str) -> dict[str, Any]:
    """The report of a job that has to end well."""
    last = ended(connection, job)
    assert last.state == pb.SUCCEEDED, f"{pb.JobState.Name(last.state)}: {last.message}"
    return json.loads(last.report)


def events_of(connection: Connection, job: str, kind: str = "") -> list[pb.Event]:
    """All events of a job that has ended, or those of a kind."""
    return local_cluster.events_of(connection, job, kind, timeout=LIMIT)


def wait_for(condition: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
    """Until the condition holds; asks every few milliseconds."""
    tick = threading.Event()
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit:.0f} s: {what}"
        tick.wait(0.02)


def refusal(call: Callable[[], Any]) -> grpc.RpcError:
    """The error with which a call is refused."""
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("it was not refused")
