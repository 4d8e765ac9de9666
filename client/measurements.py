"""Measurements of what this device can do, made while it has no task.

The link to the coordinator is measured in every session and now and then again. The speed of training is measured once
for each start of the daemon; the speed of decoding, for served models, once and kept in the state folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isthmus.client.identity import Identity
from isthmus.client.runner import SERVE, DeviceOptions
from isthmus.split.errors import IsthmusError
from isthmus.split.link.profile import LinkProfile
from isthmus.split.methods import METHODS
from isthmus.split.plan.link_probe import measure_link
from isthmus.split.runtime.speed import (
    Speed,
    Stopped,
    accelerator_bytes,
    kept_speeds,
    kinds,
    measure_speeds,
    speed_to_proto,
)
from isthmus.split.runtime.training_speed import measure_training
from isthmus.split.tls import channel

log = logging.getLogger(__name__)

_IDLE = 2.0  # seconds after which a task that was waiting for this device would have come
_POLL = 0.1  # seconds between looks at a process that measures
_AGAIN = 600.0  # seconds between measurements of the link


class DeviceMeasurements:
    """Measures for what the owner allows. Speeds of decoding are kept in the state folder."""

    def __init__(self, identity: Identity, options: DeviceOptions) -> None:
        self._identity, self._options = identity, options
        self._path = options.state / "speed.json"
        self._serves, self._trains = SERVE in options.allow, bool(METHODS.keys() & set(options.allow))
        self._speeds = kept_speeds(self._path, options.device, options.threads) if self._serves else []
        self._training = 0.0  # FLOP/s; 0 until it is measured
        self._link: LinkProfile | None = None

    def told(self) -> dict[str, Any]:
        """The fields of a Profile for what is known so far."""
        return {
            "speeds": map(speed_to_proto, self._speeds),
            "link": None if self._link is None else self._link.to_proto(),
            "accelerator_bytes": accelerator_bytes(self._options.device) if self._serves or self._trains else 0,
            "training_flops": self._training,
        }

    async def news(self, busy: Callable[[], bool]) -> AsyncIterator[None]:
        """Yields whenever there is something new to tell. Measuring is given up, for now, when the device becomes busy.

        busy: whether the device has a task.
        """
        while self._serves or self._trains:
            await asyncio.sleep(_IDLE)
            if busy():
                continue
            ended = threading.Event()
            try:
                await asyncio.to_thread(self._measure, partial(_any, ended.is_set, busy))
            except Stopped:
                continue
            except (IsthmusError, OSError) as error:  # an older coordinator, or a full disk: no task depends on it
                log.info("not measured: %s", error)
            except Exception:  # too little memory, or a bug
                log.exception("this device could not be measured")
            finally:
                ended.set()  # even where this session has ended, and nobody waits any more
            yield
            await asyncio.sleep(_AGAIN)

    def _measure(self, stop: Callable[[], bool]) -> None:
        options = self._options
        if self._trains and not self._training:
            self._training = measure_training_apart(options, stop=stop)
            log.info("training: %.3g GFLOP/s", self._training / 1e9)
        if self._serves and len(self._speeds) < len(kinds(options.device)):
            self._speeds = measure_apart(self._path, options.device, options.threads, stop=stop)
            log.info("decoding: %s", "; ".join(map(str, self._speeds)))
        with channel(self._identity.address, self._identity.credentials) as opened:
            self._link = measure_link(opened, stop=stop)
        log.info("the link to the coordinator: %s", self._link)


def measure_apart(path: Path, device: str, threads: int, *, stop: Callable[[], bool]) -> list[Speed]:
    """Measures as `measure_speeds` does, in a process of its own, whose memory goes with it and is no task's.

    stop: whether to give up.

    Raises Stopped when told to give up, and IsthmusError when the process fails.
    """
    _apart(["speeds", device, str(threads), str(path)], stop)
    return kept_speeds(path, device, threads)


def measure_training_apart(options: DeviceOptions, *, stop: Callable[[], bool]) -> float:
    """FLOP/s as `measure_training` returns it, measured in a process of its own. Raises Stopped and IsthmusError."""
    return float(_apart(["training", options.device, str(options.threads), str(options.slow_down)], stop))


def _apart(arguments: Sequence[str], stop: Callable[[], bool]) -> str:
    """Runs `main` with these arguments in a process, and returns what it prints. Raises Stopped and IsthmusError."""
    command = [sys.executable, "-m", "isthmus.client.measurements", *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                if stop():
                    raise Stopped
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
        finally:
            process.terminate()  # it removes what it has on disk
        printed = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise IsthmusError(f"the process that measures ended with status {process.returncode}")
    return printed


def _any(*conditions: Callable[[], bool]) -> bool:
    return any(condition() for condition in conditions)


def main(what: str, device: str, threads: str, rest: str) -> None:
    """Measures in the process that `_apart` starts, and ends with whoever started it.

    what: "speeds" or "training".
    rest: a file for speeds, or the factor by which to slow down.
    """
    ended, parent = threading.Event(), os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    if int(threads):
        torch.set_num_threads(int(threads))

    def stop() -> bool:
        return ended.is_set() or os.getppid() != parent

    with contextlib.suppress(Stopped):
        if what == "training":
            print(measure_training(device, slow_down=float(rest), stop=stop))
        else:
            measure_speeds(Path(rest), device, int(threads), stop=stop)


if __name__ == "__main__":
    main(*sys.argv[1:])
