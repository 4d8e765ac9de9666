"""What a device's own log and command line do with text that is not to be shown as it is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import grpc
import pytest

from isthmus.client import cli
from isthmus.split.errors import from_status
from isthmus.split.tls import error_of
from tests.cluster.house import run_cli

EVIL = "a\nFORGED\x1b[2J\x9b31m\u202e"


@pytest.mark.parametrize("name", ["no\x1b[2Jtes", "\u202eseton", "x" * 201])
def test_an_owner_is_told_of_a_name_that_no_coordinator_takes(tmp_path: Path, name: str) -> None:
    state = ["--state-dir", str(tmp_path / "state")]
    status, out, err = run_cli("run", *state, "--data", f"{name}=notes.txt", main=cli.main)
    assert (status, out) == (1, "")
    assert err.startswith("isthmus-client: a name of --data has to be one line of at most 200 visible characters")
    assert err.removesuffix("\n").isprintable()


def test_a_line_of_json_is_bounded_and_visible_too() -> None:
    record = logging.LogRecord("client", logging.INFO, "", 0, "task %s", (EVIL + "x" * 20_000_000,), None)
    line = cli._JsonLines().format(record)
    assert len(line) < 5000
    assert json.loads(line)["message"].startswith(r"task a\nFORGED\x1b[2J\x9b31m\u202ex")


def test_what_a_call_is_refused_with_is_one_bounded_line() -> None:
    details = EVIL + "x" * 1_000_000
    error = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    line = str(error_of(error, "here"))
    assert type(error_of(error, "here")) is type(from_status("NOT_FOUND", ""))
    assert line.startswith(r"a FORGED\x1b[2J\x9b31m\u202ex")
    assert line.isprintable()
    assert len(line) <= 4000
