"""What the tests of runtimes compare with: a stage's blocks, computed in one go by the library's own code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from isthmus.split.models.source import open_model
from isthmus.split.models.stage import Stage, StageSpec, build_stages


def blocks(folder: Path, first: int = 1, last: int = 4) -> Stage:
    return build_stages(open_model(str(folder)), [StageSpec(first, last, embeds=False, head=False)])[0]


def states_of(width: int, count: int, seed: int) -> Tensor:
    """(count, width), normally distributed."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def alone(stage: Stage, hidden: Tensor) -> Tensor:
    """(tokens, hidden) through the stage in one go, without any cache."""
    result: Tensor = stage(hidden[None])[0]
    return result
