"""The optimiser of one side of a split: it clips alike on both sides, and is kept on disk without pickle."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from isthmus.split.codecs.finite import DIVERGED, sum_of_squares
from isthmus.split.errors import BadTensor, WrongState
from isthmus.split.job.config import TrainingConfig


class Stepper:
    """An optimiser over named parameters. Without parameters (a device that holds no block) it does nothing."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self._optimizer: torch.optim.Optimizer | None = None
        if self.parameters:
            values = list(self.parameters.values())
            if config.optimizer.name == "sgd":
                self._optimizer = torch.optim.SGD(
                    values, lr=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay
                )
            else:
                self._optimizer = torch.optim.AdamW(
                    values, lr=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay
                )

    def gradient_norm_squared(self, names: Iterable[str] | None = None) -> float:
        """Sum of squares of this side's gradients; with names, only of those of these parameters."""
        chosen = self.parameters.values() if names is None else [self.parameters[name] for name in names]
        return sum_of_squares(p.grad for p in chosen if p.grad is not None)

    def step(self, step: int, whole_norm_squared: float) -> None:
        """Clips by the norm of the whole model's gradient, this side's and the other's, then applies `step`.

        whole_norm_squared: the square of that norm.

        Raises WrongState, and changes nothing, where it is not finite.
        """
        if not math.isfinite(whole_norm_squared):
            raise WrongState(f"the gradient of step {step} is not finite, and was not applied: {DIVERGED}")
        if self._optimizer is None:
            return
        limit = self.config.optimizer.max_gradient_norm
        if limit > 0:
            scale = min(1.0, limit / (whole_norm_squared**0.5 + 1e-6))
            if scale < 1.0:
                for parameter in self.parameters.values():
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def drop_gradients(self) -> None:
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)

    def forget(self, names: Iterable[str]) -> None:
        """Drops what the optimiser remembers of these parameters, which begin anew."""
        for name in names:
            if self._optimizer is not None:
                self._optimizer.state.pop(self.parameters[name], None)

    def state(self) -> dict[str, Tensor]:
        """The optimiser's tensors, named `NAME|PART`; empty for plain SGD and before the first step."""
        if self._optimizer is None:
            return {}
        return {
            f"{name}|{part}": value.detach().to("cpu").clone()
            for name, parameter in self.parameters.items()
            for part, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` returned. Raises BadTensor for names or shapes that are not this side's."""
        for key, value in tensors.items():
            name, _, part = key.rpartition("|")
            parameter = self.parameters.get(name)
            if self._optimizer is None or parameter is None or (value.dim() and value.shape != parameter.shape):
                raise BadTensor(f"optimiser state for {name} does not fit this stage")
            # Moments live with their parameter; Adam's step counter stays on the CPU, as torch keeps it.
            where = parameter.device if value.dim() else torch.device("cpu")
            self._optimizer.state[parameter][part] = value.clone().to(where)
