"""What a device may fetch of a model: its own tensors, the configuration and the tokenizer, by digest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

from split.errors import NotAllowed
from split.models.manifest import Manifest, build_manifest, holder_digest, read_blob
from split.models.source import ModelFolder


@dataclass(frozen=True)
class DeviceWeights:
    """A device's part of a model, ready to be served."""

    folder: ModelFolder
    manifest: Manifest
    digest: str  # one for all tensors of the part, to compare a device's own files with

    async def chunks(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        """The bytes of one blob from `offset` on. Raises NotAllowed for a blob that is not of this part."""
        wanted = [*self.manifest.files.values(), *(entry.blob for entry in self.manifest.tensors.values())]
        if digest not in {blob.digest for blob in wanted}:
            raise NotAllowed(f"blob {digest[:16]} is not of this device's part of the model")
        blocks = read_blob(self.folder, self.manifest, digest, offset)
        while (block := await asyncio.to_thread(next, blocks, None)) is not None:
            yield block


def weights_of(folder: ModelFolder, names: Iterable[str], cache: Path) -> DeviceWeights:
    """Reads and digests these tensors (slow for large models; digests are cached in `cache`)."""
    names = tuple(names)
    manifest = build_manifest(folder, names, cache=cache)
    return DeviceWeights(folder, manifest, holder_digest(manifest, names))
