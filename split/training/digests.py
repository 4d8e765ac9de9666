"""Checks of what a device holds: an adapter of the right length, and the coordinator's model files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame


def digest_of(digests: Mapping[int, str], cut: int) -> str:
    """The digest of the files of a device with this cut; empty if not known.

    digests: digests by cut; a single one holds for all cuts.
    """
    if len(digests) < 2:
        return next(iter(digests.values()), "")
    return digests.get(cut, "of no cut of this job")


def digest_of_all(digests: Mapping[int, str]) -> str:
    """One digest of the files for all cuts, for a checkpoint; empty if not known."""
    if len(digests) < 2:
        return next(iter(digests.values()), "")
    return hashlib.sha256("".join(digest for _, digest in sorted(digests.items())).encode()).hexdigest()


def check_holds(opened: stage_pb2.Open, values: int, whose: str, digest: str) -> None:
    """Raises BadFrame for a device that opens a job with another adapter or with other files.

    values: length of the flattened adapter that it has to have.
    whose: subject of the error's sentence about that length.
    digest: digest of its files; empty if not known.
    """
    if opened.adapter_values != values:
        raise BadFrame(f"an adapter of {opened.adapter_values} values; {whose} {values}")
    if digest and opened.stage_digest != digest:
        raise BadFrame("the device's model files differ from the coordinator's: their digests are not the same")
