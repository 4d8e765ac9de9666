"""Measurements of what this coordinator can do for a served model, in a process like those of its holders."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.plan.link_probe import measure_link
from isthmus.split.runtime.speed import accelerator_bytes, measure_speeds, speed_to_proto
from isthmus.split.runtime.training_speed import measure_training
from isthmus.split.tls import Credentials, channel


@dataclass(frozen=True)
class MeasureTask:
    """What the measuring process is told, as plain values, for they travel through Ray.

    file: where speeds are kept.
    keep: whether to keep them there for ever.
    """

    file: str
    keep: bool
    threads: int  # 0: all cores
    device: str
    control: str  # HOST:PORT of the control service
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


def measure_training_here(threads: int, device: str, slow_down: float) -> float:
    """FLOP/s of training in a process like a stage actor's."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    return measure_training(device, slow_down=slow_down)


def measure_node(task: MeasureTask) -> bytes:
    """A serialised Profile: memory, speeds, and the link to the control service, as if to a gateway."""
    torch.set_num_threads(task.threads or os.cpu_count() or 1)
    speeds = measure_speeds(Path(task.file), task.device, task.threads, keep=task.keep)
    with channel(task.control, Credentials(task.ca, task.certificate, task.key)) as opened:
        link = measure_link(opened)
    return pb.Profile(
        memory_bytes=psutil.virtual_memory().total,
        accelerator_bytes=accelerator_bytes(task.device),
        speeds=map(speed_to_proto, speeds),
        link=link.to_proto(),
    ).SerializeToString()
