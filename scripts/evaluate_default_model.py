"""Measure a model made by train_default_model.py: the tables of its model card.

Bits per byte at every exit on the held-out documents and on the three private texts of the demo, which it has not
seen, and the perplexity per token of the last layer, from windows of the model's whole context.

    python scripts/evaluate_default_model.py split/models/default
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from train_default_model import bits_per_byte, encode, is_held_out
from transformers import AutoModelForCausalLM, AutoTokenizer

from isthmus.split.data.stdlib_text import PRIVATE_MODULES, StdlibDocument, private_text, training_documents


def perplexity(bits: float, tokens: Tensor, byte_lengths: Tensor, length: int) -> float:
    """Per token, over the same windows that `bits_per_byte` measures."""
    scored = tokens[1 : (len(tokens) - 2) // length * length + 1]
    return math.exp(bits * math.log(2) * int(byte_lengths[scored].sum()) / len(scored))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder)
    byte_lengths = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    byte_lengths[tokenizer.eos_token_id] = 0
    length = model.config.max_position_embeddings
    texts = {"held-out documents": [d for d in training_documents() if is_held_out(d)]}
    texts |= {f"`{name}` (source code)": [StdlibDocument(name, private_text(name))] for name in PRIVATE_MODULES}
    exits = " | ".join(f"exit {i + 1}" for i in range(model.config.num_hidden_layers))
    print(f"| text | tokens | {exits} | perplexity |")
    print("| --- " * (model.config.num_hidden_layers + 3) + "|")
    for name, documents in texts.items():
        tokens = encode(tokenizer, documents)
        bits = bits_per_byte(model, tokens, byte_lengths, length, 10**6)
        row = " | ".join(f"{value:.3f}" for value in bits)
        print(f"| {name} | {len(tokens)} | {row} | {perplexity(bits[-1], tokens, byte_lengths, length):.1f} |")


if __name__ == "__main__":
    main()
