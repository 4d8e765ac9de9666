"""A LoRA adapter as peft writes it: adapter_config.json and adapter_model.safetensors in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from isthmus.split.errors import BadModelFolder
from isthmus.split.models.safetensors_file import TensorPlace, read_header, read_tensor
from isthmus.split.models.source import ADAPTER_FILES, read_text

_TENSORS = "adapter_model.safetensors"


class AdapterSource(Protocol):
    """An adapter, or a holder's part of one: a folder, or blobs. Tensors have the names that peft gives them."""

    def text(self, name: str) -> str:
        """The text of one of ADAPTER_FILES."""

    def tensor_names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


class AdapterFolder:
    """Opening reads the header of the tensors' file, and no tensor. Raises BadModelFolder."""

    files: Sequence[str] = ADAPTER_FILES

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        missing = [name for name in (*ADAPTER_FILES, _TENSORS) if not (self.path / name).is_file()]
        if missing:
            raise BadModelFolder(f"{self.path} has no {missing[0]}; give a folder that peft or `isthmus export` wrote")
        self._places = read_header(self.path / _TENSORS)
        if not self._places:
            raise BadModelFolder(f"{self.path / _TENSORS} has no tensors")

    def text(self, name: str) -> str:
        return read_text(self.path / name)

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.place(name).shape

    def read(self, name: str) -> Tensor:
        return read_tensor(self.place(name))

    def place(self, name: str) -> TensorPlace:
        """The place of a tensor's bytes."""
        if name not in self._places:
            raise BadModelFolder(f"{self.path / _TENSORS} has no tensor {name}")
        return self._places[name]
