"""Writes the tables of docs/configuration.md from the options' own names, defaults and help.

python scripts/document_configuration.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import click
import typer

from isthmus.coordinator.cli.config_file import FileKey, file_keys, plain_value
from isthmus.coordinator.cli.main import app
from isthmus.split.inference.serving import ServingConfig
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.grouped import Grouped

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
COMMANDS: dict[str, type[Grouped]] = {"finetune": TrainingConfig, "serve": ServingConfig}


def documented(text: str) -> str:
    """The document with the tables of now: what stands between `<!-- options of NAME -->` and `<!-- end -->`."""
    for name, config in COMMANDS.items():
        pattern = re.compile(rf"(<!-- options of {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        tables = tables_of(name, config)
        text, count = pattern.subn(lambda found, tables=tables: f"{found[1]}{tables}\n{found[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{DOCUMENT.name} has {count} places for the options of {name}")
    return text


def tables_of(name: str, config: type[Grouped]) -> str:
    """A heading and a table for each group, after a table of what is in none."""
    group: click.Group = typer.main.get_command(app)  # type: ignore[assignment]
    lines: list[str] = []
    for title, keys in groupby(file_keys(group.commands[name], config), key=lambda key: key.group):
        about = getattr(config(), title).__doc__ if title else f"What `isthmus {name}` takes beside the groups."
        lines += ["", f"### {name}: {title or 'in no group'}", "", about, "", *_table(keys)]
    return "\n".join(lines) + "\n"


def _table(keys: Iterable[FileKey]) -> list[str]:
    lines = ["| key | option | default | what |", "| --- | --- | --- | --- |"]
    for key in keys:
        default = plain_value(key, key.option.default)
        cells = [
            f"`{key.keys[0]}`",
            ", ".join(f"`{flag}`" for flag in key.option.opts),
            "" if default in (None, "", []) else f"`{str(default).lower() if key.option.is_flag else default}`",
            " ".join((key.option.help or "").split()).replace("|", "\\|").replace("<", "&lt;"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the document is up to date")
    before = DOCUMENT.read_text()
    after = documented(before)
    if not parser.parse_args().check:
        DOCUMENT.write_text(after)
    elif before != after:
        raise SystemExit(f"{DOCUMENT.name} is not up to date: run python scripts/document_configuration.py")


if __name__ == "__main__":
    sys.exit(main())
