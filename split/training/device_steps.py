"""What a method gives to a device's trainer: the steps that are its own. All the rest is in device.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from isthmus.split.data.sequences import IGNORE, Sequences, batch_indices, micro_batch_slices
from isthmus.split.errors import WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape
from isthmus.split.link.coding import Plan, Terms
from isthmus.split.link.device import Link
from isthmus.split.link.frames import Frame
from isthmus.split.lora.lora import shapes_of
from isthmus.split.resources.ledger import Ledger


@dataclass(frozen=True)
class DeviceContext:
    """A job as a device's trainer is given it: its options, the device's text, what counts its resources. dtype: that
    training computes in."""

    config: TrainingConfig
    train: Sequences
    validation: Sequences | None
    ledger: Ledger
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Batch:
    """A step's sequences on a device. input_ids, labels: (rows, sequence). tokens: predicted ones. slices: the rows of
    each micro-batch. depth: micro-batches that may be under way."""

    step: int
    input_ids: Tensor
    labels: Tensor
    tokens: int
    slices: list[slice]
    depth: int

    @classmethod
    def of(cls, context: DeviceContext, step: int, plan: Plan, device: torch.device) -> Batch:
        """plan: of the session. device: where the tensors are to be."""
        train, config = context.train, context.config
        rows = batch_indices(len(train.input_ids), config.batch_size, step, config.seed)
        input_ids, labels = train.input_ids[rows].to(device), train.labels[rows].to(device)
        tokens = int((labels[:, 1:] != IGNORE).sum())
        slices = micro_batch_slices(len(rows), plan.micro_batches)
        return cls(step, input_ids, labels, tokens, slices, plan.depth)


@dataclass(frozen=True)
class Gradients:
    """A step whose gradients are there. nll: the batch's summed loss. tokens: its predicted ones. elsewhere: the
    squared norm of the gradients that are not on this device."""

    nll: float
    tokens: int
    elsewhere: float = 0.0


class DeviceSteps(ABC):
    """A method's side of a job on a device. parameters: all that trains here, by their names in the whole model. model:
    its configuration."""

    parameters: dict[str, nn.Parameter]
    model: PreTrainedConfig

    def __init__(self, context: DeviceContext) -> None:
        self.context, self.config, self.ledger = context, context.config, context.ledger

    # ---- what each method has ----

    @abstractmethod
    def train(self, link: Link, step: int) -> Gradients | None:
        """Makes the gradients of a step, at the parameters; None where nothing is left to train."""

    @abstractmethod
    def evaluate(self, link: Link, step: int, held_out: Sequences) -> tuple[float, int]:
        """The summed loss of held-out text after `step` steps, and the number of its predicted tokens."""

    # ---- what some have ----

    @property
    def terms(self) -> Terms:
        """Of a link for this device."""
        model, shapes = self.model, shapes_of(self.parameters)
        return Terms(self.config, len(self.context.train), shapes, model.hidden_size, model.vocab_size)

    @property
    def shape(self) -> Shape | None:
        """What the device holds now, to be said where its cut may move; None: it stays."""
        return None

    def begin(self) -> None:  # noqa: B027  # most have none
        """A session begins: what an earlier one had under way is dropped."""

    def take(self, answer: Frame) -> bool:
        """What an answer to OPEN or AGGREGATE brings beside the adapter. Returns whether training begins anew."""
        return False

    def move(self, shape: Shape) -> str:
        """The device holds other blocks from here on. Returns the digest of their files. Raises WrongState where it
        cannot."""
        raise WrongState(f"the coordinator moves this device's cut to {shape.cut}, which it cannot follow")

    def state(self) -> dict[str, Any]:
        """What has to be known beside adapter and optimiser to go on, JSON-able."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027  # most have none
        """What `state` gave; nothing, for a device that comes without its record."""

    def own_adapter(self) -> dict[str, Tensor]:
        """What this device has learnt and keeps, by names in the whole model; empty where it keeps nothing."""
        return {}
