"""How fast this machine trains: floating-point operations a second of a forward and backward pass through blocks of
made-up weights, with LoRA, by the code and in the number format that a job would use."""

from __future__ import annotations

from collections.abc import Callable

import torch

from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.lora import add_lora, lora_config
from isthmus.split.models.precision import autocast, pick_device, pick_precision
from isthmus.split.models.stage import StageSpec, build_stages
from isthmus.split.resources.ledger import Ledger
from isthmus.split.runtime.speed import Blocks, Stopped

_WIDTH, _BLOCKS = 256, 2  # some 2 billion operations a pass: a tenth of a second or less
_BATCH, _LENGTH = 8, 128
_TIMES = 4  # the first one warms up


def measure_training(
    device: str = "auto", *, slow_down: float = 1.0, stop: Callable[[], bool] = lambda: False
) -> float:
    """FLOP/s, counted as a job's ledger counts; the best of three. slow_down: of a device that emulates a slower one.

    Raises Stopped where `stop` says so.
    """
    where = pick_device(device)
    source, config = Blocks(_WIDTH, _BLOCKS), TrainingConfig()
    stage = build_stages(source, [StageSpec(0, _BLOCKS, embeds=False, head=False)], device=where)[0]
    add_lora(stage, lora_config(config, source.config), 0)
    dtype = pick_precision("auto", where)
    best = 0.0
    for number in range(_TIMES):
        if stop():
            raise Stopped
        ledger = Ledger(slow_down=slow_down)
        x = torch.ones(_BATCH, _LENGTH, _WIDTH, device=where, requires_grad=True)
        with ledger.computing("training"), autocast(dtype, where):
            output = stage(x)
            output.backward(torch.ones_like(output))
            if where.type == "cuda":
                torch.cuda.synchronize(where)
        if number:
            best = max(best, ledger.flops / ledger.compute_seconds)
    return best
