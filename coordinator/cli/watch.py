"""Follows a job: live for people, with a line for each device and a bar, or as JSON lines for machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from isthmus.coordinator.cli.common import console, human_bytes, print_json
from isthmus.coordinator.connection import Connection
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError, WrongState
from isthmus.split.job.events import event_as_json


@dataclass
class _DeviceLine:
    state: str = "waiting"
    step: int = 0
    perplexity: float | None = None


_DEVICE_STATES: Mapping[str, Callable[[pb.Event], str]] = {
    "task": lambda event: _joined(pb.TaskState.State.Name(event.task.state).lower(), event.task.message),
    "joined": lambda event: "training",
    "left": lambda event: "done" if event.left.done else f"left at step {event.left.step}",
    "holder_joined": lambda event: f"holds blocks {event.holder_joined.span}",
    "holder_left": lambda event: "left",
}
"""What a device's line says after an event about the device, by kind of event."""

_NOTES: Mapping[str, Callable[[pb.Event], str]] = {
    "evaluation": lambda event: (
        f"held-out perplexity after step {event.evaluation.step}: {event.evaluation.perplexity:.3f}"
    ),
    "checkpoint": lambda event: f"checkpoint at step {event.checkpoint.step}",
    "serving": lambda event: f"{event.serving.model} is served at {event.serving.url}",
    "modules": lambda event: f"{event.device}, step {event.modules.step}: {event.modules.message}",
    "log": lambda event: event.log.message,
    "plan": lambda event: event.plan.message,
    "shape": lambda event: event.shape.message,
    "took_over": lambda event: event.took_over.message,
}
"""Sentences for people, by kind of event."""


@dataclass
class _JobView:
    """The job as the events so far tell it."""

    job: str
    steps: int
    devices: dict[str, _DeviceLine] = field(default_factory=dict)
    state: str = "waiting"
    notes: list[str] = field(default_factory=list)
    aggregation: str = ""  # the method, and its last error against the exact average

    def __post_init__(self) -> None:
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self.task = self.bar.add_task("steps", total=self.steps, loss="")

    def apply(self, event: pb.Event) -> None:
        kind = event.WhichOneof("kind")
        line = self.devices.setdefault(event.device, _DeviceLine()) if event.device else None
        if line is not None and kind in _DEVICE_STATES:
            line.state = _DEVICE_STATES[kind](event)
        elif kind == "state":
            self.state = _joined(pb.JobState.Name(event.state.state).lower(), event.state.message)
        elif kind == "step":
            step = event.step
            self.bar.update(self.task, completed=step.step, loss=f"loss {step.loss:.4f}" if isfinite(step.loss) else "")
            for name in step.devices:
                done = step.device_step if step.HasField("device_step") else step.step
                self.devices.setdefault(name, _DeviceLine()).step = done
        elif kind == "evaluation":
            for name, value in event.evaluation.devices.items():
                self.devices.setdefault(name, _DeviceLine()).perplexity = value
        elif kind == "aggregation":
            told = event.aggregation
            self.aggregation = f", {told.method} (error {told.aggregation_error:.2g})"
        if kind in _NOTES:
            self.notes.append(_NOTES[kind](event))

    @property
    def _title(self) -> str:
        return f"job {self.job}: {self.state}{self.aggregation}"

    def draw(self) -> Group:
        table = Table("device", "state", "step", "its held-out perplexity", title=self._title)
        for name, line in sorted(self.devices.items()):
            table.add_row(name, line.state, str(line.step), "" if line.perplexity is None else f"{line.perplexity:.3f}")
        return Group(table, self.bar, *self.notes[-4:])


def _joined(*parts: str) -> str:
    return " ".join(filter(None, parts))


