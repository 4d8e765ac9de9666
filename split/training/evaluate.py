"""Perplexity of an unsplit model on files, with plain transformers and peft and the loss that training uses.

Anyone can repeat a reported figure with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isthmus.split.data.documents import read_documents
from isthmus.split.data.sequences import Sequences, build_sequences
from isthmus.split.errors import BadData, BadModelFolder, BadRequest
from isthmus.split.job.groups import TextSettings
from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER
from isthmus.split.training.loss import nll
from isthmus.split.training.perplexity import perplexity

if TYPE_CHECKING:  # transformers is loaded with the first model
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """What evaluate_files found.

    nll: negative log likelihood in nats, summed over `tokens` predicted tokens.
    perplexity: exp(nll / tokens).
    """

    perplexity: float
    nll: float
    tokens: int
    files: tuple[str, ...]
    sequence_length: int
    model: str
    adapter: str | None


def evaluate_files(
    model: str,
    files: Sequence[Path],
    *,
    adapter: Path | None = None,
    data: TextSettings | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates a model, with a PEFT adapter if one is given, on files that are held out as a whole (see PERPLEXITY).

    model: a folder in hub format, a hub id, or "default".
    progress: is called with (windows done, windows in all).

    Raises BadModelFolder for a model or adapter that cannot be loaded or does not fit, BadData for a file that cannot
    be used, BadRequest for options that do not go together.
    """
    config = data or TextSettings()
    if not files:
        raise BadRequest("no file to evaluate on: name one or more .txt, .jsonl or .csv files")
    if batch_size < 1:
        raise BadRequest(f"batch_size is {batch_size}: choose 1 or more")
    name = str(DEFAULT_MODEL_FOLDER) if model == "default" else model
    documents = [read_documents(path, config) for path in files]  # before the model: an error here shows at once
    tokenizer = _load_tokenizer(name, model)
    rows = []
    for path, held_out in zip(files, documents, strict=True):
        try:
            rows.append(build_sequences(held_out, tokenizer, config, keep_last=True))
        except BadData as error:
            raise BadData(f"{path.name}: {error}") from None
    whole = load_model(name, model)
    _check_fit(whole, rows, config, model)
    network: torch.nn.Module = whole if adapter is None else _load_adapter(whole, adapter)
    try:
        network = network.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device; torch built without CUDA raises AssertionError
        raise BadRequest(f"device {device!r} cannot be used ({_line(error)}): choose cpu, or cuda with a GPU") from None

    windows, done, total, tokens = sum(map(len, rows)), 0, 0.0, 0
    with torch.inference_mode():
        for sequences in rows:
            for start in range(0, len(sequences), batch_size):
                input_ids = sequences.input_ids[start : start + batch_size].to(device)
                labels = sequences.labels[start : start + batch_size].to(device)
                loss, count = nll(network(input_ids=input_ids, use_cache=False).logits, labels)
                total, tokens, done = total + loss.item(), tokens + count, done + len(input_ids)
                if progress is not None:
                    progress(done, windows)
    return Evaluation(
        perplexity=perplexity(total, tokens),
        nll=total,
        tokens=tokens,
        files=tuple(str(path) for path in files),
        sequence_length=config.sequence_length,
        model=model,
        adapter=None if adapter is None else str(adapter),
    )


def load_model(folder: str, model: str) -> PreTrainedModel:
    """Loads the unsplit model in float32 and evaluation mode.

    folder: a folder or a hub id.
    model: the model's name in errors.

    Raises BadModelFolder if it cannot be loaded as it is: no remote code, no pickles, no tensor left at random.
    """
    from transformers import AutoModelForCausalLM

    _check_folder(folder, model)
    try:
        auto: Any = AutoModelForCausalLM  # its types do not know output_loading_info
        loaded, info = auto.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # noqa: BLE001  # the library raises anything from KeyError to its own SafetensorError
        raise BadModelFolder(
            f"model {model} cannot be loaded ({_line(error)}): give a folder with config.json and *.safetensors"
        ) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise BadModelFolder(f"model {model} lacks {len(missing)} tensors ({missing[0]}): copy its whole folder again")
    whole: PreTrainedModel = loaded.eval()
    return whole


def _load_tokenizer(folder: str, model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    _check_folder(folder, model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # as above
        raise BadModelFolder(
            f"model {model} has no tokenizer that can be loaded ({_line(error)}): put its tokenizer.json there"
        ) from None
    return tokenizer


def _load_adapter(whole: PreTrainedModel, adapter: Path) -> torch.nn.Module:
    """Loads an adapter. Raises BadModelFolder unless each tensor of its folder has a place and each place a tensor."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file() or not (adapter / "adapter_config.json").is_file():
        raise BadModelFolder(
            f"{adapter} is not a PEFT adapter: name a folder with adapter_config.json and adapter_model.safetensors"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # what peft warns of is refused below
            adapted: torch.nn.Module = PeftModel.from_pretrained(whole, str(adapter), is_trainable=False).eval()
        with safe_open(weights, framework="pt") as file:
            given = set(file.keys())
    except Exception as error:  # noqa: BLE001  # as above
        raise BadModelFolder(
            f"adapter {adapter} does not fit the model ({_line(error)}): was it made for it?"
        ) from None
    # peft only warns of missing tensors, and drops those for which the model has no place
    places = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    misfits = sorted({key for key in given - places if "lora_" in key} | places - given)
    if misfits:
        raise BadModelFolder(
            f"adapter {adapter} does not fit the model ({len(misfits)} tensors without their place or places without"
            f" their tensor: {misfits[0]}): was it made for it?"
        )
    return adapted


def _check_folder(folder: str, model: str) -> None:
    if not Path(folder).is_dir() and (Path(folder).exists() or folder.startswith((".", "/", "~"))):
        raise BadModelFolder(f"model {model} is not a folder: name a folder in hub format, a hub id, or default")


def _check_fit(whole: PreTrainedModel, rows: list[Sequences], config: TextSettings, model: str) -> None:
    """Raises BadRequest or BadModelFolder for what would otherwise end in an IndexError in the midst of the model."""
    limit = getattr(whole.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and config.sequence_length > limit:
        raise BadRequest(
            f"sequence_length {config.sequence_length} is more than model {model} takes: choose up to {limit}"
        )
    embedding = whole.get_input_embeddings().weight
    largest = max(int(row.input_ids.max()) for row in rows)
    if isinstance(embedding, Tensor) and largest >= len(embedding):
        raise BadModelFolder(
            f"the tokenizer of model {model} makes token {largest} and its embedding has {len(embedding)}:"
            " they do not belong together, copy its whole folder again"
        )


def _line(error: BaseException) -> str:
    """The first line of a library's error, which may fill a page."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200].rstrip(' .:')}" if text else type(error).__name__
