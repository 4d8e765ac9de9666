"""Follows a job: live for people (a line for each device and a bar), as JSON lines for machines."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from isthmus.coordinator.cli.common import as_dict, console, human_bytes, print_json
from isthmus.coordinator.connection import Connection
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError, WrongState


@dataclass
class _DeviceLine:
    state: str = "waiting"
    step: int = 0
    perplexity: float | None = None


@dataclass
class _View:
    """What the events so far say."""

    job: str
    steps: int
    devices: dict[str, _DeviceLine] = field(default_factory=dict)
    state: str = "waiting"
    notes: list[str] = field(default_factory=list)
    aggregation: str = ""  # the method, and the last one's error against the exact average

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

    def apply(self, event: pb.JobEvent) -> None:
        data: dict[str, Any] = json.loads(event.data or "{}")
        line = self.devices.setdefault(event.device, _DeviceLine()) if event.device else None
        if event.kind == "state":
            self.state = " ".join(filter(None, [data["state"], data.get("message", "")]))
        elif event.kind == "device" and line is not None:
            line.state = " ".join(filter(None, [data["state"], data["message"]]))
        elif event.kind == "joined" and line is not None:
            line.state = f"holds blocks {data['span']}" if "span" in data else "training"
        elif event.kind == "left" and line is not None:
            line.state = "done" if data["done"] else f"left at step {data['step']}"
        elif event.kind == "step":
            loss = data["loss"]
            self.bar.update(self.task, completed=data["step"], loss="" if loss is None else f"loss {loss:.4f}")
            for name in data["devices"]:
                self.devices.setdefault(name, _DeviceLine()).step = data.get("device_step", data["step"])
        elif event.kind == "evaluation":
            for name, value in data["devices"].items():
                self.devices.setdefault(name, _DeviceLine()).perplexity = value
            self.notes.append(f"held-out perplexity after step {data['step']}: {data['perplexity']:.3f}")
        elif event.kind == "checkpoint":
            self.notes.append(f"checkpoint at step {data['step']}")
        elif event.kind == "started" and "url" in data:
            self.notes.append(f"{data['model']} is served at {data['url']}")
        elif event.kind == "modules":
            self.notes.append(f"{event.device}, step {data['step']}: {data['message']}")
        elif event.kind == "aggregation":
            self.aggregation = f", {data['method']} (error {data['aggregation_error'] or 0.0:.2g})"
        elif event.kind in ("log", "plan", "shape"):
            self.notes.append(data["message"])

    @property
    def _title(self) -> str:
        return f"job {self.job}: {self.state}{self.aggregation}"

    def draw(self) -> Group:
        table = Table("device", "state", "step", "its held-out perplexity", title=self._title)
        for name, line in sorted(self.devices.items()):
            table.add_row(name, line.state, str(line.step), "" if line.perplexity is None else f"{line.perplexity:.3f}")
        return Group(table, self.bar, *self.notes[-4:])


def follow(connection: Connection, job: pb.Job, *, as_json: bool, after: int = 0) -> pb.Job:
    """Shows the job until it ends; returns it as it then is. Raises what a failed job ended with."""
    events = connection.stub.WatchJob(pb.WatchJobRequest(id=job.id, after=after))
    if as_json:
        for event in events:
            print_json({**as_dict(event), "data": json.loads(event.data or "{}")})
    else:
        view = _View(job.id, job.steps)
        with Live(view.draw(), console=console, refresh_per_second=4, get_renderable=view.draw):
            for event in events:
                view.apply(event)
        if not console.is_terminal:  # else the bar's line has no end
            console.print()
    ended: pb.Job = connection.stub.GetJob(pb.JobRequest(id=job.id))
    return ended


def check_ended_well(job: pb.Job) -> None:
    """Raises one line for a job that ended in another way than with an adapter."""
    if job.state == pb.FAILED:
        raise IsthmusError(f"job {job.id} failed: {job.message}")
    if job.state in (pb.CANCELLED, pb.INTERRUPTED):
        kept = f"; its checkpoint of step {job.checkpoint_step} is kept" if job.checkpoint_step else ""
        raise WrongState(f"job {job.id} was {pb.JobState.Name(job.state).lower()}: {job.message}{kept}")


def _reported(device: dict[str, Any]) -> tuple[str, ...]:
    """What a device itself said: its peak memory, FLOPs, seconds of waiting for the link and for others."""
    if device["peak_bytes"] is None:
        return ("unknown",) * 4
    return (
        human_bytes(device["peak_bytes"]),
        f"{device.get('flops', 0):.3g}",
        f"{device.get('link_seconds', 0):.1f} s",
        f"{device.get('wait_seconds', 0) - device.get('link_seconds', 0):.1f} s",
    )


def print_report(report: dict[str, Any]) -> None:
    """The end of a job, for people."""
    before, after = report["perplexity_before"], report["perplexity_after"]
    if after is not None:
        fall = f" (before: {before:.3f})" if before is not None else ""
        console.print(f"held-out perplexity: {after:.3f}{fall}")
    table = Table("device", "sent", "received", "peak memory", "FLOPs", "waited for the link", "for the others")
    for device in report["devices"]:
        table.add_row(
            device["name"],
            human_bytes(device["bytes_sent"]),
            human_bytes(device["bytes_received"]),
            *_reported(device),
        )
    console.print(table)
    for device, picture in report.get("heat_maps", {}).items():
        console.print(f"which modules of {device} trained when: {picture}", soft_wrap=True)
    errors = [error for error in report["aggregation"]["aggregation_error"].values() if error is not None]
    if len(report["devices"]) > 1 and errors:
        method = report["aggregation"]["method"]
        console.print(f"aggregation: {method}, up to {max(errors):.2g} off the exact average of the products")
