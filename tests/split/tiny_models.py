"""Tiny random models of every supported architecture, in hub format, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from isthmus.split.models.architectures import architecture_of

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox")
VOCABULARY = 300

_CONFIGS: dict[str, str] = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "mistral": "MistralConfig",
    "phi3": "Phi3Config",
    "gpt2": "GPT2Config",
    "gpt_neox": "GPTNeoXConfig",
}
_TEXT = [
    "The two sides of a narrow land bridge trade through it, and what crosses it is counted.",
    "A device keeps its text; only hidden states and their gradients leave it.",
    "Numbers 0 1 2 3 4 5 6 7 8 9, and a line\nbreak.",
]


def make_config(
    architecture: str, *, layers: int = 6, hidden: int = 32, tied: bool = False, **changes: Any
) -> transformers.PreTrainedConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if architecture != "gpt2":
        settings["intermediate_size"] = 2 * hidden
    if architecture not in ("gpt2", "gpt_neox"):
        settings["num_key_value_heads"] = 2
    if architecture == "qwen3":
        settings["head_dim"] = hidden // 4
    if architecture == "mistral":
        settings["sliding_window"] = 8
    config: transformers.PreTrainedConfig = getattr(transformers, _CONFIGS[architecture])(**(settings | changes))
    return config


def make_model(
    folder: Path,
    architecture: str,
    *,
    layers: int = 6,
    hidden: int = 32,
    tied: bool = False,
    shards: int = 1,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write config, random float32 weights (about `shards` safetensors files) and a tokenizer; return the folder.

    changes: further settings of the configuration. Mistral has a sliding window of 8 unless they say otherwise.
    """
    config = make_config(architecture, layers=layers, hidden=hidden, tied=tied, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = getattr(transformers, architecture_of(config).model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than at a real start, and none at exactly 0 or 1, so that a wrong split shows.
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else -(-size // shards))
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most VOCABULARY entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast: Any = PreTrainedTokenizerFast  # its constructor is not typed
    return cast(PreTrainedTokenizerFast, fast(tokenizer_object=tokenizer, eos_token="<eos>"))


def change_config(folder: Path, **changes: Any) -> None:
    """Change settings of a config.json by hand."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
