"""The project's own rules hold: types, lint, imports that run one way, generated code that is up to date."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

pytestmark = pytest.mark.long

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


PACKAGES = ("protos", "split", "coordinator", "client")
MOST_LINES, MOST_METHODS, MOST_PARAMETERS = 80, 20, 8


def definitions() -> Iterator[tuple[Path, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "_pb2" not in path.name:  # generated
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                        yield path.relative_to(ROOT), node


def excesses(path: Path, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """What of a definition is over a limit."""
    if not isinstance(node, ast.ClassDef):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        return [f"lines of {path} {node.name}"] if lines > MOST_LINES else []
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = [f"methods of {node.name}"] if len(methods) > MOST_METHODS else []
    for method in methods:
        arguments = method.args
        count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - 1
        if method.name == "__init__" and count > MOST_PARAMETERS:
            found.append(f"parameters of {node.name}")
    return found


def test_one_class_has_one_name_and_nothing_is_larger_than_a_reader_takes_in() -> None:
    names: dict[str, list[str]] = defaultdict(list)
    found: dict[str, str] = {}
    for path, node in definitions():
        place = f"{path}:{node.lineno}"
        if isinstance(node, ast.ClassDef):
            names[node.name.lstrip("_")].append(place)
        found |= dict.fromkeys(excesses(path, node), place)
    found |= {f"name {name}": ", ".join(places) for name, places in names.items() if len(places) > 1}
    assert not found, (
        f"{found}: a class name stands for one thing, a function has up to {MOST_LINES} lines, a class up to "
        f"{MOST_METHODS} methods, a constructor up to {MOST_PARAMETERS} parameters"
    )


def test_what_is_over_a_limit_is_found() -> None:
    long = "def long():\n" + "    pass\n" * MOST_LINES
    large = "class Large:\n" + "".join(f"    def m{number}(self): ...\n" for number in range(MOST_METHODS + 1))
    many = f"class Many:\n    def __init__(self, {', '.join(f'p{i}' for i in range(MOST_PARAMETERS + 1))}): ...\n"
    small = "class Small:\n    def method(self, a): ...\n"
    found = [excesses(Path("a.py"), cast(Any, ast.parse(text).body[0])) for text in (long, large, many, small)]
    assert found == [["lines of a.py long"], ["methods of Large"], ["parameters of Many"], []]
