"""Graphs on disk: made once, made again when damaged or when what they were made from has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.split.errors import BadRequest
from isthmus.split.models.source import ModelFolder, TensorSource, open_model
from isthmus.split.runtime import Row
from isthmus.split.runtime.onnx_cache import LIMIT, default_cache
from isthmus.split.runtime.onnx_graph import write_blocks
from isthmus.split.runtime.onnx_runtime import OnnxRuntime
from isthmus.split.runtime.onnx_session import OnnxOptions
from isthmus.split.runtime.onnx_weights import BITS, quantise
from tests.split.tiny_models import make_model

HIDDEN = 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "llama", layers=2, hidden=HIDDEN)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights of each graph that is made."""
    made: list[str] = []

    def count(source: TensorSource, shape: Any, weights: str, folder: Path) -> None:
        made.append(weights)
        write_blocks(source, shape, weights, folder)

    monkeypatch.setattr("isthmus.split.runtime.onnx_runtime.write_blocks", count)
    return made


def compute(source: TensorSource, cache: Path | None, **settings: Any) -> torch.Tensor:
    return held(source, cache, **settings).compute([Row(0, 0, 3)], torch.ones(3, HIDDEN))


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_a_graph_is_made_once(folder: Path, tmp_path: Path, written: list[str]) -> None:
    cache = tmp_path / "deep" / "graphs"
    first = compute(open_model(str(folder)), cache)
    assert torch.equal(first, compute(open_model(str(folder)), cache))
    assert written == ["float32"]
    compute(open_model(str(folder)), cache, weights="int8")
    assert written == ["float32", "int8"]
    assert len(entries(cache)) == 2


def test_another_checkpoint_is_another_graph(folder: Path, tmp_path: Path, written: list[str]) -> None:
    first = compute(open_model(str(folder)), tmp_path / "graphs")
    make_model(folder, "llama", layers=2, hidden=HIDDEN, seed=1)
    weights = folder / "model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not torch.equal(first, compute(open_model(str(folder)), tmp_path / "graphs"))
    assert len(written) == 2


def test_other_sources_are_known_by_their_values(folder: Path, tmp_path: Path, written: list[str]) -> None:
    class Elsewhere:
        def __init__(self, inner: ModelFolder) -> None:
            self.config, self.tokenizer, self.tensor_names = inner.config, inner.tokenizer, inner.tensor_names
            self.read = inner.read

    for _ in range(2):
        compute(Elsewhere(open_model(str(folder))), tmp_path / "graphs")
    assert written == ["float32"]
    make_model(folder, "llama", layers=2, hidden=HIDDEN, seed=1)
    compute(Elsewhere(open_model(str(folder))), tmp_path / "graphs")
    assert len(written) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "seal"])
def test_a_damaged_graph_is_made_again(folder: Path, tmp_path: Path, written: list[str], damage: str) -> None:
    cache = tmp_path / "graphs"
    first = compute(open_model(str(folder)), cache)
    (entry,) = entries(cache)
    weights = entry / "weights.bin"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 0x80
        weights.write_bytes(data)
    elif damage == "truncate":
        os.truncate(weights, 1000)
    elif damage == "remove":
        (entry / "model.onnx").unlink()
    else:
        (entry / "digests.json").write_text("{}")
    assert torch.equal(first, compute(open_model(str(folder)), cache))
    assert torch.equal(first, compute(open_model(str(folder)), cache))
    assert len(written) == 2


def test_a_graph_that_was_not_finished_is_no_graph(folder: Path, tmp_path: Path, written: list[str]) -> None:
    cache = tmp_path / "graphs"
    first = compute(open_model(str(folder)), cache)
    (entry,) = entries(cache)
    entry.rename(entry.with_name(f"{entry.name}.part"))
    assert torch.equal(first, compute(open_model(str(folder)), cache))
    assert entries(cache) == [entry]


def test_a_cache_that_cannot_be_written_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="cannot keep ONNX graphs in"):
        compute(open_model(str(folder)), tmp_path / "file")


def held(source: TensorSource, cache: Path | None, weights: str = "float32") -> OnnxRuntime:
    return OnnxRuntime(source, 0, 2, sequences=1, tokens=8, options=OnnxOptions(weights, threads=1, cache=cache))


def test_the_longest_unused_graphs_go_when_there_is_no_room(
    folder: Path, tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, source = tmp_path / "graphs", open_model(str(folder))
    for weights in ("int4", "int8"):
        compute(source, cache, weights=weights)
    use = {path: path.stat().st_mtime for path in cache.glob("*.use")}
    for number, path in enumerate(sorted(use, key=lambda one: use[one])):
        os.utime(path, (1000 + number, 1000 + number))  # int4 first
    compute(source, cache, weights="int4")  # used again: int8 is the oldest now
    size = sum(file.stat().st_size for entry in entries(cache) for file in entry.iterdir())
    monkeypatch.setenv(LIMIT, str((size + 1) / 2**30))
    compute(source, cache, weights="float32")
    compute(source, cache, weights="float32")
    assert len(entries(cache)) == 1  # the new one is larger than both
    compute(source, cache, weights="int4")
    assert written == ["int4", "int8", "float32", "int4"]
    assert len(entries(cache)) == 1


def test_a_graph_that_is_in_use_stays(
    folder: Path, tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "0")
    cache, source = tmp_path / "graphs", open_model(str(folder))
    runtimes = [held(source, cache, weights) for weights in ("float32", "int8")]
    again = held(source, cache)
    assert written == ["float32", "int8"]
    assert len(entries(cache)) == 2
    first, *_ = runtimes
    del runtimes, _
    held(source, cache, "int4")
    assert len(entries(cache)) == 2  # int8 went; int4 was in use while it was looked at
    assert torch.equal(*(one.compute([Row(0, 0, 3)], torch.ones(3, HIDDEN)) for one in (first, again)))


def test_a_graph_that_another_process_uses_stays(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, source = tmp_path / "graphs", open_model(str(folder))
    compute(source, cache)
    (entry,) = entries(cache)
    program = (
        f"import sys; from pathlib import Path; from isthmus.split.runtime.onnx_cache import CachedGraph; "
        f"graph = CachedGraph(Path({str(entry)!r})); print('here', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    monkeypatch.setenv(LIMIT, "0")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        compute(source, cache, weights="int8")
        assert entry in entries(cache)
        other.stdin.close()
        other.wait(60)
    compute(source, cache, weights="int4")
    assert entry not in entries(cache)


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_limit_that_is_none_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(BadRequest, match=f"{LIMIT}='{text}': give the GiB"):
        compute(open_model(str(folder)), tmp_path / "graphs")


def test_the_default_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    compute(open_model(str(folder)), None)
    assert default_cache() == tmp_path / "home" / "isthmus" / "onnx"
    assert len(entries(default_cache())) == 1


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("inputs", [64, 40])
def test_quantised_weights_are_within_a_step(bits: int, inputs: int) -> None:
    weight = torch.randn(6, inputs, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    values, scales = quantise(weight, bits)
    assert values.shape == (6, 2, 4 * bits)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], dim=-1).flatten(2)
    back = ((values.float() - 2 ** (bits - 1)) * scales[..., None]).flatten(1)[:, :inputs]
    steps = scales.abs().repeat_interleave(32, dim=1)[:, :inputs]
    assert ((back - weight).abs() <= steps * 1.0001).all()
    assert back[2].eq(0).all()
