"""Makes the ONNX graph of a stage's blocks, or of the final norm and the head, out of a model's tensors.

The operators beside ONNX's own are ONNX Runtime's: GroupQueryAttention (rotary embedding, causal attention in a window,
and the new keys and values written into the cache), MatMulNBits, and norms with the residual sum in them.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto
from transformers import PreTrainedConfig

from isthmus.split.models.source import TensorSource
from isthmus.split.runtime.onnx_builder import ADAPTER, GraphBuilder
from isthmus.split.runtime.onnx_shape import StageShape, check_supported, together

VERSION = 1
"""The version of the graphs made here, to be raised with every change to them."""


def write_blocks(source: TensorSource, shape: StageShape, weights: str, folder: Path) -> None:
    """Write the graph of blocks into a folder. weights: of the linear modules, one of WEIGHTS.

    Inputs, for B rows of S tokens: hidden (B, S, hidden); lasts (B), the position of each row's last new token;
    counts (B), of each row's new tokens; longest (), the longest text; cosines and sines (positions, rotary dimensions
    / 2); past_key_i and past_value_i (B, kv_heads, tokens, head size) of each block.
    Where adapters are computed also adapter (B or 1), of each row or of all, and the stacks that `onnx_adapters` makes.
    Outputs: computed, as hidden; present_key_i and present_value_i, which have to be in the memory of the inputs.
    Raises BadModelFolder (a tensor is missing or misshapen), UnsupportedModel (a tensor that a graph cannot use).
    """
    with GraphBuilder(source, shape.tensors, weights, folder, shape.adapted) as graph:
        x, new = graph.input("hidden", ["B", "S", shape.hidden]), ""
        if shape.adapted:
            graph.input(ADAPTER, ["chosen"], TensorProto.INT64)
        for name in ("lasts", "counts"):
            graph.input(name, ["B"], TensorProto.INT32)
        graph.input("longest", [], TensorProto.INT32)
        for name in ("cosines", "sines"):
            graph.input(name, ["positions", "width"])
        graph.output("computed", ["B", "S", shape.hidden])
        for i in range(len(shape.windows)):
            block = f"{shape.layers}.{shape.first + i}"
            normed, x = graph.norm(f"{block}.input_layernorm", shape.epsilon, x, new)
            new = _attention(graph, shape, i, f"{block}.self_attn", normed)
            normed, x = graph.norm(f"{block}.post_attention_layernorm", shape.epsilon, x, new)
            new = _feed_forward(graph, shape, f"{block}.mlp", normed)
        graph.node("Add", [x, new], ["computed"])
        graph.save()


def write_head(source: TensorSource, weights: str, folder: Path) -> None:
    """Write the graph of the final norm and the head: hidden (tokens, hidden) -> logits (tokens, vocabulary)."""
    config = source.config
    shapes = head_tensors(config)
    norm, head = (name.removesuffix(".weight") for name in shapes)
    with GraphBuilder(source, shapes, weights, folder) as graph:
        graph.input("hidden", ["tokens", config.hidden_size])
        graph.output("logits", ["tokens", config.vocab_size])
        normed, _ = graph.norm(norm, config.rms_norm_eps, "hidden")
        graph.linear([head], normed, output="logits")
        graph.save()


def head_tensors(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the final norm's and the head's tensors; a tied head has the embedding's.

    Raises UnsupportedModel for an architecture that has another norm.
    """
    architecture = check_supported(config)
    head = architecture.embedding_tensor if config.tie_word_embeddings else architecture.head_tensor
    return {f"{architecture.norm}.weight": (config.hidden_size,), head: (config.vocab_size, config.hidden_size)}


def _attention(graph: GraphBuilder, shape: StageShape, i: int, module: str, x: str) -> str:
    first = f"{module}.qkv_proj" if graph.has(f"{module}.qkv_proj") else f"{module}.q_proj"
    query, key, value = graph.linear(together(first), x), "", ""
    if graph.has(f"{module}.q_norm"):
        sizes = [heads * shape.head_size for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        query, key, value = graph.split(query, sizes)
        query = graph.head_norm(f"{module}.q_norm", shape.epsilon, query, shape.head_size)
        key = graph.head_norm(f"{module}.k_norm", shape.epsilon, key, shape.head_size)
    cached: list[int | str] = ["B", shape.kv_heads, "tokens", shape.head_size]
    past = [graph.input(f"past_{what}_{i}", cached) for what in ("key", "value")]
    present = [graph.output(f"present_{what}_{i}", cached) for what in ("key", "value")]
    unused = [""] * 7  # between the tables and the counts: masks, sinks, and scales of quantised caches
    attended = graph.node(
        "GroupQueryAttention",
        [query, key, value, *past, "lasts", "longest", "cosines", "sines", *unused, "counts"],
        [f"attended_{i}", *present],
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        scale=shape.scale,
        do_rotary=1,
        local_window_size=shape.windows[i] or -1,
    )[0]
    return graph.linear([f"{module}.o_proj"], attended)


def _feed_forward(graph: GraphBuilder, shape: StageShape, module: str, x: str) -> str:
    if graph.has(f"{module}.gate_up_proj"):
        gate, up = graph.split(graph.linear([f"{module}.gate_up_proj"], x), [shape.intermediate] * 2)
    else:
        gate, up = (graph.linear([f"{module}.{part}_proj"], x) for part in ("gate", "up"))
    silu = graph.node("QuickGelu", [gate], alpha=1.0)  # with this alpha it is SiLU
    return graph.linear([f"{module}.down_proj"], graph.node("Mul", [*silu, up])[0])
