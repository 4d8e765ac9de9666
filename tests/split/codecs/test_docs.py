"""docs/codecs.md against the code: parts, parameters, names, and what is chosen by default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isthmus.split.codecs import FAMILIES, Family, parse
from isthmus.split.codecs.grammar import ALIASES
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import ADAPTERS_CODEC, EVALUATION_CODEC, STREAMS, TRAINING, choices
from isthmus.split.link.ladder import ladder

TEXT = (Path(__file__).parents[3] / "docs" / "codecs.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    lines = TEXT.split(f"## {heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


PARTS = {row[0].strip("`"): row for row in table("Parts")}


def test_the_table_has_every_part_in_their_order() -> None:
    assert list(PARTS) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_row_says_kind_parameters_defaults_ranges_and_bias(family: Family) -> None:
    _, kind, parameters, _, _, biased = PARTS[family.name]
    assert kind == family.kind
    said = dict(re.findall(r"`(\w+(?:=[\w.]+)?)`(?: \(([^)]*)\))?", parameters))
    assert said == {
        (one.name if one.type is bool else f"{one.name}={one.default}"): "" if one.type is bool else one.range
        for one in family.parameters
    }
    if family.kind == "quantiser":
        bias = family.biased
        assert biased.replace("`", "") == (bias if isinstance(bias, str) else "yes" if bias else "no")


def test_the_names_in_the_text_are_canonical() -> None:
    for written, name in table("Names"):
        assert parse(written.strip("`")).name == name.strip("`")
    for alias, name in ALIASES.items():
        assert parse(alias).name == name


def test_the_command_lines_in_the_text_can_be_given() -> None:
    given = re.findall(r"--codec '?([^\s'`]+)", TEXT)
    assert "up=int4:block=64,hadamard;down=topk:0.05,ef" in given
    for text in given:
        if text not in ("takes", "names"):
            choices(text)


def test_every_stream_and_what_it_takes_by_default_is_in_the_text() -> None:
    for name in (*STREAMS, ADAPTERS_CODEC, EVALUATION_CODEC):
        assert f"`{name}`" in TEXT


def test_the_candidates_of_auto_are_those_in_the_text() -> None:
    listed = TEXT.split("## How `auto` chooses", 1)[1].split("```")[1].split()
    steps = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|$", TEXT, re.MULTILINE))
    assert list(steps) == list(TRAINING)
    for stream, step in steps.items():
        rounding = ":stochastic" if stream.startswith("gradients") else ""
        written = [name.replace("=S", f"={step}").replace("[:stochastic]", rounding) for name in listed]
        assert ladder(stream, TrainingConfig.link.error_budget) == [parse(name).name for name in written]
