"""What a device may fetch of a model: its own tensors, the configuration and the tokenizer, by digest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from isthmus.split.errors import NotAllowed, NotFound
from isthmus.split.models.manifest import Folder, Manifest, build_manifest, holder_digest, read_blob, with_adapters


@dataclass(frozen=True)
class DeviceWeights:
    """A device's part of a model, or of an adapter, ready to be served.

    digest: one digest for all tensors of the part and its adapters, to compare with a device's own files.
    adapters: the parts of the adapters beside a model, by name.
    """

    folder: Folder
    manifest: Manifest
    digest: str
    adapters: Mapping[str, DeviceWeights] = field(default_factory=dict)

    def part(self, adapter: str) -> DeviceWeights:
        """The part of an adapter or, for an empty name, of the model itself. Raises NotFound for an unknown adapter."""
        if adapter and adapter not in self.adapters:
            raise NotFound(f"no adapter {adapter[:100]!r} in this device's part of the job")
        return self.adapters[adapter] if adapter else self

    async def chunks(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        """The bytes of one blob from `offset` on. Raises NotAllowed for a blob that is not in this part."""
        parts = (self, *self.adapters.values())
        part = next((one for one in parts if digest in {blob.digest for blob in one.manifest.blobs()}), None)
        if part is None:
            raise NotAllowed(f"blob {digest[:16]} is not of this device's part of the model")
        blocks = read_blob(part.folder, part.manifest, digest, offset)
        while (block := await asyncio.to_thread(next, blocks, None)) is not None:
            yield block


def weights_of(
    folder: Folder, names: Iterable[str], cache: Path, adapters: Mapping[str, DeviceWeights] = MappingProxyType({})
) -> DeviceWeights:
    """Reads and digests these tensors, which is slow for large models; `cache` keeps the digests."""
    names = tuple(names)
    manifest = build_manifest(folder, names, cache=cache)
    digest = with_adapters(holder_digest(manifest, names), [one.manifest for one in adapters.values()])
    return DeviceWeights(folder, manifest, digest, adapters)
