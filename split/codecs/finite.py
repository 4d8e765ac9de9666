"""Whether numbers are still numbers. A tensor is checked as it comes from a device; what is computed of it is checked
here before it is kept, because finite values can have a product or a sum that float32 does not hold."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

DIVERGED = "if training has diverged, lower learning_rate or set max_gradient_norm"
LARGEST = torch.finfo(torch.float32).max

# The greatest norm of an adapter or a gradient. Float32 then holds the squares that AdamW keeps, the product B A, a
# factor as large as that product (split/aggregation/refactor.py) and its squares, and the sum of very many of them.
_GREATEST_NORM = 2.0**31


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: of all but huge values the sum tells, and of the others the least and the
    greatest. NumPy's sum of a small tensor takes a tenth of a torch operation on a core that has been idle."""
    if not tensor.numel():
        return True
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(np.add.reduce(tensor.detach().numpy(), axis=None)):
                return True
    least, greatest = tensor.detach().aminmax()
    return math.isfinite(least) and math.isfinite(greatest)


def sum_of_squares(tensors: Iterable[Tensor]) -> float:
    """In float64, which holds the squares of all that float32 holds."""
    sums = [tensor.detach().double().square().sum() for tensor in tensors]
    return float(torch.stack(sums).sum()) if sums else 0.0


def can_be_used(tensors: Iterable[Tensor]) -> bool:
    """Whether an adapter or a gradient is finite, and so is what is computed of it."""
    return float(torch.nn.utils.get_total_norm(list(tensors))) <= _GREATEST_NORM
