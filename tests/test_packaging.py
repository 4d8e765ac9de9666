"""What is installed, pinned and shipped: a device needs no Ray, every version is pinned, the wheel has the model."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution, entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PACKAGES = ("protos", "split", "coordinator", "client")
EDGES = ("email", "unittest", "pydecimal")


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}


def needed(requirements: Iterable[str]) -> dict[str, list[Requirement]]:
    """Everything that these requirements bring on this machine, by name, with who wants which version of it."""
    wanted: dict[str, list[Requirement]] = {}
    pending: list[tuple[Requirement, tuple[str, ...]]] = [(Requirement(text), ("",)) for text in requirements]
    seen: set[tuple[str, str]] = set()
    while pending:
        requirement, extras = pending.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(requirement.name)
        if name == "isthmus":  # isthmus[coordinator] in the extra `dev`
            pending += [(Requirement(text), ("",)) for extra in requirement.extras for text in extra_of(extra)]
            continue
        wanted.setdefault(name, []).append(requirement)
        own = ("", *sorted(requirement.extras))
        if {(name, extra) for extra in own} <= seen:
            continue
        seen |= {(name, extra) for extra in own}
        pending += [(Requirement(text), own) for text in distribution(name).requires or []]
    return wanted


def extra_of(name: str) -> list[str]:
    extra: list[str] = PROJECT["optional-dependencies"][name]
    return extra


def test_every_package_that_is_needed_is_pinned_to_a_version_that_all_who_want_it_accept() -> None:
    pinned, wanted = pins(), needed([*PROJECT["dependencies"], *extra_of("dev")])
    assert sorted(set(wanted) - set(pinned)) == []
    refused = [
        f"{requirement} against {pinned[name]}"
        for name, requirements in wanted.items()
        for requirement in requirements
        if Version(pinned[name]) not in requirement.specifier
    ]
    assert refused == []


def test_nothing_is_pinned_that_nobody_needs() -> None:
    assert sorted(set(pins()) - set(needed([*PROJECT["dependencies"], *extra_of("dev")]))) == []


def test_the_pinned_torch_may_be_the_cpu_build() -> None:
    assert Version("2.13.0+cpu") in Requirement(f"torch=={pins()['torch']}").specifier


def test_a_device_installs_neither_ray_nor_flower_nor_a_database() -> None:
    assert {"ray", "flwr", "sqlalchemy", "fastapi"} & set(needed(PROJECT["dependencies"])) == set()
    assert "ray" in needed(extra_of("coordinator"))


@pytest.mark.parametrize("command", ["isthmus", "isthmus-client"])
def test_the_installed_command_is_there(command: str) -> None:
    (entry,) = entry_points(group="console_scripts", name=command)
    assert callable(entry.load())


def test_the_wheel_has_the_four_packages_the_default_model_and_the_protocol(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "isthmus", *PACKAGES):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".", "."],
        cwd=tmp_path, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"isthmus"}
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *PACKAGES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()  # fmt: skip
    assert sorted({f"isthmus/{name}" for name in tracked if (ROOT / name).exists()} - names) == []
    assert "isthmus/split/models/default/model.safetensors" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_licence_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", text)
    assert "END OF TERMS AND CONDITIONS" in text


def volumes(service: dict[str, Any]) -> set[str]:
    return {text.split(":")[0] for text in service["volumes"]}


def test_in_the_compose_file_no_container_sees_an_edges_text_or_key_or_anothers_token() -> None:
    services: dict[str, Any] = COMPOSE["services"]
    assert set(services) == {"coordinator", "job", *EDGES}
    users = {
        volume: {name for name, service in services.items() if volume in volumes(service)}
        for volume in COMPOSE["volumes"]
    }
    for edge in EDGES:
        assert users[f"{edge}-state"] == users[f"{edge}-text"] == {edge}
        assert users[f"{edge}-token"] == {edge, "job"}
    assert users["coordinator-state"] == {"coordinator"}  # the authority's key
    assert "TOKEN" not in str([service.get("environment") for service in services.values()])


def test_the_compose_file_limits_every_container_and_gives_none_privileges() -> None:
    for service in COMPOSE["services"].values():
        assert service["mem_limit"]
        assert service["cap_drop"] == ["ALL"]
        assert "privileged" not in service
        assert "ports" not in service
