"""What the report of a job says of a device that ended without its own."""

from __future__ import annotations

from isthmus.coordinator.cli.watch import _shown
from isthmus.coordinator.jobs.report import _device_row

_TRAFFIC = [{"direction": "received", "payload_bytes": 5, "overhead_bytes": 1}]


def test_a_device_that_did_not_report_has_unknown_figures_and_not_zeros() -> None:
    row = _device_row("b", {"traffic": {"b": _TRAFFIC}, "resources": {}})
    figures = {"bytes_sent": 6, "bytes_received": 0, "peak_bytes": None, "accelerator_energy_joules": None}
    assert row == {"name": "b", "traffic": _TRAFFIC, **figures}
    assert _shown(row["peak_bytes"], str) == "unknown"


def test_a_device_that_reported_has_its_figures() -> None:
    resources = {"peak_bytes": 2048.0, "flops": 2e9, "wait_seconds": 3.0, "link_seconds": 1.0}
    row = _device_row("b", {"traffic": {"b": _TRAFFIC}, "resources": {"b": resources}})
    assert row["peak_bytes"] == 2048
    assert _shown(row["peak_bytes"], str) == "2048"
