"""Training runs that take turns of a few steps, each with its processes stopped while another computes.

Two runs that are timed in turns see the same machine, whatever else it does: the ratio of two turns beside each other
means more than that of two runs one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection as Pipe
from typing import Any

from benchmarks.common import quieten
from isthmus.coordinator.connection import Connection
from isthmus.coordinator.emulation.local_cluster import LocalCluster
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError

Turns = Sequence[tuple[Sequence[float], Sequence[float]]]  # seconds of the steps: unsplit, and of the variant beside it


class Run:
    """A training run that goes on only in its turns: in between, its processes `pids` are stopped.

    times: when each of its steps was done, in seconds, as they come; an error where it ended otherwise.
    """

    def __init__(self, pids: Sequence[int], times: queue.SimpleQueue[float | IsthmusError]) -> None:
        self.pids, self._times = pids, times

    def turn(self, steps: int) -> list[float]:
        """How long each of `steps` whole steps took. The one that was under way when it was stopped is not counted."""
        while not self._times.empty():
            self._next()
        self.go_on()
        times = [self._next() for _ in range(steps + 1)]
        self._signal(signal.SIGSTOP)
        return [after - before for before, after in pairwise(times)]

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _next(self) -> float:
        time_or_error = self._times.get()
        if isinstance(time_or_error, IsthmusError):
            raise time_or_error
        return time_or_error

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, number)


@contextmanager
def child(train: Callable[..., None], *arguments: Any) -> Iterator[Run]:
    """A run in a process of its own, on this machine's processors alone. `train` calls its last argument every step."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_report_steps, args=(sender, train, *arguments))
    process.start()
    sender.close()
    times: queue.SimpleQueue[float | IsthmusError] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                times.put(receiver.recv())
        except EOFError:
            times.put(IsthmusError(f"the run of {train.__name__} ended before its last turn"))

    threading.Thread(target=read, daemon=True).start()
    assert process.pid is not None
    try:
        yield Run([process.pid], times)
    finally:
        process.kill()
        process.join()


def _report_steps(sender: Pipe, train: Callable[..., None], *arguments: Any) -> None:
    quieten()
    train(*arguments, lambda: sender.send(time.time()))


@contextmanager
def over_grpc(cluster: LocalCluster, connection: Connection, devices: Sequence[str], job: str) -> Iterator[Run]:
    """A job of `devices` on the cluster, cancelled at the end. Between its turns they are stopped: its stage waits."""
    times: queue.SimpleQueue[float | IsthmusError] = queue.SimpleQueue()

    def watch() -> None:
        for event in connection.stub.WatchJob(pb.WatchJobRequest(id=job)):
            if event.HasField("step"):
                times.put(event.time)
        times.put(IsthmusError(f"job {job} ended before its last turn"))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    run = Run([cluster.processes[name].pid for name in devices], times)
    try:
        yield run
    finally:
        run.go_on()  # a stopped process does not hear that it is to end
    connection.stub.CancelJob(pb.JobRequest(id=job))
    watching.join()


def take_turns(unsplit: Run, variant: Run, rounds: int, steps: int) -> Turns:
    """A turn of each in every round; who begins changes from round to round. The first turns are not counted."""
    turns = []
    for number in range(rounds + 1):
        if number % 2 == 0:
            yardstick = unsplit.turn(steps)
            turns.append((yardstick, variant.turn(steps)))
        else:
            seconds = variant.turn(steps)
            turns.append((unsplit.turn(steps), seconds))
    return turns[1:]
