"""A database of version 0.1, made with the statements of then: what it says is read as it was meant."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from isthmus.coordinator.control.database import Database
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import WrongState
from isthmus.split.job.events import event_as_json

SCHEMA_1 = """
CREATE TABLE tokens (digest BLOB NOT NULL, name VARCHAR NOT NULL, expires FLOAT NOT NULL, serial VARCHAR,
    PRIMARY KEY (digest));
CREATE TABLE devices (name VARCHAR NOT NULL, serial VARCHAR NOT NULL, revoked BOOLEAN NOT NULL,
    last_seen FLOAT NOT NULL, profile JSON NOT NULL, PRIMARY KEY (name));
CREATE TABLE jobs (id VARCHAR NOT NULL, spec BLOB NOT NULL, state INTEGER NOT NULL, message VARCHAR NOT NULL,
    created FLOAT NOT NULL, step INTEGER NOT NULL, steps INTEGER NOT NULL, checkpoint_step INTEGER NOT NULL,
    report VARCHAR NOT NULL, devices JSON NOT NULL, PRIMARY KEY (id));
CREATE TABLE events (job VARCHAR NOT NULL, number INTEGER NOT NULL, time FLOAT NOT NULL, kind VARCHAR NOT NULL,
    device VARCHAR NOT NULL, data VARCHAR NOT NULL, PRIMARY KEY (job, number),
    FOREIGN KEY(job) REFERENCES jobs (id) ON DELETE CASCADE);
