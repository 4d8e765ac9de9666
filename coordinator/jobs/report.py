"""The report of a job that is done, as `isthmus watch` prints it and `--json` gives it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.job.events import fields_of


def job_report(
    job: str, spec: pb.JobSpec, devices: Sequence[str], events: Iterable[pb.Event], finished: dict[str, Any]
) -> dict[str, Any]:
    """Makes the report.

    events: all of the job's events, with the evaluations of its earlier runs.
    finished: what its stage knows at the end.
    """
    training = json.loads(spec.training)
    perplexities, losses, modules = {}, dict[int, dict[str, float]](), []
    shapes: dict[str, dict[str, Any]] = {}
    errors, method = {}, ""
    for event in events:
        if event.HasField("step") and "losses" not in finished:  # here each device has steps of its own
            losses.setdefault(event.step.device_step, {})[event.step.devices[0]] = event.step.loss
        elif event.HasField("modules"):
            modules.append({"device": event.device, **fields_of(event.modules)})
        elif event.HasField("evaluation"):
            perplexities[str(event.evaluation.step)] = event.evaluation.perplexity
        elif event.HasField("aggregation"):
            told = event.aggregation
            method = told.method
            errors[str(told.step)] = told.aggregation_error if told.HasField("aggregation_error") else None
        elif event.HasField("shape"):  # the last one counts, for cuts move
            shapes[event.device] = {name: value for name, value in fields_of(event.shape).items() if name != "message"}
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
    peak = resources.get("peak_bytes")  # None: the device has not told it
    energy = resources.get("accelerator_energy_joules")
    return {**row, "peak_bytes": None if peak is None else int(peak), "accelerator_energy_joules": energy}
