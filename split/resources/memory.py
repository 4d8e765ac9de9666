"""The most memory that this process has had, by the operating system's count and by the accelerator's allocator."""

from __future__ import annotations

from pathlib import Path

import torch


def peak_bytes() -> int:
    """The largest resident memory that this process has had, in bytes.

    It is read from /proc, because getrusage's maximum is inherited from the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: memory cannot be measured on this system")


def accelerator_peak_bytes() -> int:
    """The most bytes that torch has had allocated on the accelerator; 0 where it has used none."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
