"""llama.cpp as a peer: a Llama of random weights in its format, and what its own benchmark says."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from isthmus.split.errors import BadData, BadRequest, LinkLost
from isthmus.split.models.source import open_model

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, file: Path) -> Path:
    """A Llama in hub format -> GGUF in float32, without a vocabulary. The order of rotary dimensions is not changed:
    it computes something else, in the same time.
    """
    try:
        import gguf
    except ImportError:
        raise BadRequest("--llama-cpp needs the package gguf: pip install gguf") from None
    source = open_model(str(folder))
    config: Any = source.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name in sorted(source.tensor_names()):
        writer.add_tensor(_gguf_name(name), source.read(name).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, index, part = name.split(".", 3)
    return f"blk.{index}.{_BLOCK[part.removesuffix('.weight')]}.weight"


def bench(binaries: Path, file: Path, threads: int, servers: list[str] | None = None) -> dict[str, float]:
    """Tokens a second: decode (64 tokens), prefill (128). servers: HOST:PORT of RPC servers to spread over."""
    program = binaries / "llama-bench"
    if not program.is_file():
        raise BadData(f"no llama-bench in {binaries}: scripts/build_llama_cpp.sh builds it")
    command = [str(program), "-m", str(file), "-p", "128", "-n", "64", "-t", str(threads), "-r", "3", "-o", "json"]
    if servers:
        command += ["-ngl", "99", "--rpc", ",".join(servers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkLost(f"llama-bench failed: {done.stderr.strip().splitlines()[-1:]}")
    runs = json.loads(done.stdout)
    return {
        "decode": next(run["avg_ts"] for run in runs if run["n_gen"]),
        "prefill": next(run["avg_ts"] for run in runs if not run["n_gen"]),
    }


@contextmanager
def rpc_servers(binaries: Path, count: int, threads: int) -> Iterator[list[str]]:
    """llama.cpp's RPC servers on loopback, ended with the context."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        addresses = []
        for _ in range(count):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            command = [str(binaries / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", str(threads)]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            _wait_listening(processes[-1].pid, port)
            addresses.append(f"127.0.0.1:{port}")
        yield addresses
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait_listening(pid: int, port: int) -> None:
    process = psutil.Process(pid)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if any(one.laddr.port == port and one.status == psutil.CONN_LISTEN for one in process.net_connections()):
            return
    raise LinkLost("llama.cpp's RPC server ended as it began")
