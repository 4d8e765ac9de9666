"""What cannot be beaten: rate-distortion functions of Gaussian sources. Errors are shares of the mean square (NMSE).

For values that are not Gaussian these are above the true function (of all sources with a given covariance the Gaussian
is the hardest: Cover and Thomas 2006, section 10.3), so a codec that follows rows which differ in size can come out
below the line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS = 65536  # at most, for a covariance


def decibels(nmse: float) -> float:
    """-inf for no error."""
    return 10 * math.log10(nmse) if nmse > 0 else -math.inf


def gaussian_bits(nmse: float) -> float:
    """R(D) = 1/2 log2(1/D): of independent Gaussian values of one variance, bits a value."""
    return max(0.0, -0.5 * math.log2(nmse)) if nmse > 0 else math.inf


def spectrum(tensors: Sequence[Tensor]) -> Tensor:
    """(width,) float64: eigenvalues of the second moments of all rows, with mean 1. Second moments and not the
    covariance, as no codec here takes the mean away and errors are shares of the mean square."""
    rows = torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
    rows = rows[:: -(-len(rows) // _ROWS)].double()
    values: Tensor = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).clamp_(min=0)
    values /= values.mean()
    return values


def water_filling(eigenvalues: Tensor, nmse: float) -> float:
    """Bits a value of Gaussian vectors with these second moments: what the KLT, and then ideal codes, would take.

    Reverse water-filling (Cover and Thomas 2006, section 10.3.3): no component has more error than the water level.
    """
    if nmse <= 0:
        return math.inf
    low, high = 0.0, float(eigenvalues.max())
    for _ in range(100):
        level = (low + high) / 2
        if float(eigenvalues.clamp(max=level).mean()) < nmse:
            low = level
        else:
            high = level
    above = eigenvalues[eigenvalues > high]
    return float(0.5 * torch.log2(above / high).sum() / len(eigenvalues))
