"""What people see of a job's events and of its report."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from isthmus.coordinator.cli import watch
from isthmus.coordinator.cli.watch import _JobView, print_report
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.job.events import log_line


def seen(*events: pb.Event) -> str:
    view = _JobView("k3v9x2ab", steps=20)
    for event in events:
        view.apply(event)
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(view.draw())
    return capture.get()


def test_a_training_job_shows_states_steps_and_what_was_evaluated() -> None:
    shown = seen(
        pb.Event(state=pb.StateChanged(state=pb.RUNNING, message="")),
        pb.Event(device="d0", joined=pb.DeviceJoined(samples=5)),
        pb.Event(device="d1", task=pb.TaskState(state=pb.TaskState.PREPARING, message="weights")),
        pb.Event(step=pb.StepDone(step=7, loss=2.5, tokens=3, devices=["d0"])),
        pb.Event(evaluation=pb.Evaluated(step=7, perplexity=12.25, devices={"d0": 12.5})),
        pb.Event(aggregation=pb.Aggregated(step=7, method="svd", aggregation_error=0.125)),
        pb.Event(checkpoint=pb.CheckpointSaved(step=7)),
        log_line("hello"),
    )
    assert "job k3v9x2ab: running, svd (error 0.12)" in shown
    assert "7/20" in shown
    assert "loss 2.5000" in shown
    assert "preparing weights" in shown
    for line in ("held-out perplexity after step 7: 12.250", "checkpoint at step 7", "hello"):
        assert line in shown
    assert [row for row in shown.splitlines() if "d0" in row and "training" in row and "12.500" in row]


def test_a_device_of_dlora_has_its_own_step_and_a_loss_that_is_not_finite_is_not_shown() -> None:
    step = pb.StepDone(step=2, device_step=9, loss=float("nan"), tokens=3, devices=["d0"])
    shown = seen(pb.Event(device="d0", step=step), pb.Event(device="d0", left=pb.DeviceLeft(step=9, done=False)))
    assert "2/20" in shown
    assert "loss" not in shown
    assert [row for row in shown.splitlines() if "left at step 9" in row and " 9 " in row]


def test_a_served_model_shows_who_holds_what_and_where_it_is() -> None:
    shown = seen(
        pb.Event(device="d0", holder_joined=pb.HolderJoined(span="0-2", holder="d0", runtime="torch")),
        pb.Event(plan=pb.ServingPlanned(message="slow")),
        pb.Event(took_over=pb.HolderTookOver(message="d1 took over")),
        pb.Event(serving=pb.ServingStarted(url="http://here/v1", model="m")),
    )
    for line in ("holds blocks 0-2", "slow", "d1 took over", "m is served at http://here/v1"):
        assert line in shown


def test_what_a_served_model_took_is_a_table_in_which_the_unknown_is_called_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"bytes_sent": 2048, "bytes_received": 0, "peak_bytes": 2**30, "flops": 1.5e12, "link_seconds": 2.0,
        "energy_joules": 300.0, "energy_source": "estimated", "money": 0.25, "currency": "USD"}  # fmt: skip
    unknown: dict[str, Any] = dict.fromkeys(("peak_bytes", "flops", "link_seconds", "energy_joules", "money"))
    report = {
        "gateway": known,
        "holders": [{**known, "span": "0-2", "device": "d0", "name": "d0"}],
        "guests": [{**known, **unknown, "energy_source": "unknown", "name": "phone"}],
    }
    console = Console(width=200, no_color=True)
    monkeypatch.setattr(watch, "console", console)
    with console.capture() as capture:
        print_report(report)
    rows = {line.split("│")[1].strip(): line for line in capture.get().splitlines() if line.count("│") > 7}
    assert "300 J (estimated)" in rows["blocks 0-2: d0"]
    assert "0.25 USD" in rows["gateway"]
    assert rows["phone, which uses it"].count("unknown") == 5
