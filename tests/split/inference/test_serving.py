"""What is served and by whom: stages as users write them, and the memory that a span takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.split.errors import BadRequest, IsthmusError
from isthmus.split.inference.serving import (
    AdapterConfig,
    ServingConfig,
    SpanConfig,
    check_spans,
    memory_of,
    parse_adapter,
    parse_stages,
)
from isthmus.split.inference.settings import (
    AccessSettings,
    ChainSettings,
    DraftsSettings,
    HttpSettings,
    LimitsSettings,
)
from isthmus.split.lora.folder import AdapterFolder
from isthmus.split.lora.served import LoraAdapter
from isthmus.split.models.source import open_model
from tests.split.tiny_adapters import make_adapter
from tests.split.tiny_models import ARCHITECTURES, make_model


def test_stages_name_holders_and_blocks() -> None:
    assert parse_stages("laptop:0-8, cloud:8-24") == (SpanConfig(0, 8, ("laptop",)), SpanConfig(8, 24, ("cloud",)))
    assert parse_stages("a-1+b+cloud:0-3") == (SpanConfig(0, 3, ("a-1", "b", "cloud")),)
    assert parse_stages(" auto ") == ()


@pytest.mark.parametrize(
    "text", ["", "a", "a:1", "a:1-", "a:-1-2", ":0-2", "a:0-2,,b:2-4", "+:0-2", "a:0-2;b:2-4", "A:0-2"]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="--stages"):
        parse_stages(text)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        spans = parse_stages(text)
    except BadRequest:
        return
    assert all(span.holders and span.first >= 0 for span in spans)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a:0-2,b:3-4", "nobody holds blocks 2-3"),
        ("a:0-2,b:1-4", "blocks 1-2 of b:1-4 are held already"),
        ("a:0-2", "nobody holds blocks 2-4"),
        ("a:0-5", "no blocks a:0-5 in this model, which has 0-4"),
        ("a:0-2,b:2-2,c:2-4", "no blocks b:2-2"),
        ("a:0-2,b+a:2-4", "device a is named twice"),
    ],
)
def test_blocks_that_are_missing_or_held_twice_are_refused(text: str, line: str) -> None:
    with pytest.raises(BadRequest, match=line):
        check_spans(parse_stages(text), 4)


def test_actors_may_stand_by_for_each_other() -> None:
    check_spans(parse_stages("cloud+cloud:0-2,cloud:2-4"), 4)


def test_a_configuration_survives_its_json() -> None:
    config = ServingConfig.of(
        spans=parse_stages("a+b:0-2,cloud:2-4"), name="m", context=100, codec="hadamard,int8", weights="int8"
    )
    assert ServingConfig.from_json(config.to_json()) == config
    assert config.devices == ["a", "b"]
    assert str(config.span_of("b")) == "0-2"


def test_what_version_0_1_stored_is_the_same_service_now() -> None:
    stored = {
        "spans": [{"first": 0, "last": 2, "holders": ["a", "b"]}, {"first": 2, "last": 4, "holders": ["cloud"]}],
        "name": "m",
        "context": 100,
        "sequences": 4,
        "queue": 32,
        "chunk": 128,
        "codec": "hadamard,int8",
        "runtime": "onnxruntime",
        "weights": "int8",
        "http_host": "0.0.0.0",
        "http_port": 8000,
        "http_certificate": "/c.pem",
        "http_key": "/k.pem",
        "key_sha256": "ab",
        "patience": 30.0,
        "draft": "lookup",
        "exit_threshold": "",
        "users": ["phone"],
        "guests": 2,
        "adapters": [{"name": "formal", "folder": "/a"}],
    }
    read = ServingConfig.from_json(json.dumps(stored))
    assert read == ServingConfig(
        spans=parse_stages("a+b:0-2,cloud:2-4"),
        name="m",
        adapters=(AdapterConfig("formal", "/a"),),
        limits=LimitsSettings(context=100, sequences=4, queue=32),
        chain=ChainSettings("hadamard,int8", "onnxruntime", "int8", chunk=128, patience=30.0),
        drafts=DraftsSettings("lookup"),
        http=HttpSettings("0.0.0.0", 8000, "/c.pem", "/k.pem", "ab"),
        access=AccessSettings(("phone",), 2),
    )
    assert ServingConfig.from_json(read.to_json()) == read


def test_who_may_use_the_chain_has_sequences_beside_the_others() -> None:
    spans = parse_stages("a+b:0-2,cloud:2-4")
    by_default = ServingConfig.of(spans=spans, name="m", sequences=8, users=("c", "a"))
    assert ServingConfig.from_json(by_default.to_json()) == by_default
    assert (by_default.may_use, by_default.room, by_default.boundaries) == (["c", "a", "b"], 12, [0, 2])
    assert ServingConfig.of(spans=spans, name="m", sequences=8, guests=1).room == 9
    closed = ServingConfig.of(spans=spans, name="m", sequences=8, guests=0)
    assert (closed.may_use, closed.room) == ([], 8)
    nobody = ServingConfig.of(spans=parse_stages("cloud:0-4"), name="m", sequences=8, guests=5)
    assert (nobody.may_use, nobody.room) == ([], 8)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"guests": -1}, "guests is -1; choose 0 to 1024"),
        ({"guests": 0, "users": ["a"]}, "guests is 0; choose 1 to 1024"),
        ({"users": ["A"]}, "'A' is not a name"),
        ({"users": 1}, r"users of the serving configuration has the value 1; it must be tuple\[str"),
        ({"sequences": 0}, "sequences is 0; choose 1 to 1024"),
        ({"queue": -1}, "queue is -1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"patience": float("nan")}, "patience is nan"),
        ({"codec": "zip"}, "zip"),
        ({"codec": "delta,int8"}, "without ef and delta"),
        ({"runtime": "jax"}, "runtime 'jax'"),
        ({"draft": "early"}, "the gateway holds no blocks"),
        ({"exit_threshold": "2"}, "choose 0 to 1"),
        ({"exit_threshold": "often"}, "write a number"),
        ({"exit_threshold": "0.5", "draft": "lookup"}, "exclude each other"),
        ({"nonsense": 1}, "the serving configuration has no setting nonsense"),
        ({"spans": [{}]}, "spans of the serving configuration has the value"),
        ({"adapters": [{"name": "a"}]}, "adapters of the serving configuration has the value"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, object], line: str) -> None:
    raw = {"spans": [{"first": 0, "last": 4, "holders": ["cloud"]}], "name": "m"} | changes
    with pytest.raises(IsthmusError, match=line):
        ServingConfig.from_json(json.dumps(raw))


def test_an_adapter_has_a_name_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "formal").mkdir()
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / "formal")
    assert parse_adapter("formal") == parse_adapter("./formal/") == parse_adapter(here) == AdapterConfig("formal", here)
    assert parse_adapter("polite=formal") == AdapterConfig("polite", here)
    assert parse_adapter("/elsewhere/a=b") == AdapterConfig("a=b", "/elsewhere/a=b")
    config = ServingConfig.of(spans=(), name="m", adapters=(parse_adapter("formal"), parse_adapter("polite=formal")))
    assert ServingConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("names", [["m"], ["a", "a"], [""]])
def test_names_that_would_mean_two_models_are_refused(names: list[str]) -> None:
    with pytest.raises(BadRequest, match=f"no adapter can be called {names[0]!r} here"):
        ServingConfig.of(spans=(), name="m", adapters=tuple(AdapterConfig(name, "/x") for name in names))


def test_memory_counts_adapters(tmp_path: Path) -> None:
    source = open_model(str(make_model(tmp_path / "m", "llama", layers=4)))
    folder = make_adapter(tmp_path / "a", tmp_path / "m", target_modules=["up_proj"], layers_to_transform=[0, 1, 3])
    adapter = LoraAdapter("a", AdapterFolder(folder), source.config)
    serving, span = ServingConfig.of(spans=(), name="m", context=64, sequences=1), SpanConfig(1, 4, ("a",))
    without, once, twice = (
        memory_of(source.config, serving).held_bytes(span.first, span.last, [adapter] * count) for count in range(3)
    )
    assert once - without == 2 * (twice - once)  # the base has one of zeros, where there are any
    assert twice - once == 2 * 4 * (4 * 32 + 64 * 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_is_weights_and_keys_and_values(architecture: str, tmp_path: Path) -> None:
    source = open_model(str(make_model(tmp_path, architecture, layers=4)))
    serving = ServingConfig.of(spans=(), name="m", context=64, sequences=1, guests=0)
    one = memory_of(source.config, serving).held_bytes(0, 1)
    assert memory_of(source.config, serving).held_bytes(0, 4) == 4 * one
    assert memory_of(source.config, serving.but(weights="int8")).held_bytes(0, 1) < one
    heads = 4 if architecture in ("gpt2", "gpt_neox") else 2
    guests = serving.but(spans=(SpanConfig(0, 4, ("a",)),), guests=2)
    assert memory_of(source.config, guests).held_bytes(0, 1) > one
    longer = memory_of(source.config, serving.but(context=128)).held_bytes(0, 1)
    assert longer - one == 2 * 4 * heads * 8 * 64
    weights = one - 2 * 4 * heads * 8 * 64
    names = [name for name in source.tensor_names() if f".{'h' if architecture == 'gpt2' else 'layers'}.0." in name]
    assert weights == 4 * sum(source.read(name).numel() for name in names)
