"""A frame: one message of a training session with its tensors decoded, as both sides compute with it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import IsthmusError
from isthmus.split.job.shapes import Shape
from isthmus.split.link.coding import Plan

log = logging.getLogger(__name__)

Phase = stage_pb2.Phase
HELD = "held_seconds"  # in an answer: seconds for which the stage had the question
UNDER_WAY = "under_way_seconds"  # beside it, on the device: seconds since the question was sent
ENDS = "ends"  # in STEP: the device does no further step
INPUT_GRADIENT = "input_gradient"  # in BACKWARD of a site, from the stage: 1 where the device has to answer
EVALUATIONS_AHEAD = 2  # held-out batches that a device sends before the first one's answer has come


@dataclass(frozen=True)
class Frame:
    """A stage_pb2.Frame with its tensors decoded; on the wire it is a message.

    encoded: stands in place of `tensor` where the stage sends the same bytes to all devices.
    wanted: (rows, sequence) bool, the positions whose last hidden states are used; None for all.
    """

    phase: stage_pb2.Phase
    step: int = 0
    micro_batch: int = 0
    tensor: Tensor | None = None
    encoded: stage_pb2.Tensor | None = None
    labels: Tensor | None = None
    wanted: Tensor | None = None
    values: dict[str, float] = field(default_factory=dict)
    open: stage_pb2.Open | None = None
    agreement: stage_pb2.Agreement | None = None
    plan: Plan | None = None
    measured: stage_pb2.Measured | None = None
    probe: stage_pb2.Probe | None = None
    site: int = 0
    trained: bytes = b""
    applied: bytes = b""
    frozen: stage_pb2.Frozen | None = None
    shape: Shape | None = None


def is_answer(frame: stage_pb2.Frame | Frame) -> bool:
    """Whether a frame from the stage answers a question of the device.

    One does not: the gradient by a site's outputs goes before the answer where the gradient by its inputs is not
    wanted.
    """
    return not (frame.site and frame.phase == Phase.BACKWARD and not frame.values.get(INPUT_GRADIENT))


def kind_and_sizes(message: stage_pb2.Frame) -> tuple[str, str, int, int]:
    """Kind of a message, codec of its tensor, bytes of its tensors' payloads, and bytes of the whole message."""
    payload = len(message.tensor.payload) + len(message.labels.payload) + len(message.probe.filling)
    codec = message.tensor.codec if message.HasField("tensor") else ""
    kind = Phase.Name(message.phase).lower() if message.phase in Phase.values() else "unknown"
    return f"{kind} modules" if message.site else kind, codec, payload, message.ByteSize()


def as_known(error: Exception, what: str) -> IsthmusError:
    """Turns an exception into the error to give to whoever waits for a frame; logs one that nobody expected."""
    if isinstance(error, IsthmusError):
        return error
    log.error("%s a frame failed", what, exc_info=error)
    return IsthmusError(f"{what} a frame failed: {type(error).__name__}: {error}")
