"""`isthmus codecs`: the list, and one pipeline."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from isthmus.coordinator.cli.codecs import KEYS
from isthmus.split.codecs import FAMILIES, parse
from isthmus.split.job.streams import ADAPTERS_CODEC, EVALUATION_CODEC, STREAMS, TRAINING, choices
from isthmus.split.link.ladder import ladder
from tests.cluster.house import run_cli

WIDTH = "64"


def test_the_list_has_every_part_with_its_parameters_and_what_is_chosen_by_default() -> None:
    status, out, err = run_cli("codecs", "--width", WIDTH)
    assert (status, err) == (0, "")
    for family in FAMILIES.values():
        assert family.name in out
        assert family.what in out
        assert family.cost in out
        for parameter in family.parameters:
            assert parameter.name in out
            assert parameter.help in out
            assert parameter.range in out or parameter.type is bool
    for text in (ADAPTERS_CODEC, EVALUATION_CODEC, *STREAMS, *KEYS, "biased: unless stochastic", "synthetic"):
        assert text in out
    for stream in TRAINING:
        assert all(name in out for name in ladder(stream, 0.005))
    assert "up=int4:block=64,hadamard;down=topk:0.05,ef" in out


def test_the_list_as_json() -> None:
    status, out, _ = run_cli("codecs", "--width", WIDTH, "--json")
    listed = json.loads(out)
    assert status == 0
    assert [family["name"] for family in listed["families"]] == list(FAMILIES)
    assert listed["families"][0] | {"parameters": []} == {
        "name": "ef",
        "kind": "memory",
        "what": FAMILIES["ef"].what,
        "cost": FAMILIES["ef"].cost,
        "biased": False,
        "writes": "",
        "parameters": [],
    }
    assert listed["families"][0]["parameters"][0]["default"] == 256
    assert listed["adapters"] == ADAPTERS_CODEC
    for stream in TRAINING:
        assert listed["auto"][stream] == ladder(stream, listed["auto"]["error_budget"])
    assert listed["typical"]["bfloat16"]["bits_a_value"] == 16
    for key in listed["keys"]:
        choices(f"{key}=int8")


def test_a_pipeline_is_shown_by_its_canonical_name_with_its_parts_and_figures() -> None:
    status, out, err = run_cli("codecs", " int4:64 , hadamard", "--width", WIDTH)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "hadamard,int4"
    assert "4.250 bits a value of a tensor (1024, 64)" in out
    for text in ("transform", "quantiser", "unless stochastic", "GB of float32 a second", "synthetic"):
        assert text in out


@pytest.mark.parametrize("name", ["klt,uniform:step=0.5,range", "ef,topk:0.1", "lossless"])
def test_a_pipeline_as_json(name: str) -> None:
    status, out, _ = run_cli("codecs", name, "--width", WIDTH, "--json")
    shown, codec = json.loads(out), parse(name)
    assert status == 0
    assert (shown["name"], shown["exact"]) == (codec.name, codec.exact)
    assert [part["part"] for part in shown["parts"]] == codec.name.split(",")
    assert shown["bytes_at_most"] == codec.wire_bytes((1024, int(WIDTH)))
    assert 0 < shown["bits_a_value"] <= shown["bits_a_value_at_most"]
    assert (shown["nmse"] == 0) == codec.exact
    assert shown["encode_gb_per_second"] > 0
    assert shown["decode_gb_per_second"] > 0


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("int5", "no part of a codec is called 'int5'; choose from ef, delta"),
        ("hadamard", "hadamard needs a quantiser"),
        ("topk:2", "share of topk is 2; choose 0.0001 to 1"),
    ],
)
def test_a_name_that_is_none_is_one_line_that_says_what_to_write(name: str, line: str) -> None:
    status, out, err = run_cli("codecs", name)
    assert (status, out) == (1, "")
    assert err.startswith("isthmus: ")
    assert line in err
    assert err.count("\n") == 1


def test_its_help_has_an_example() -> None:
    assert "Example: isthmus codecs klt,uniform:step=0.26,range" in run_cli("codecs", "--help")[1]


@pytest.mark.parametrize("module", ["isthmus.coordinator.cli.codecs", "isthmus.coordinator.cli.main"])
def test_it_is_imported_without_torch(module: str) -> None:
    script = f"import {module}, json, sys; print(json.dumps(list(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    assert module in loaded
    assert not {"torch", "ray", "transformers"} & set(loaded)
