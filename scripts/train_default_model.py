"""Train the small model that comes with the package: a 5.3 million parameter Llama on text that every Python has.

The text is `isthmus.split.data.stdlib_text`: docstrings, comments and the language reference of the standard library.
One document in twenty, chosen by the hash of its name, is held out. Training is AdamW with a warm-up / stable / decay
schedule and LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710): layers are dropped at random, deeper ones more often,
and one intermediate layer a step also predicts the next token through the shared head, so that decoding can stop early.

    python scripts/train_default_model.py --minutes 90 --threads 1 --out split/models/default

The folder always holds the best weights so far; `--state` is where training continues from if it is started again.
With the same seed, threads, kind of processor and packages, `--steps S --decay-from D` (both are in training.json)
gives the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from isthmus.split.data.stdlib_text import StdlibDocument, text_digest, training_documents

END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the weights, besides the text and the machine."""

    seed: int = 0
    steps: int = 3000
    decay_from: int = 2250
    warmup_steps: int = 60
    batch_tokens: int = 2048
    context: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    largest_layer_dropout: float = 0.1
    exit_scale: float = 1.0
    clip: float = 1.0


def train_tokenizer(texts: Sequence[str], vocabulary: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, and decoding gives it back byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def model_config(vocabulary: int, context: int) -> LlamaConfig:
    """Hidden size 256, 6 layers, 4 heads over 2 key-value heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=672,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def is_held_out(document: StdlibDocument) -> bool:
    """One document in twenty, chosen by its name: the same ones on every machine."""
    return hashlib.sha256(document.name.encode()).digest()[0] % 20 == 0


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[StdlibDocument]) -> Tensor:
    """All documents in one row of token ids, each ended by the end-of-text token."""
    rows = tokenizer([d.text for d in documents], verbose=False)["input_ids"]
    ids = [i for row in rows for i in [*row, tokenizer.eos_token_id]]
    return torch.tensor(ids)


def batch(tokens: Tensor, recipe: Recipe, step: int) -> Tensor:
    """(rows, length + 1) token ids of this step: a function of seed and step only, so resuming needs no more.

    An epoch is every window once, in random order and from a random offset. Three steps of four cut the
    windows in half, which trains short contexts on twice the rows.
    """
    length = recipe.context
    rows = recipe.batch_tokens // length
    windows = (len(tokens) - 1 - length) // length
    steps_per_epoch = windows // rows
    epoch, index = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    offset = int(torch.randint(length, (), generator=generator))
    chosen = torch.randperm(windows, generator=generator)[index * rows : (index + 1) * rows]
    starts = (offset + chosen * length).tolist()
    if step % 4:
        length //= 2
        starts = [start + half for start in starts for half in (0, length)]
    return torch.stack([tokens[start : start + length + 1] for start in starts])


def hidden_states(model: LlamaForCausalLM, ids: Tensor, drop: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
    """Normed hidden states (rows, length, hidden) after each layer; `drop[layer]` (rows,): which rows skip it."""
    body = model.model
    x = body.embed_tokens(ids)
    positions = body.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for index, layer in enumerate(body.layers):
        keep = None if drop is None else (~drop[index]).nonzero()[:, 0]
        if keep is None or len(keep) == len(x):
            x = layer(x, attention_mask=None, position_embeddings=positions)
        elif len(keep):
            x = x.index_copy(0, keep, layer(x[keep], attention_mask=None, position_embeddings=positions))
        yield body.norm(x)


def dropped_rows(recipe: Recipe, layers: int, rows: int, step: int) -> list[Tensor]:
    """LayerSkip's layer dropout, section 4.1.1: probability grows exponentially from 0 at the first layer."""
    generator = torch.Generator().manual_seed((recipe.seed + 1) * 1_000_000_007 + step)
    rates = [recipe.largest_layer_dropout * (math.exp(i * math.log(2) / (layers - 1)) - 1) for i in range(layers)]
    return [torch.rand(rows, generator=generator) < rate for rate in rates]


def training_loss(model: LlamaForCausalLM, rows: Tensor, recipe: Recipe, step: int) -> Tensor:
    """Next-token loss of the last layer and of one earlier exit (rotating), weighted as in LayerSkip, section 4.1.2."""
    layers = model.config.num_hidden_layers
    exit_layer = step % (layers - 1)
    scale = [recipe.exit_scale * (i + 1) * i / 2 for i in range(1, layers)]
    scale.append(layers - 1 + recipe.exit_scale * layers * (layers - 1) / 2)
    weights = {i: scale[i] / (scale[exit_layer] + scale[-1]) for i in (exit_layer, layers - 1)}
    loss = torch.zeros(())
    targets = rows[:, 1:].reshape(-1)
    for index, x in enumerate(hidden_states(model, rows[:, :-1], dropped_rows(recipe, layers, len(rows), step))):
        if index in weights:
            loss = loss + weights[index] * F.cross_entropy(model.lm_head(x).flatten(0, 1), targets)
    return loss


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM, tokens: Tensor, byte_lengths: Tensor, length: int, limit: int
) -> list[float]:
    """Bits per byte of the held-out text at every exit, from windows of `length` with no context across windows.

    limit: at most so many windows, evenly spread. End-of-text tokens cost bits and count as no bytes.
    """
    starts = list(range(0, len(tokens) - 1 - length, length))
    starts = starts[:: max(1, math.ceil(len(starts) / limit))]
    nats = [0.0] * model.config.num_hidden_layers
    size = 0
    model.eval()
    for at in range(0, len(starts), 8):
        rows = torch.stack([tokens[start : start + length + 1] for start in starts[at : at + 8]])
        size += int(byte_lengths[rows[:, 1:]].sum())
        for index, x in enumerate(hidden_states(model, rows[:, :-1])):
            loss = F.cross_entropy(model.lm_head(x).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            nats[index] += float(loss)
    model.train()
    return [value / math.log(2) / size for value in nats]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a stable stretch, then linear decay to zero from `decay_from` on."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if step < recipe.decay_from:
        return recipe.learning_rate
    return recipe.learning_rate * max(0.0, (recipe.steps - step) / (recipe.steps - recipe.decay_from))


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-8)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` beside the file, then a rename, so that a reader never meets half a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    write_atomically(path, lambda to: to.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Weights in float16 (the tied head once); config.json says float32, which is what they are loaded as."""
    model.config.dtype = torch.float32
    model.config.architectures = ["LlamaForCausalLM"]
    config = json.loads(model.config.to_json_string(use_diff=True))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 0, "max_new_tokens": 128})
    half = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    write_atomically(folder / "model.safetensors", lambda to: save_file(half, to, metadata={"format": "pt"}))


def save_state(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, progress: dict[str, object]) -> None:
    """All that training continues from: weights and AdamW moments as safetensors, the rest as JSON in its header."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{k}": v for k, v in state.items()}
    write_atomically(path, lambda to: save_file(tensors, to, metadata={"progress": json.dumps(progress)}))


def load_state(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> dict[str, object]:
    """The inverse of save_state; returns the progress."""
    tensors = load_file(path)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(json.loads(header["__metadata__"]["progress"]))


def log(start: float, message: str) -> None:
    print(f"{time.monotonic() - start:7.0f}s {message}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--state", type=Path, help="file to continue from (default: not resumable)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="fixed, since the order of sums depends on it")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="at most; --minutes may stop earlier")
    parser.add_argument(
        "--decay-from", type=int, help="where the decay starts (default: at 3/4; can be set on resuming)"
    )
    parser.add_argument(
        "--minutes", type=float, help="fit the run into this time: the decay starts when 3/4 has passed"
    )
    parser.add_argument("--evaluate-every", type=int, default=200)
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    decay_from = arguments.decay_from or (10**9 if arguments.minutes else arguments.steps * 3 // 4)
    train(Recipe(seed=arguments.seed, steps=arguments.steps, decay_from=decay_from), arguments)


def train(recipe: Recipe, arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents = training_documents()
    training = [d for d in documents if not is_held_out(d)]
    tokenizer = train_tokenizer([d.text for d in training])
    tokenizer.save_pretrained(arguments.out)
    tokens, held_out = encode(tokenizer, training), encode(tokenizer, [d for d in documents if is_held_out(d)])
    byte_lengths = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    byte_lengths[tokenizer.eos_token_id] = 0
    model = LlamaForCausalLM(model_config(len(tokenizer), recipe.context))
    optimizer = make_optimizer(model, recipe)
    progress: dict[str, object] = {"step": 0, "seconds": 0.0, "best": math.inf}
    if arguments.state and arguments.state.exists():
        progress = load_state(arguments.state, model, optimizer)
        schedule = {"steps": arguments.steps, "decay_from": arguments.decay_from} if arguments.decay_from else {}
        recipe = Recipe(**{**progress["recipe"], **schedule})  # type: ignore[dict-item]
    log(start, f"{len(tokens)} tokens, {len(held_out)} held out, {model.num_parameters()} parameters")
    first, seconds_before, best = int(progress["step"]), float(progress["seconds"]), float(progress["best"])  # type: ignore[call-overload,arg-type]
    step, loss_sum = first, 0.0
    while step < recipe.steps:
        seconds = seconds_before + time.monotonic() - start
        if arguments.minutes and recipe.decay_from > recipe.steps and seconds > 0.75 * 60 * arguments.minutes:
            recipe = dataclasses.replace(recipe, decay_from=step, steps=min(recipe.steps, step + step // 3))
            log(start, f"decay from {recipe.decay_from}, {recipe.steps} steps")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = training_loss(model, batch(tokens, recipe, step), recipe, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum, step = loss_sum + loss.item(), step + 1
        if step % 20 == 0:
            speed = (step - first) * recipe.batch_tokens / (time.monotonic() - start)
            log(start, f"step {step} loss {loss_sum / 20:.4f} lr {group['lr']:.2e} {speed:.0f} tokens/s")
            loss_sum = 0.0
        if step % arguments.evaluate_every and step != recipe.steps:
            continue
        exits = bits_per_byte(model, held_out, byte_lengths, recipe.context, 32)
        log(start, f"step {step} held-out bits per byte at each exit: " + " ".join(f"{value:.4f}" for value in exits))
        seconds = seconds_before + time.monotonic() - start
        if exits[-1] < best:
            best = exits[-1]
            export(model, arguments.out)
            if step == recipe.steps:
                exits = bits_per_byte(model, held_out, byte_lengths, recipe.context, 10**6)
            record = {
                "steps": step,
                "tokens": step * recipe.batch_tokens,
                "epochs": round(step * recipe.batch_tokens / len(tokens), 2),
                "seconds": round(seconds),
                "threads": arguments.threads,
                "bits_per_byte_at_each_exit": [round(value, 4) for value in exits],
                "recipe": dataclasses.asdict(recipe),
                "training_tokens": len(tokens),
                "held_out_tokens": len(held_out),
                "text_bytes": sum(len(d.text.encode()) for d in documents),
                "text_sha256": text_digest(documents),
                "python": platform.python_version(),
                "torch": torch.__version__,
            }
            write_json(arguments.out / "training.json", record)
        if arguments.state:
            progress = {"step": step, "seconds": seconds, "best": best, "recipe": dataclasses.asdict(recipe)}
            save_state(arguments.state, model, optimizer, progress)
    log(start, f"done: best {best:.4f} bits per byte")


if __name__ == "__main__":
    main()
