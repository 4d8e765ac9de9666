"""`python -m benchmarks.NAME` in this process: an interpreter with torch takes seconds to start."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from typing import Any

import pytest

from benchmarks import harness
from tests.cluster.house import run_cli

RUNS_APART = pytest.mark.parametrize(
    "apart", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["threads", "processes"]
)


def run_benchmark(name: str, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    main: Callable[[], Any] = lambda: runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)  # noqa: E731
    return run_cli(*arguments, main=main)


def run_benchmark_of_runs(name: str, *arguments: str, apart: bool) -> tuple[int, str, str]:
    """Of one that makes its runs in processes of their own. apart: in these, and else in threads of this process."""
    if apart:
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "ProcessPoolExecutor", lambda *_, **__: futures.ThreadPoolExecutor(1))
        return run_benchmark(name, *arguments)
