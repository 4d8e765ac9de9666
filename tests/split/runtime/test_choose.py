"""Which runtime a stage gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.split.errors import BadRequest, UnsupportedModel
from isthmus.split.models.source import open_model
from isthmus.split.runtime.base import Row
from isthmus.split.runtime.choose import AUTO, ONNX, TORCH, RuntimeChoice, make_head, make_runtime, pick_runtime
from isthmus.split.runtime.onnx_runtime import OnnxRuntime
from isthmus.split.runtime.torch_runtime import TorchRuntime
from tests.split.tiny_models import make_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", hidden=64)


@pytest.mark.parametrize(("name", "kind"), [(TORCH, TorchRuntime), (ONNX, OnnxRuntime)])
def test_what_was_asked_for_is_made(llama: Path, tmp_path: Path, name: str, kind: type) -> None:
    choice = RuntimeChoice(name, cache=tmp_path)
    assert isinstance(make_runtime(open_model(str(llama)), 1, 3, choice, sequences=2, tokens=20), kind)


def test_auto_takes_one_that_computes_the_same(llama: Path, tmp_path: Path) -> None:
    source = open_model(str(llama))
    assert pick_runtime(source, 1, RuntimeChoice(AUTO, cache=tmp_path)) in (TORCH, ONNX)
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    outputs = [
        make_runtime(source, 0, 6, RuntimeChoice(name, cache=tmp_path), sequences=1, tokens=20).compute(
            [Row(0, 0, 9)], hidden
        )
        for name in (AUTO, TORCH)
    ]
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


def test_auto_takes_torch_for_what_a_graph_cannot_compute(tmp_path: Path) -> None:
    source = open_model(str(make_model(tmp_path / "gpt2", "gpt2")))
    assert pick_runtime(source, 0, RuntimeChoice(AUTO, cache=tmp_path)) == TORCH
    assert make_head(source, RuntimeChoice(AUTO, cache=tmp_path)) is None
    with pytest.raises(UnsupportedModel):
        make_runtime(source, 0, 1, RuntimeChoice(ONNX, cache=tmp_path), sequences=1, tokens=8)


@pytest.mark.parametrize(
    ("runtime", "weights", "line"),
    [
        ("tensorrt", "float32", "runtime 'tensorrt' is not one of auto, torch, onnxruntime"),
        ("auto", "int3", "weights 'int3' are not one of float32, int8, int4"),
        ("torch", "int8", "runtime torch has float32 weights; choose onnxruntime for int8"),
    ],
)
def test_what_there_is_not_is_refused(runtime: str, weights: str, line: str) -> None:
    with pytest.raises(BadRequest, match=line):
        RuntimeChoice(runtime, weights)
