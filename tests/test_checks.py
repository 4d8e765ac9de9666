"""The project's own rules hold: types, lint, imports that run one way, generated code that is up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports"],
    ],
    ids=lambda command: " ".join(command),
)
def test_the_tree_passes(command: list[str]) -> None:
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_generating_the_protocol_code_again_changes_nothing(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "generate_protos.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    generated = sorted((tmp_path / "isthmus" / "protos" / "v1").iterdir())
    assert len(generated) == 3 * len(list((ROOT / "protos" / "v1").glob("*.proto")))
    for path in generated:
        assert path.read_text() == (ROOT / "protos" / "v1" / path.name).read_text(), path.name


def test_a_device_imports_neither_ray_nor_flower_nor_the_coordinator() -> None:
    script = (
        "import isthmus.client.cli, isthmus.client.daemon, isthmus.client.runner, sys; print([m for m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "'isthmus.client.runner'" in loaded
    for module in ("ray", "flwr", "isthmus.coordinator", "sqlalchemy"):
        assert f"'{module}'" not in loaded
