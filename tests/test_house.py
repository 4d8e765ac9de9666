"""Rooms, the folders of each package, import one another without circles."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("split", "coordinator", "client")


def room_of(module: str) -> str:
    """`isthmus.split.link.coding` -> `link`: the first name below the package."""
    return module.split(".")[2] if module.count(".") > 1 else ""


def edges_of(package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Which room imports which, in any module and any function, also where only types are wanted."""
    prefix = f"isthmus.{package}."
    edges: dict[str, set[str]] = defaultdict(set)
    for path in sorted((root / package).rglob("*.py")):
        module = "isthmus." + ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            rooms = {room_of(name) for name in names if name.startswith(prefix)}
            edges[room_of(module)] |= rooms - {room_of(module), ""}
    return edges


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """The rooms of one circle, in order; empty where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_room_imports_another_in_a_circle(package: str) -> None:
    edges = edges_of(package)
    assert edges, package
    assert circle_in(edges) == []


def test_a_circle_would_be_found(tmp_path: Path) -> None:
    for room, other in (("link", "codecs"), ("codecs", "link")):
        folder = tmp_path / "split" / room
        folder.mkdir(parents=True)
        (folder / "a.py").write_text(f"def late():\n    from isthmus.split.{other}.a import late\n")
    assert set(circle_in(edges_of("split", tmp_path))) == {"link", "codecs"}
