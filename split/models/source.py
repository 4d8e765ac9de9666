"""Sources of a model's tensors: the interface, and a folder in Hugging Face hub format.

Tensors are read one by one, by name, from safetensors. Pickles are refused, and no code from a folder is ever run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from isthmus.split.errors import BadModelFolder
from isthmus.split.models.architectures import Architecture, architecture_of, parse_config
from isthmus.split.models.safetensors_file import TensorPlace, read_header, read_tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
MODEL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
"""Every file of a model besides the weights that is ever read or sent, by its exact name."""
ADAPTER_FILES = ("adapter_config.json",)
"""And of a LoRA adapter."""

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class TensorSource(Protocol):
    """A whole model, of which any tensor can be read alone, by its name in the causal LM."""

    @property
    def config(self) -> PreTrainedConfig: ...

    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def file(self, name: str) -> Path | None:
        """The path of one of MODEL_FILES; None if the model has none of this name."""

    def tensor_names(self) -> frozenset[str]: ...

    def read(self, name: str) -> Tensor: ...


class ModelFolder:
    """A model in a folder: config.json, model.safetensors (or shards with an index), tokenizer files.

    Opening reads config.json and the safetensors headers or index, no weights. Names are those of the whole
    causal LM, also for checkpoints of the bare base model (GPT-2 on the hub has `h.0…`, not `transformer.h.0…`).
    Raises BadModelFolder or UnsupportedModel.
    """

    files: Sequence[str] = MODEL_FILES

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise BadModelFolder(f"no model folder at {self.path}; give a folder in hub format, a hub id, or default")
        config = self.path / "config.json"
        if not config.is_file():
            raise BadModelFolder(f"{self.path} has no config.json; give a folder in hub format")
        self.config = parse_config(read_text(config), str(config))
        architecture = architecture_of(self.config)
        self._stored = {full_name(architecture, name): (name, shard) for name, shard in self._find_tensors().items()}
        self._headers: dict[str, dict[str, TensorPlace]] = {}
        self.read_names: set[str] = set()
        """Names of the tensors whose values have been read so far."""
        settle_head(self.config, self.tensor_names())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's own tokenizer; raises BadModelFolder if there is none."""
        return load_tokenizer(self.path)

    def file(self, name: str) -> Path | None:
        """The path of one of MODEL_FILES; None if the model has none of this name."""
        path = self.path / name
        return path if path.is_file() else None

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own, in the checkpoint's dtype; nothing else of the file is read."""
        tensor = read_tensor(self.place(name))
        self.read_names.add(name)
        return tensor

    def place(self, name: str) -> TensorPlace:
        """The place of a tensor's bytes."""
        if name not in self._stored:
            raise BadModelFolder(f"{self.path} has no tensor {name}; the checkpoint is not of this configuration")
        stored, shard = self._stored[name]
        if shard not in self._headers:
            self._headers[shard] = read_header(self.path / shard)
        if stored not in self._headers[shard]:
            raise BadModelFolder(f"{self.path / INDEX_NAME} says that {stored} is in {shard}, which has no such tensor")
        return self._headers[shard][stored]

    def _find_tensors(self) -> Mapping[str, str]:
        """Stored name -> shard."""
        if (self.path / INDEX_NAME).is_file():
            return self._read_index()
        if (self.path / SINGLE_NAME).is_file():
            return dict.fromkeys(read_header(self.path / SINGLE_NAME), SINGLE_NAME)
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.path.glob(pattern))
        if pickled:
            raise BadModelFolder(
                f"{self.path} has only pickled weights ({pickled[0]}), which are never loaded; "
                "convert them to safetensors"
            )
        raise BadModelFolder(f"{self.path} has no {SINGLE_NAME} and no {INDEX_NAME}; give a folder with safetensors")

    def _read_index(self) -> Mapping[str, str]:
        path = self.path / INDEX_NAME
        try:
            weight_map = json.loads(read_text(path))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise BadModelFolder(f"{path} is not a safetensors index; copy or download it again") from None
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadModelFolder(f"{path} is not a safetensors index; copy or download it again")
        for shard in set(map(str, weight_map.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise BadModelFolder(f"{path} names {shard!r}, which is not a safetensors file in the folder")
            if not (self.path / shard).is_file():
                raise BadModelFolder(f"{path} names {shard}, which is not there; copy or download it")
        return cast("dict[str, str]", weight_map)


def open_model(model: str) -> ModelFolder:
    """A model by what a user writes: `default` (the one that comes with the package), a folder, or a hub id.

    A hub id is downloaded (configuration, tokenizer and safetensors only). Raises BadModelFolder or UnsupportedModel.
    """
    if model == "default":
        from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER

        return ModelFolder(DEFAULT_MODEL_FOLDER)
    folder = Path(model).expanduser()
    if folder.exists() or not _HUB_ID.fullmatch(model):
        return ModelFolder(folder)
    return ModelFolder(_download(model))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*MODEL_FILES, INDEX_NAME, SINGLE_NAME, "model-*.safetensors"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors and httpx's are among these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadModelFolder(f"{hub_id} is not a folder, and the hub did not give it: {reason}") from None


def full_name(architecture: Architecture, name: str) -> str:
    """A checkpoint's tensor name as it is in the whole causal LM."""
    if name.startswith(f"{architecture.stored_head}."):
        return architecture.head + name.removeprefix(architecture.stored_head)
    inside = name.startswith((f"{architecture.base}.", f"{architecture.head}."))
    return name if inside else f"{architecture.base}.{name}"


def settle_head(config: PreTrainedConfig, names: frozenset[str]) -> None:
    """Take a head that the checkpoint stores as it is, whatever the configuration says about tying."""
    if config.tie_word_embeddings and architecture_of(config).head_tensor in names:
        config.tie_word_embeddings = False


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, by the library's own classes only; raises BadModelFolder."""
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise BadModelFolder(
            f"{folder} has no tokenizer ({' or '.join(_VOCABULARY_FILES)}); copy the model's own there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (the tokenizers library raises bare Exception)
        reason = " ".join(str(error).split())[:200]
        raise BadModelFolder(f"the tokenizer in {folder} cannot be loaded: {reason}") from None
    return cast(PreTrainedTokenizerBase, tokenizer)


def end_tokens(source: TensorSource, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those that config.json and generation_config.json name."""
    named: list[object] = [tokenizer.eos_token_id, getattr(source.config, "eos_token_id", None)]
    path = source.file("generation_config.json")
    if path is not None:
        try:
            named.append(json.loads(read_text(path)).get("eos_token_id"))
        except (ValueError, AttributeError):
            raise BadModelFolder(f"{path} is not a JSON object; copy or download it again") from None
    ids = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return frozenset(one for one in ids if isinstance(one, int))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadModelFolder(f"cannot read {path}: {error}") from None