def follow(connection: Connection, job: pb.Job, *, as_json: bool, after: int = 0) -> pb.Job:
    """Shows the job until it ends; returns it as it is then."""
    events = connection.stub.WatchJob(pb.WatchJobRequest(id=job.id, after=after))
    if as_json:
        for event in events:
            print_json(event_as_json(event))
    else:
        view = _JobView(job.id, job.steps)
        with Live(view.draw(), console=console, refresh_per_second=4, get_renderable=view.draw):
            for event in events:
                view.apply(event)
        if not console.is_terminal:  # else the bar's line has no end
            console.print()
    ended: pb.Job = connection.stub.GetJob(pb.JobRequest(id=job.id))
    return ended


def check_ended_well(job: pb.Job) -> None:
    """Raises IsthmusError or WrongState, with one line, for a job that has not succeeded."""
    if job.state == pb.FAILED:
        raise IsthmusError(f"job {job.id} failed: {job.message}")
    if job.state in (pb.CANCELLED, pb.INTERRUPTED):
        kept = f"; its checkpoint of step {job.checkpoint_step} is kept" if job.checkpoint_step else ""
        raise WrongState(f"job {job.id} was {pb.JobState.Name(job.state).lower()}: {job.message}{kept}")


def print_report(report: dict[str, Any]) -> None:
    """Prints the report of a job that has ended, or of what a served model has used so far, for people."""
    if "gateway" in report:
        _print_served(report)
    else:
        _print_training(report)


def _print_served(report: dict[str, Any]) -> None:
    table = Table("of the model", "sent", "received", "peak memory", "FLOPs", "waited for the link", "energy", "money")
    currency = report["gateway"]["currency"]
    rows = [("gateway", report["gateway"])]
    rows += [(f"blocks {row['span']}: {row['device'] or row['name']}", row) for row in report["holders"]]
    rows += [(f"{row['name']}, which uses it", row) for row in report["guests"]]
    for name, row in rows:
        energy = _shown(row["energy_joules"], lambda joules: f"{joules:.3g} J")
        table.add_row(
            name,
            human_bytes(row["bytes_sent"]),
            human_bytes(row["bytes_received"]),
            _shown(row["peak_bytes"], human_bytes),
            _shown(row["flops"], lambda flops: f"{flops:.3g}"),
            _shown(row["link_seconds"], lambda seconds: f"{seconds:.1f} s"),
            energy if row["energy_joules"] is None else f"{energy} ({row['energy_source']})",
            _shown(row["money"], lambda money: f"{money:.2g} {currency}"),
        )
    console.print(table)


def _shown(value: Any, shown: Callable[[Any], str]) -> str:
    """A value as it is shown; what nobody has measured is unknown, and not 0."""
    return "unknown" if value is None else shown(value)


def _print_training(report: dict[str, Any]) -> None:
    before, after = report["perplexity_before"], report["perplexity_after"]
    if after is not None:
        fall = f" (before: {before:.3f})" if before is not None else ""
        console.print(f"held-out perplexity: {after:.3f}{fall}")
    table = Table("device", "sent", "received", "peak memory", "FLOPs", "waited for the link", "for the others")
    for device in report["devices"]:
        waited, link = device.get("wait_seconds"), device.get("link_seconds")
        table.add_row(
            device["name"],
            human_bytes(device["bytes_sent"]),
            human_bytes(device["bytes_received"]),
            _shown(device["peak_bytes"], human_bytes),
            _shown(device.get("flops"), lambda flops: f"{flops:.3g}"),
            _shown(link, lambda seconds: f"{seconds:.1f} s"),
            _shown(None if waited is None or link is None else waited - link, lambda seconds: f"{seconds:.1f} s"),
        )
    console.print(table)
    for device, picture in report.get("heat_maps", {}).items():
        console.print(f"which modules of {device} trained when: {picture}", soft_wrap=True)
    errors = [error for error in report["aggregation"]["aggregation_error"].values() if error is not None]
    if len(report["devices"]) > 1 and errors:
        method = report["aggregation"]["method"]
        console.print(f"aggregation: {method}, up to {max(errors):.2g} off the exact average of the products")
