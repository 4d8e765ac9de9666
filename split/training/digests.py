"""Whether a device holds what it is to hold: an adapter of the right length, and the coordinator's model files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame


def digest_of(digests: Mapping[int, str], cut: int) -> str:
    """Of the files of a device with this cut. digests: by cut, one where all are alike; empty: not known."""
    if len(digests) < 2:
        return next(iter(digests.values()), "")
    return digests.get(cut, "of no cut of this job")


def digest_of_all(digests: Mapping[int, str]) -> str:
    """Of what devices hold with any of these cuts, for a checkpoint."""
    if len(digests) < 2:
        return next(iter(digests.values()), "")
    return hashlib.sha256("".join(digest for _, digest in sorted(digests.items())).encode()).hexdigest()


def check_holds(opened: stage_pb2.Open, values: int, whose: str, digest: str) -> None:
    """Raises BadFrame for a device that opens a job with another adapter or with other files.

    values: length of the flattened adapter that it is to have; whose: the subject of the sentence on that. digest: of
    its files; empty: not known.
    """
    if opened.adapter_values != values:
        raise BadFrame(f"an adapter of {opened.adapter_values} values; {whose} {values}")
    if digest and opened.stage_digest != digest:
        raise BadFrame("the device's model files differ from the coordinator's: their digests are not the same")
