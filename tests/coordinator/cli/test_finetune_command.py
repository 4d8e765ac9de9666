"""`isthmus finetune`: what it says of the options of Kill and Revive before a job is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from isthmus.coordinator.cli.main import app
from isthmus.split.errors import BadRequest


def _finetune(*options: str) -> Result:
    return CliRunner().invoke(app, ["finetune", "--dataset", "notes", *options])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--kill-interval", "10"], "are for method dlora with active_fraction or bytes_per_step"),
        (["--method", "dlora", "--kill-warmup", "5"], "give one of these, or leave them out"),
        (["--method", "dlora", "--bytes-per-step", "9"], "cannot be held with killed keep"),
        (["--method", "dlora", "--active-fraction", "0.1", "--kill-anneal", "100"], "leave none of 100 steps"),
    ],
)
def test_options_of_kill_and_revive_that_would_do_nothing_are_refused(options: list[str], line: str) -> None:
    error = _finetune(*options).exception
    assert isinstance(error, BadRequest)
    assert line in str(error)


@pytest.mark.parametrize(("killed", "warned"), [("keep", True), ("drop", False)])
def test_that_kept_modules_save_no_messages_is_said_before_the_job_begins(
    tmp_path: Path, killed: str, warned: bool
) -> None:
    words = ["--method", "dlora", "--active-fraction", "0.1", "--killed", killed, "--credentials", str(tmp_path)]
    assert ("kept, and still exchanged" in " ".join(_finetune(*words).output.split())) == warned
