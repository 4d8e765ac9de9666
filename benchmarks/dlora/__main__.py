"""`python -m benchmarks.dlora`: see kill_and_revive.py."""

from __future__ import annotations

from benchmarks.dlora.kill_and_revive import main
from benchmarks.harness import command

if __name__ == "__main__":
    command(main)