PRAGMA user_version = 1;
"""

TOLD: list[tuple[str, str, dict[str, Any], pb.Event]] = [
    (
        "state",
        "",
        {"state": "waiting", "resumed": True},
        pb.Event(state=pb.StateChanged(state=pb.WAITING, resumed=True)),
    ),
    (
        "state",
        "",
        {"state": "failed", "message": "why"},
        pb.Event(state=pb.StateChanged(state=pb.FAILED, message="why")),
    ),
    (
        "device",
        "d0",
        {"state": "preparing", "message": "weights"},
        pb.Event(task=pb.TaskState(state=pb.TaskState.PREPARING, message="weights")),
    ),
    ("log", "", {"message": "hello"}, pb.Event(log=pb.LogLine(message="hello"))),
    ("joined", "d0", {"samples": 5, "last_step": 2}, pb.Event(joined=pb.DeviceJoined(samples=5, last_step=2))),
    ("left", "d0", {"step": 3, "done": True}, pb.Event(left=pb.DeviceLeft(step=3, done=True))),
    ("started", "", {"step": 0}, pb.Event(started=pb.TrainingStarted())),
    (
        "step",
        "",
        {"step": 1, "loss": 2.5, "tokens": 7, "devices": ["d0", "d1"]},
        pb.Event(step=pb.StepDone(step=1, loss=2.5, tokens=7, devices=["d0", "d1"])),
    ),
    (
        "step",
        "d0",
        {"step": 1, "device_step": 4, "loss": 2.5, "tokens": 7, "devices": ["d0"]},
        pb.Event(step=pb.StepDone(step=1, device_step=4, loss=2.5, tokens=7, devices=["d0"])),
    ),
    (
        "evaluation",
        "",
        {"step": 10, "perplexity": 3.5, "tokens": 70, "devices": {"d0": 3.0, "d1": 4.0}},
        pb.Event(evaluation=pb.Evaluated(step=10, perplexity=3.5, tokens=70, devices={"d0": 3.0, "d1": 4.0})),
    ),
    (
        "aggregation",
        "",
        {"step": 10, "method": "svd", "aggregation_error": None},
        pb.Event(aggregation=pb.Aggregated(step=10, method="svd")),
    ),
    ("checkpoint", "", {"step": 10}, pb.Event(checkpoint=pb.CheckpointSaved(step=10))),
    (
        "shape",
        "d0",
        {"cut": 2, "rank": 8, "message": "d0: cut 2, rank 8"},
        pb.Event(shape=pb.ShapeChosen(cut=2, rank=8, message="d0: cut 2, rank 8")),
    ),
    (
        "shape",
        "d0",
        {"cut": 2, "rank": 8, "step_seconds": 0.5, "deadline_seconds": 1.0, "memory_bytes": 1e9, "message": "why"},
        pb.Event(
            shape=pb.ShapeChosen(cut=2, rank=8, step_seconds=0.5, deadline_seconds=1.0, memory_bytes=1e9, message="why")
        ),
    ),
    (
        "modules",
        "d0",
        {"step": 3, "message": "1 module killed", "killed": ["a"], "revived": [], "active": ["b", "c"]},
        pb.Event(modules=pb.ModulesChanged(step=3, message="1 module killed", killed=["a"], active=["b", "c"])),
    ),
    (
        "plan",
        "",
        {
            "message": "slow",
            "stages": "cloud:0-4",
            "tokens_per_second": None,
            "single": "",
            "single_tokens_per_second": None,
            "slower": False,
        },
        pb.Event(plan=pb.ServingPlanned(message="slow", stages="cloud:0-4")),
    ),
    (
        "started",
        "",
        {"url": "http://127.0.0.1:1/v1", "model": "m"},
        pb.Event(serving=pb.ServingStarted(url="http://127.0.0.1:1/v1", model="m")),
    ),
    (
        "joined",
        "d0",
        {"span": "0-2", "holder": "d0", "runtime": "torch"},
        pb.Event(holder_joined=pb.HolderJoined(span="0-2", holder="d0", runtime="torch")),
    ),
    (
        "left",
        "d0",
        {"span": "0-2", "holder": "d0", "done": False, "step": 0},
        pb.Event(holder_left=pb.HolderLeft(span="0-2", holder="d0")),
    ),
    (
        "log",
        "",
        {"message": "m", "span": "0-2", "lost": "d0", "holder": "d1", "sequence": 3, "tokens": 9, "seconds": 0.5},
        pb.Event(
            took_over=pb.HolderTookOver(
                message="m", span="0-2", lost="d0", holder="d1", sequence=3, tokens=9, seconds=0.5
            )
        ),
    ),
]


def old_database(path: Path, events: list[tuple[str, str, str]]) -> None:
    """events: kind, device and JSON text."""
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA_1)
        spec = pb.JobSpec(method="splitlora", model="default").SerializeToString()
        connection.execute(
            "INSERT INTO jobs VALUES ('k3v9x2ab', ?, 7, 'stopped', 100.0, 4, 20, 3, '', '[\"d0\"]')", (spec,)
        )
        connection.execute("INSERT INTO devices VALUES ('d0', 'aa', 0, 5.0, '{\"cores\": 2}')")
        for number, (kind, device, data) in enumerate(events, start=1):
            row = ("k3v9x2ab", number, 1000.0 + number, kind, device, data)
            connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", row)
    connection.close()


def test_everything_that_version_0_1_kept_is_read_as_it_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    old_database(path, [(kind, device, json.dumps(data)) for kind, device, data, _ in TOLD])
    for _ in range(2):  # the second time it is a database of this version
        database = Database(path)
        events = database.events.of("k3v9x2ab")
        for number, (event, (_, device, _, meant)) in enumerate(zip(events, TOLD, strict=True), start=1):
            meant.number, meant.time, meant.device = number, 1000.0 + number, device
            assert event == meant
        job = database.jobs.get("k3v9x2ab")
        assert (job.state, job.checkpoint_step, job.spec.model, job.devices) == (pb.INTERRUPTED, 3, "default", ["d0"])
        assert database.devices.get("d0").profile.cores == 2
        assert database.events.append("k3v9x2ab", pb.Event(log=pb.LogLine(message="on"))).number == len(TOLD) + 1
        with sqlite3.connect(path) as connection:
            connection.execute("DELETE FROM events WHERE number > ?", (len(TOLD),))
        connection.close()
        database.close()


@pytest.mark.parametrize("told", TOLD, ids=lambda told: "-".join(told[3].WhichOneof("kind").split("_")))
def test_watchers_get_the_json_that_they_got_from_version_0_1(told: tuple[str, str, dict[str, Any], pb.Event]) -> None:
    kind, device, data, event = told
    event.number, event.time, event.device = 3, 12.5, device
    shown = event_as_json(event)
    assert (shown["number"], shown["time"], shown["kind"], shown["device"]) == ("3", 12.5, kind, device)
    assert shown["data"] == ({"message": ""} | data if kind == "state" else data)
    assert json.loads(json.dumps(shown)) == shown


def test_a_figure_that_was_not_finite_is_not_taken_for_0(tmp_path: Path) -> None:
    step = {"step": 1, "loss": None, "tokens": 7, "devices": ["d0"]}
    evaluation = {"step": 1, "perplexity": None, "tokens": 70, "devices": {"d0": None}}
    old_database(tmp_path / "state.db", [("step", "", json.dumps(step)), ("evaluation", "", json.dumps(evaluation))])
    database = Database(tmp_path / "state.db")
    first, second = database.events.of("k3v9x2ab")
    assert math.isnan(first.step.loss)
    assert math.isnan(second.evaluation.perplexity)
    assert math.isnan(second.evaluation.devices["d0"])
    assert event_as_json(first)["data"] == step
    assert event_as_json(second)["data"] == evaluation
    database.close()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("riddle", "{}"),
        ("step", "{"),
        ("step", '{"steps": 3}'),
        ("step", '{"step": "three"}'),
        ("step", '{"step": -1}'),
        ("state", '{"state": "asleep"}'),
        ("log", "[]"),
    ],
)
def test_what_is_no_event_of_version_0_1_is_refused_in_one_line_and_left_as_it_is(
    tmp_path: Path, kind: str, data: str
) -> None:
    path = tmp_path / "state.db"
    old_database(path, [("log", "", '{"message": "good"}'), (kind, "", data)])
    before = sqlite3.connect(path).execute("SELECT * FROM events").fetchall()
    for _ in range(2):
        with pytest.raises(WrongState, match=r"event 2 of job k3v9x2ab .* restore the file from a backup") as caught:
            Database(path)
        assert "\n" not in str(caught.value)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert connection.execute("SELECT * FROM events").fetchall() == before
    connection.close()
