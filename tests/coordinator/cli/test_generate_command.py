"""`isthmus generate` and `isthmus chat` in one process, and what they say when there is nothing to talk to."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from isthmus.split.terminal import hops_between
from tests.cluster.house import run_cli
from tests.split.inference.whole import greedy, whole_model
from tests.split.tiny_adapters import make_adapter, with_adapter
from tests.split.tiny_models import make_model

PROMPT = "A device keeps its text"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def wanted(model: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = greedy(whole_model(model), tokenizer.encode(PROMPT), 20)
    ids = ids[: ids.index(0)] if 0 in ids else ids
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def local(model: Path, *arguments: str, text: str = "") -> tuple[int, str, str]:
    common = ("--local", "--model", str(model), "--runtime", "torch", "--temperature", "0", "--max-tokens", "20")
    return run_cli(arguments[0], *common, *arguments[1:], text=text)


def test_the_answer_is_the_whole_models(model: Path, wanted: str) -> None:
    status, out, _ = local(model, "generate", "--prompt", PROMPT)
    assert (status, out) == (0, wanted + "\n")


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_an_adapters_answer_is_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_model(tmp_path / "llama", "llama", hidden=64)
    adapter = make_adapter(tmp_path / "adapter", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = greedy(with_adapter(model, adapter), tokenizer.encode(PROMPT), 20)
    ids = ids[: ids.index(0)] if 0 in ids else ids
    asked = ("generate", "--prompt", PROMPT, "--adapter", str(adapter), "--runtime", runtime)
    assert local(model, *asked)[:2] == (0, tokenizer.decode(ids, skip_special_tokens=True) + "\n")


def test_json_has_text_and_figures(model: Path, wanted: str) -> None:
    status, out, _ = local(model, "generate", "--prompt", PROMPT, "--json")
    told = json.loads(out)
    assert (status, told["text"]) == (0, wanted)
    assert 0 < told["stats"]["first_token"] <= told["stats"]["total"]
    (hop,) = told["stats"]["hops"]
    assert hop["span"] == "0-6"
    assert hop["batches"] == told["stats"]["tokens"]
    assert hop["computing"] > 0


def test_drafts_change_no_answer_and_are_counted(model: Path, wanted: str) -> None:
    for draft in (("lookup",), ("early", "--early-blocks", "2"), (str(model),)):
        status, out, _ = local(model, "generate", "--prompt", PROMPT, "--json", "--draft", *draft)
        told = json.loads(out)
        assert (status, told["text"]) == (0, wanted)
    stats = told["stats"]  # of the last one, whose drafts are all right
    assert 0 < stats["accepted"] == stats["drafted"]
    assert stats["rounds"] < stats["tokens"] - 1
    assert "drafts were right" in local(model, "generate", "--prompt", PROMPT, "--stats", "--draft", str(model))[1]


def test_early_tokens_are_counted(model: Path) -> None:
    early = ("--early-blocks", "2", "--exit-threshold", "0")
    stats = json.loads(local(model, "generate", "--prompt", PROMPT, "--json", *early)[1])["stats"]
    assert stats["exited"] == stats["tokens"] - 1
    assert [hop["span"] for hop in stats["hops"]] == ["0-2", "2-6"]
    assert [hop["batches"] for hop in stats["hops"]] == [stats["tokens"], 1]


def test_stats_are_a_table(model: Path) -> None:
    status, out, _ = local(model, "generate", "--prompt", PROMPT, "--stats")
    assert status == 0
    assert "tokens a second" in " ".join(out.split())
    assert "computing" in out


def test_a_holder_that_has_come_anew_counts_from_nothing() -> None:
    hop = {"span": "0-2", "holder": "d0", "computing": 1.0, "median_ms_beyond_computing": 2.0}
    before, after = [{**hop, "batches": 1000}], [{**hop, "batches": 20, "computing": 0.5}]
    assert hops_between(before, after) == after


def test_an_answer_ends_before_a_stop_text(model: Path, wanted: str) -> None:
    stop = wanted[3:6]
    assert local(model, "generate", "--prompt", PROMPT, "--stop", stop)[1] == wanted[: wanted.index(stop)] + "\n"


def test_a_conversation_ends_with_an_empty_line() -> None:
    arguments = ("chat", "--local", "--runtime", "torch", "--max-tokens", "5", "--seed", "1")
    status, out, _ = run_cli(*arguments, text="hello\n\n")
    assert status == 0
    assert out.count("> ") == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("generate", "--prompt", "x"), "--url is missing"),
        (("chat",), "--url is missing"),
        (("generate", "--prompt", "x", "--local", "--model", "/nowhere"), "no model folder at /nowhere"),
        (("generate", "--prompt", "x", "--local", "--runtime", "jax"), "runtime 'jax' is not one of"),
        (("generate", "--prompt", "x", "--local", "--draft", "early"), "--early-blocks is missing"),
        (("generate", "--prompt", "x", "--local", "--exit-threshold", "0.5"), "--early-blocks is missing"),
        (
            ("generate", "--prompt", "x", "--local", "--early-blocks", "2", "--exit-threshold", "no"),
            "write a number, or entropy:NUMBER",
        ),
        (("generate", "--prompt", "x", "--local", "--early-blocks", "9"), "cuts 9 are not rising places inside 6"),
        (("generate", "--prompt", "x", "--local", "--adapter", "/nowhere"), "/nowhere has no adapter_config.json"),
        (("generate", "--prompt", "x", "--adapter", "a"), "give the adapter's name as --model"),
        (("generate", "--prompt", "x", "--local", "--temperature", "-1"), "temperature -1.0: choose 0 to 100"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    status, _, error = run_cli(*arguments)
    assert status == 1
    assert line in error
    assert error.count("\n") == 1


def test_a_model_without_a_template_cannot_chat(model: Path) -> None:
    status, _, error = local(model, "chat", text="hello\n")
    assert status == 1
    assert "no chat template; use `isthmus generate --prompt`" in error


def test_nobody_at_the_url_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    status, _, error = run_cli("generate", "--prompt", "x", "--url", f"http://127.0.0.1:{port}/v1")
    assert status == 1
    assert f"http://127.0.0.1:{port}/v1 cannot be reached" in error
