"""A method's own steps on a device, which its trainer calls. All else is in device.py."""

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
    """A job as a device's trainer gets it: configuration, the device's text, and what counts its resources.

    dtype: the dtype in which training computes.
    """

    config: TrainingConfig
    train: Sequences
    validation: Sequences | None
    ledger: Ledger
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Batch:
    """A step's sequences on a device.

    input_ids, labels: (rows, sequence).
    tokens: the number of predicted tokens.
    slices: the rows of each micro-batch.
    depth: the most micro-batches that may be under way.
    """

    step: int
    input_ids: Tensor
    labels: Tensor
    tokens: int
    slices: list[slice]
    depth: int

    @classmethod
    def of(cls, context: DeviceContext, step: int, plan: Plan, device: torch.device) -> Batch:
        """Takes a step's sequences from the device's text.

        plan: the session's plan, which cuts the step into micro-batches.
        device: where the tensors are to be.
        """
        train, config = context.train, context.config
        rows = batch_indices(len(train.input_ids), config.batch_size, step, config.seed)
        input_ids, labels = train.input_ids[rows].to(device), train.labels[rows].to(device)
        tokens = int((labels[:, 1:] != IGNORE).sum())
        slices = micro_batch_slices(len(rows), plan.micro_batches)
        return cls(step, input_ids, labels, tokens, slices, plan.depth)


@dataclass(frozen=True)
class Gradients:
    """What a step gave beside the gradients, which are at the parameters.

    nll: the batch's summed loss, in nats.
    tokens: the number of its predicted tokens.
    elsewhere: the squared norm of the gradients that are not on this device.
    """

    nll: float
    tokens: int
    elsewhere: float = 0.0


class DeviceSteps(ABC):
    """A method's side of a job on a device.

    parameters: all parameters that train on this device, by names in the whole model.
    model: the model's configuration.
    """

    parameters: dict[str, nn.Parameter]
    model: PreTrainedConfig

    def __init__(self, context: DeviceContext) -> None:
        self.context, self.config, self.ledger = context, context.config, context.ledger

    # ---- what each method has ----

    @abstractmethod
    def train(self, link: Link, step: int) -> Gradients | None:
        """Computes the gradients of a step, at the parameters; returns None where nothing is left to train."""

    @abstractmethod
    def evaluate(self, link: Link, step: int, held_out: Sequences) -> tuple[float, int]:
        """The summed loss of held-out text after `step` steps, in nats, and the number of its predicted tokens."""

    # ---- what some have ----

    @property
    def terms(self) -> Terms:
        """The terms of a link for this device."""
        model, shapes = self.model, shapes_of(self.parameters)
        return Terms(self.config, len(self.context.train), shapes, model.hidden_size, model.vocab_size)

    @property
    def shape(self) -> Shape | None:
        """The shape to tell in OPEN, where the device's cut may move; None where it stays."""
        return None

    def begin(self) -> None:  # noqa: B027  # most methods have nothing to do
        """Drops what an earlier session had under way, as a new one begins."""

    def take(self, answer: Frame) -> bool:
        """Takes what an answer to OPEN or AGGREGATE brings beside the adapter. Returns whether training begins anew."""
        return False

    def move(self, shape: Shape) -> str:
        """Holds other blocks from here on, and returns the digest of their files.

        Raises WrongState where the device cannot.
        """
        raise WrongState(f"the coordinator moves this device's cut to {shape.cut}, which it cannot follow")

    def state(self) -> dict[str, Any]:
        """What has to be known beside adapter and optimiser to go on, as JSON has it."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027  # most methods have nothing to do
        """Takes over what `state` returned, or nothing on a device that comes without its record."""

    def own_adapter(self) -> dict[str, Tensor]:
        """What this device has learnt and keeps, by names in the whole model; empty where it keeps nothing."""
        return {}
