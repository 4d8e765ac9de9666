"""An ONNX graph that grows node by node, whose weights come from a model's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from isthmus.split.errors import BadModelFolder, BadRequest, UnsupportedModel
from isthmus.split.models.source import TensorSource
from isthmus.split.runtime.onnx_weights import BITS, BLOCK, WEIGHTS, WeightsFile, quantise

MODEL_NAME = "model.onnx"
DATA_NAME = "weights.bin"
ADAPTER = "adapter"
"""The input that says which adapter each row has, or all rows have; 0: none."""

_CONTRIB = "com.microsoft"
_DOMAINS = {
    "GroupQueryAttention": _CONTRIB,
    "MatMulNBits": _CONTRIB,
    "QuickGelu": _CONTRIB,
    "SkipSimplifiedLayerNormalization": _CONTRIB,
}
_OPSET = 21
_IR_VERSION = 10


class GraphBuilder:
    """A context manager; save() writes the graph, and its weights are beside it.

    A value is spoken of by its name, "" is one that is left out. Modules are named as in the checkpoint.
    Reading raises BadModelFolder for a tensor that is missing or misshapen.
    """

    def __init__(
        self,
        source: TensorSource,
        shapes: Mapping[str, tuple[int, ...]],
        weights: str,
        folder: Path,
        adapted: Set[str] = frozenset(),
    ) -> None:
        """Begin a graph. shapes: of the tensors to be used. weights: format of the linear modules' weights.

        Raises BadRequest for a format that is none of WEIGHTS.
        """
        if weights not in WEIGHTS:
            raise BadRequest(f"weights cannot be {weights!r}; choose {', '.join(WEIGHTS)}")
        self._source, self._shapes, self._bits, self._folder = source, shapes, BITS.get(weights), folder
        self._unused, self._adapted = set(shapes), adapted
        self._file = WeightsFile(folder / DATA_NAME)
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[TensorProto] = []
        self._count = 0

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def input(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def node(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str] | int = 1, **attributes: Any
    ) -> list[str]:
        """Add a node. outputs: their names, or how many. Returns the names."""
        names = [self._fresh() for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        domain = _DOMAINS.get(operator, "")
        self._nodes.append(helper.make_node(operator, inputs, names, self._fresh(), domain=domain, **attributes))
        return names

    def has(self, module: str) -> bool:
        return f"{module}.weight" in self._shapes

    def linear(self, modules: Sequence[str], x: str, *, output: str | None = None) -> str:
        """(…, inputs) -> (…, outputs of all modules after one another)."""
        weight = torch.cat([self._read(f"{module}.weight") for module in modules])
        biases = [self._read(f"{module}.bias") for module in modules if f"{module}.bias" in self._shapes]
        if biases and len(biases) < len(modules):
            raise UnsupportedModel(f"no ONNX graph for {modules[0]} and its like, of which only some have a bias")
        name = modules[0]
        bias = self._file.add(f"{name}.bias", torch.cat(biases)) if biases else ""
        outputs = [output or self._fresh()]
        if not self._adapted.isdisjoint(modules):
            base = self._product(name, x, weight, bias, [self._fresh()])
            return self.node("Add", [base, self._beside(name, x, weight.shape)], outputs)[0]
        return self._product(name, x, weight, bias, outputs)

    def _product(self, name: str, x: str, weight: Tensor, bias: str, outputs: Sequence[str]) -> str:
        """x by a weight (outputs, inputs), with a bias."""
        if self._bits is not None:
            values, scales = quantise(weight, self._bits)
            inputs = [
                x,
                self._file.add(f"{name}.values", values),
                self._file.add(f"{name}.scales", scales),
                "",
                "",
                bias,
            ]
            sizes = {"N": weight.shape[0], "K": weight.shape[1], "bits": self._bits, "block_size": BLOCK}
            return self.node("MatMulNBits", inputs, outputs, accuracy_level=4, **sizes)[0]
        inputs = [x, self._file.add(f"{name}.weight", weight.T)]
        if not bias:
            return self.node("MatMul", inputs, outputs)[0]
        return self.node("Add", [*self.node("MatMul", inputs), bias], outputs)[0]

    def _beside(self, name: str, x: str, shape: Sequence[int]) -> str:
        """Add what each row's adapter adds to x, (rows, tokens, inputs). shape: (outputs, inputs) of the module."""
        rank = f"{name}.rank"
        for part, rows, columns in (("a", shape[1], rank), ("b", rank, shape[0])):
            stack = self.input(f"{name}.lora_{part}", ["adapters", rows, columns])
            (x,) = self.node("MatMul", [x, *self.node("Gather", [stack, ADAPTER])])
        return x

    def norm(self, module: str, epsilon: float, x: str, new: str = "") -> tuple[str, str]:
        """Root mean square norm of x + new over the last dimension; returns it and the sum."""
        gain = self._file.add(module, self._read(f"{module}.weight"))
        if not new:
            return self.node("SimplifiedLayerNormalization", [x, gain], axis=-1, epsilon=epsilon)[0], x
        outputs = [self._fresh(), "", "", self._fresh()]
        self.node("SkipSimplifiedLayerNormalization", [x, new, gain], outputs, epsilon=epsilon)
        return outputs[0], outputs[3]

    def head_norm(self, module: str, epsilon: float, x: str, head_size: int) -> str:
        """The norm of every head on its own; x: (B, S, heads * head size)."""
        (heads,) = self.node("Reshape", [x, self._integers([0, 0, -1, head_size])])
        normed, _ = self.norm(module, epsilon, heads)
        return self.node("Reshape", [normed, self._integers([0, 0, -1])])[0]

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """Cut the last dimension into parts of these sizes."""
        return self.node("Split", [x, self._integers(sizes)], len(sizes), axis=-1)

    def save(self) -> None:
        """Write the graph; raises UnsupportedModel if it has no use for one of the tensors."""
        if self._unused:
            raise UnsupportedModel(f"no ONNX graph for blocks with a tensor {min(self._unused)}")
        graph = helper.make_graph(
            self._nodes, "isthmus", self._inputs, self._outputs, [*self._file.initializers, *self._constants]
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="isthmus")
        (self._folder / MODEL_NAME).write_bytes(model.SerializeToString())

    def _read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        if tuple(tensor.shape) != self._shapes[name]:
            raise BadModelFolder(f"{name} has shape {tuple(tensor.shape)}, its configuration says {self._shapes[name]}")
        if not tensor.is_floating_point():
            raise UnsupportedModel(f"{name} has data type {tensor.dtype}; only float checkpoints can be split")
        self._unused.discard(name)
        return tensor.to(torch.float32)

    def _integers(self, values: Sequence[int]) -> str:
        name = self._fresh()
        self._constants.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def _fresh(self) -> str:
        self._count += 1
        return f"v{self._count}"
