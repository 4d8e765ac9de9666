"""What both sides of a training session do with frames: take tensors, check answers, leave out what is not used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.split.data.sequences import IGNORE, seen_positions
from isthmus.split.errors import BadFrame, BadTensor
from isthmus.split.link.frames import Frame, Phase

_NEARLY_ALL = 0.97  # share of the positions from which on it is not worth saying which are wanted


def tensor_of(frame: Frame) -> Tensor:
    """A frame's tensor. Raises BadFrame if it has none."""
    if frame.tensor is None:
        raise BadFrame(f"{Phase.Name(frame.phase)} without its tensor")
    return frame.tensor


def tensor_like(frame: Frame, shape: torch.Size) -> Tensor:
    """An answer's tensor. Raises BadTensor unless it has this shape and is float32."""
    if frame.tensor is None or frame.tensor.shape != shape or frame.tensor.dtype != torch.float32:
        raise BadTensor(f"the coordinator's {Phase.Name(frame.phase)} does not have the shape {tuple(shape)}")
    return frame.tensor


def value_of(frame: Frame, name: str) -> float:
    """A number in an answer. Raises BadTensor if it is missing."""
    if name not in frame.values:
        raise BadTensor(f"the coordinator's {Phase.Name(frame.phase)} has no {name}")
    return frame.values[name]


def of_use(hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """What has to cross for a loss on the labels.

    hidden_states: (rows, sequence, hidden).
    labels: (rows, sequence).

    Returns the hidden states with zeros behind the last predicted position of each row, which no position before can
    see, and the positions whose last hidden states are used, (rows, sequence) bool, or None if nearly all are.
    """
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORE  # position t predicts labels[:, t + 1]
    if wanted.float().mean() > _NEARLY_ALL:
        return hidden_states, None
    return hidden_states * seen_positions(wanted).unsqueeze(-1), wanted


def where_wanted(outputs: Tensor, wanted: Tensor | None) -> Tensor:
    """Last hidden states with zeros where the device does not use them, as codecs drop such rows. None: it uses all."""
    return outputs if wanted is None else outputs * wanted.to(outputs.device).unsqueeze(-1)


def numbers_of(summary: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a ledger's summary, for a REPORT frame, without the bytes by kind, which both sides count."""
    numbers = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
    return {**numbers, "energy_measured": float(summary["energy_source"] != "estimated")}
