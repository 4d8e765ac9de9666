"""The report of a job that is done, as `isthmus watch` prints it and `--json` gives it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from isthmus.protos.v1 import coordinator_pb2 as pb


def job_report(
    job: str, spec: pb.JobSpec, devices: Sequence[str], events: Iterable[pb.JobEvent], finished: dict[str, Any]
) -> dict[str, Any]:
    """events: all of the job's, for the evaluations of its earlier runs. finished: what its stage knows at the end."""
    training = json.loads(spec.training)
    perplexities, losses, modules = {}, dict[int, dict[str, float]](), []
    shapes: dict[str, dict[str, Any]] = {}
    errors, method = {}, ""
    for event in events:
        if event.kind == "step" and "losses" not in finished:  # each device has steps of its own
            data = json.loads(event.data)
            losses.setdefault(data["device_step"], {})[data["devices"][0]] = data["loss"]
        if event.kind == "modules":
            modules.append({"device": event.device, **json.loads(event.data)})
        if event.kind == "evaluation":
            data = json.loads(event.data)
            perplexities[str(data["step"])] = data["perplexity"]
        elif event.kind == "aggregation":
            data = json.loads(event.data)
            method, errors[str(data["step"])] = data["method"], data["aggregation_error"]
        elif event.kind == "shape":  # the last one: cuts move
            shapes[event.device] = {key: value for key, value in json.loads(event.data).items() if key != "message"}
    return {
        "job": job,
        "method": spec.method,
        "model": spec.model,
        "training": training,
        "adapter": finished["adapter"],
        "perplexity_before": perplexities.get("0"),
        "perplexity_after": perplexities.get(str(training["steps"])),
        "perplexities": perplexities,
        "losses": finished.get("losses") or [fmean(each.values()) for _, each in sorted(losses.items())],
        "modules": modules,
        "aggregation": {"method": method, "aggregation_error": errors},
        "devices": [{**_device_row(name, finished), **shapes.get(name, {})} for name in devices],
        "coordinator": finished["coordinator"],
    }


def _device_row(name: str, finished: dict[str, Any]) -> dict[str, Any]:
    traffic = finished["traffic"][name]
    # What the stage received is what the device sent.
    sent = sum(r["payload_bytes"] + r["overhead_bytes"] for r in traffic if r["direction"] == "received")
    received = sum(r["payload_bytes"] + r["overhead_bytes"] for r in traffic if r["direction"] == "sent")
    resources = finished["resources"].get(name, {})
    row = {**resources, "name": name, "bytes_sent": sent, "bytes_received": received, "traffic": traffic}
    peak = resources.get("peak_bytes")  # unknown of a device that ended without its report
    return {**row, "peak_bytes": None if peak is None else int(peak)}


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: a loss that is either is shown as null."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
