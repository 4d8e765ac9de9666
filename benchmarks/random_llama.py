"""Models of random parameters: what is timed does not depend on what a model has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "large": (768, 2048, 12, 12, 12),  # 97.5 million parameters
    "billion": (2048, 5632, 22, 32, 4),  # 1.0 thousand million; 4 GB
}
"""Widths of hidden states and of the MLP, blocks, heads, heads of keys and values."""


def write_random_llama(folder: Path, size: str = "large") -> Path:
    """A Llama of random parameters (SIZES) and a tokenizer of bytes, in hub format."""
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast  # its constructor is not typed
    fast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def model_named(name: str, folder: Path) -> str:
    """The model that a benchmark's user names: for `large` and `billion` (SIZES) a folder, made inside this one."""
    return str(write_random_llama(folder / "llama", name)) if name in SIZES else name
