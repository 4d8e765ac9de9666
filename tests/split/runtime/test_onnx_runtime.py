"""A stage in ONNX Runtime computes for each of several sequences what the library's own code gives for it alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.split.errors import BadModelFolder, BadRequest, UnsupportedModel
from isthmus.split.models.source import open_model
from isthmus.split.models.stage import StageSpec, build_stages
from isthmus.split.runtime import BadPosition, Row
from isthmus.split.runtime.onnx_head import OnnxHead
from isthmus.split.runtime.onnx_runtime import OnnxRuntime
from isthmus.split.runtime.onnx_session import OnnxOptions
from isthmus.split.runtime.onnx_shape import SUPPORTED
from tests.split.runtime.stages import alone, blocks, states_of
from tests.split.tiny_models import VOCABULARY, change_config, make_model

HIDDEN = 64  # four heads of 16, the smallest there can be
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
}


def states(count: int, seed: int) -> Tensor:
    return states_of(HIDDEN, count, seed)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_model(tmp_path_factory.mktemp(name), name, hidden=HIDDEN) for name in SUPPORTED}


def start(
    folder: Path, cache: Path, first: int = 1, last: int = 4, weights: str = "float32", **settings: Any
) -> OnnxRuntime:
    settings = {"sequences": 2, "tokens": 40, "options": OnnxOptions(weights, threads=1, cache=cache), **settings}
    return OnnxRuntime(open_model(str(folder)), first, last, **settings)


@pytest.mark.parametrize("name", SUPPORTED)
def test_sequences_that_come_and_go_are_each_computed_as_if_alone(
    folders: dict[str, Path], cache: Path, name: str
) -> None:
    stage, runtime = blocks(folders[name]), start(folders[name], cache, sequences=5)
    chance = random.Random(0)
    texts = {number: states(chance.randint(12, 40), number) for number in range(12)}
    wanted = {number: alone(stage, text) for number, text in texts.items()}
    waiting, done = list(texts), dict.fromkeys(texts, 0)
    here: list[int] = []
    while waiting or here:
        while waiting and len(here) < 5:
            here.append(waiting.pop())
        chosen = chance.sample(here, chance.randint(1, len(here)))
        rows = [
            Row(one, done[one], min(chance.choice([1, 1, 1, 2, 5, 7, 20]), len(texts[one]) - done[one]))
            for one in chosen
        ]
        given = torch.cat([texts[row.sequence][row.position : row.position + row.count] for row in rows])
        output = runtime.compute(rows, given).split([row.count for row in rows])
        for row, part in zip(rows, output, strict=True):
            end = row.position + row.count
            torch.testing.assert_close(part, wanted[row.sequence][row.position : end], **CLOSE)
            done[row.sequence] = end
            if end == len(texts[row.sequence]):
                runtime.forget([row.sequence])
                here.remove(row.sequence)
            elif chance.random() < 0.3:
                done[row.sequence] -= chance.randint(0, row.count)
    assert runtime.lengths() == {}


@pytest.mark.parametrize(("first", "last"), [(0, 2), (2, 3), (3, 6), (0, 6)])
@pytest.mark.parametrize("name", SUPPORTED)
def test_any_blocks_of_a_model(folders: dict[str, Path], cache: Path, name: str, first: int, last: int) -> None:
    text = states(20, 1)
    output = start(folders[name], cache, first, last).compute([Row(0, 0, 20)], text)
    torch.testing.assert_close(output, alone(blocks(folders[name], first, last), text), **CLOSE)


def test_a_long_text_in_pieces(folders: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.split.runtime.onnx_runtime._PIECE", 17)
    text = states(40, 2)
    output = start(folders["llama"], cache).compute([Row(3, 0, 40)], text)
    torch.testing.assert_close(output, alone(blocks(folders["llama"]), text), **CLOSE)


def test_tokens_that_are_taken_back_leave_no_trace(folders: dict[str, Path], cache: Path) -> None:
    stage, runtime = blocks(folders["mistral"]), start(folders["mistral"], cache)
    right, wrong = states(30, 1), states(30, 2)
    runtime.compute([Row(0, 0, 12), Row(1, 0, 5)], torch.cat([right[:12], wrong[:5]]))
    runtime.compute([Row(0, 12, 9)], wrong[:9])
    assert runtime.lengths() == {0: 21, 1: 5}
    torch.testing.assert_close(runtime.compute([Row(0, 12, 18)], right[12:]), alone(stage, right)[12:], **CLOSE)
    torch.testing.assert_close(runtime.compute([Row(0, 0, 30)], wrong), alone(stage, wrong), **CLOSE)


def test_a_position_beyond_the_cache_is_an_error_and_changes_nothing(folders: dict[str, Path], cache: Path) -> None:
    stage, runtime = blocks(folders["llama"]), start(folders["llama"], cache)
    text = states(20, 3)
    runtime.compute([Row(0, 0, 5)], text[:5])
    for rows in ([Row(0, 6, 1)], [Row(0, 5, 1), Row(1, 3, 1)], [Row(7, 1, 1)]):
        with pytest.raises(BadPosition, match="are here"):
            runtime.compute(rows, text[: sum(row.count for row in rows)])
    assert runtime.lengths() == {0: 5}
    torch.testing.assert_close(runtime.compute([Row(0, 5, 15)], text[5:]), alone(stage, text)[5:], **CLOSE)


@pytest.mark.parametrize(
    ("rows", "hidden", "message"),
    [
        ([], states(0, 0), "one row for each"),
        ([Row(0, 0, 41)], states(41, 0), "there is room for 40"),
        ([Row(0, 0, 1), Row(1, 0, 1), Row(2, 0, 1)], states(3, 0), "room for 2 sequences"),
        ([Row(0, 0, 1)], torch.zeros(1, 32), "hidden states of 32 values in torch.float32; these blocks take 64"),
        ([Row(0, 0, 1)], states(1, 0).half(), "values in torch.float16"),
    ],
)
def test_rows_that_cannot_be_are_refused(
    folders: dict[str, Path], cache: Path, rows: list[Row], hidden: Tensor, message: str
) -> None:
    runtime = start(folders["llama"], cache)
    with pytest.raises(BadRequest, match=message):
        runtime.compute(rows, hidden)
    assert runtime.lengths() == {}


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_nan_of_one_sequence_is_not_seen_by_others(folders: dict[str, Path], cache: Path, name: str) -> None:
    stage, runtime = blocks(folders[name]), start(folders[name], cache)
    text = states(40, 4)
    broken = torch.full((40, HIDDEN), torch.nan)
    runtime.compute([Row(0, 0, 40), Row(1, 0, 40)], torch.cat([broken, broken]))
    runtime.forget([0])
    runtime.compute([Row(2, 0, 3)], text[:3])
    for at in range(3, 20):
        output = runtime.compute([Row(1, 39, 1), Row(2, at, 1)], torch.cat([broken[:1], text[at : at + 1]]))
        torch.testing.assert_close(output[1:], alone(stage, text)[at : at + 1], **CLOSE)
    torch.testing.assert_close(runtime.compute([Row(2, 20, 20)], text[20:]), alone(stage, text)[20:], **CLOSE)


def test_rows_with_few_tokens_share_calls(
    folders: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = OnnxRuntime._run

    def count(self: OnnxRuntime, first: int, positions: list[int], *others: Any) -> None:
        calls.append(len(positions))
        run(self, first, positions, *others)

    monkeypatch.setattr(OnnxRuntime, "_run", count)
    runtime = start(folders["llama"], cache, sequences=8)

    def calls_of(rows: list[Row]) -> list[int]:
        calls.clear()
        runtime.compute(rows, states(sum(row.count for row in rows), 0))
        return calls

    assert calls_of([Row(i, 0, 1) for i in range(8)]) == [8]
    assert calls_of([Row(1, 1, 1), Row(4, 1, 1), Row(7, 1, 1)]) == [3]
    assert calls_of([Row(0, 1, 4), Row(3, 0, 5), Row(5, 1, 3)]) == [3]
    assert calls_of([Row(0, 1, 30), Row(3, 1, 30), Row(5, 1, 1), Row(6, 1, 1)]) == [1, 1, 2]
    assert calls_of([Row(0, 31, 8), Row(1, 0, 40), Row(3, 31, 9)]) == [1, 2]
    assert sorted(calls_of([Row(1, 39, 1), Row(0, 31, 3)])) == [1, 1]


@pytest.mark.parametrize("window", [1, 2, 17, 64, None])
def test_windows_shorter_and_longer_than_the_text(tmp_path: Path, window: int | None) -> None:
    folder = make_model(tmp_path / "model", "mistral", layers=3, hidden=HIDDEN, sliding_window=window)
    check_growing(folder, tmp_path, 0, 3)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_windows_of_some_blocks_only(tmp_path: Path, name: str) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    changes = {"use_sliding_window": True, "sliding_window": 6, "layer_types": kinds}
    check_growing(make_model(tmp_path / "model", name, layers=4, hidden=HIDDEN, **changes), tmp_path, 1, 4)


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rotary_frequencies(tmp_path: Path, rope: str) -> None:
    folder = make_model(tmp_path / "model", "llama", layers=2, hidden=HIDDEN, rope_parameters=ROPES[rope])
    check_growing(folder, tmp_path, 0, 2)


def test_biases_everywhere(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", layers=2, hidden=HIDDEN, attention_bias=True, mlp_bias=True)
    check_growing(folder, tmp_path, 0, 2)


def test_heads_of_another_size_than_a_share_of_the_width(tmp_path: Path) -> None:
    check_growing(make_model(tmp_path / "model", "qwen3", layers=2, hidden=HIDDEN, head_dim=32), tmp_path, 0, 2)


def test_rotary_dimensions_that_are_a_part_of_a_head(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    settings = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    check_growing(make_model(tmp_path / "model", "phi3", layers=2, hidden=HIDDEN, **settings), tmp_path, 0, 2)


def test_longrope_takes_the_frequencies_of_a_rows_length(tmp_path: Path) -> None:
    rope = {**LONGROPE, "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    folder = make_model(tmp_path / "model", "phi3", layers=2, hidden=HIDDEN, rope_parameters=rope)
    stage, runtime = blocks(folder, 0, 2), start(folder, tmp_path / "graphs", 0, 2)
    text = states(30, 5)
    output = runtime.compute([Row(0, 0, 16), Row(1, 0, 30)], torch.cat([text[:16], text]))
    torch.testing.assert_close(output[:16], alone(stage, text[:16]), **CLOSE)
    torch.testing.assert_close(output[16:], alone(stage, text), **CLOSE)


def check_growing(folder: Path, tmp_path: Path, first: int, last: int) -> None:
    """A first piece, single tokens, and several at once."""
    stage, runtime = blocks(folder, first, last), start(folder, tmp_path / "graphs", first, last)
    text = states(40, 6)
    output = [
        runtime.compute([Row(0, at, 1 if at else 18)], text[at : at + 1 if at else 18]) for at in [0, *range(18, 30)]
    ]
    output.append(runtime.compute([Row(0, 30, 10)], text[30:]))
    torch.testing.assert_close(torch.cat(output), alone(stage, text), **CLOSE)


@pytest.mark.parametrize(("weights", "wrong"), [("int8", 0.02), ("int4", 0.25)])
@pytest.mark.parametrize("name", SUPPORTED)
def test_few_bits_are_close(folders: dict[str, Path], cache: Path, name: str, weights: str, wrong: float) -> None:
    text = states(30, 7)
    wanted = alone(blocks(folders[name]), text) - text
    runtime = start(folders[name], cache, weights=weights)
    output = (
        torch.cat([runtime.compute([Row(0, 0, 29)], text[:29]), runtime.compute([Row(0, 29, 1)], text[29:])]) - text
    )
    assert 0 < (output - wanted).norm() < wrong * wanted.norm()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", SUPPORTED)
def test_the_head_gives_the_logits(tmp_path: Path, name: str, tied: bool) -> None:
    source = open_model(str(make_model(tmp_path / "model", name, layers=1, hidden=HIDDEN, tied=tied)))
    tail = build_stages(source, [StageSpec(1, 1, embeds=False, head=True)])[0]
    hidden = states(3, 8)
    logits = OnnxHead(source, OnnxOptions(cache=tmp_path, threads=1))(hidden)
    assert logits.shape == (3, VOCABULARY)
    torch.testing.assert_close(logits, alone(tail, hidden), **CLOSE)


def test_what_a_graph_cannot_compute_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    gpt2 = make_model(tmp_path / "gpt2", "gpt2", layers=2)
    with pytest.raises(UnsupportedModel, match="no ONNX graph for gpt2; there is one for llama"):
        start(gpt2, tmp_path, 0, 2)
    with pytest.raises(UnsupportedModel, match="no ONNX graph for gpt2"):
        OnnxHead(open_model(str(gpt2)), OnnxOptions(cache=tmp_path))
    small = make_model(tmp_path / "small", "llama", layers=2, hidden=32)
    with pytest.raises(UnsupportedModel, match="heads of 8"):
        start(small, tmp_path, 0, 2)
    relu = make_model(tmp_path / "relu", "llama", layers=2, hidden=HIDDEN, hidden_act="relu")
    with pytest.raises(UnsupportedModel, match="hidden_act relu"):
        start(relu, tmp_path, 0, 2)
    with pytest.raises(BadRequest, match="weights cannot be 'int3'"):
        start(folders["llama"], tmp_path, weights="int3")
    for first, last in ((3, 3), (4, 7)):
        with pytest.raises(BadRequest, match="not a stage"):
            start(folders["llama"], tmp_path, first, last)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", layers=2, hidden=HIDDEN)
    change_config(folder, intermediate_size=96)
    with pytest.raises(BadModelFolder, match="its configuration says"):
        start(folder, tmp_path / "graphs", 0, 2)
