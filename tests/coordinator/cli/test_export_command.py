"""`isthmus export` with a coordinator that is not honest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.coordinator.cli.jobs import write_export
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import IsthmusError


@pytest.mark.parametrize("name", ["..", ".", "../x", "/tmp/x", "a/b", "README.md", "x" * 1000])
def test_an_export_has_the_files_of_an_adapter_alone(tmp_path: Path, name: str) -> None:
    files = [pb.ExportedFile(name="adapter_config.json", data=b"{}"), pb.ExportedFile(name=name, data=b"x")]
    connection: Any = SimpleNamespace(stub=SimpleNamespace(ExportJob=lambda _: files))
    with pytest.raises(IsthmusError, match="is no file of an adapter"):
        write_export(connection, "job", tmp_path / "out" / "adapter")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
