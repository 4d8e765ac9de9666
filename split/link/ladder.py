"""The codecs that `auto` may choose from, for each stream and for an error budget.

The budget is the share by which perplexity may become worse. A calibration translates it to the quantiser's steps
(benchmarks/README.md, compression): at a budget of 0.5 % each stream bears the step in _STEPS, in units of the RMS, and
the harm grows with the square of the step. Gradients have to be rounded without bias.
"""

from __future__ import annotations

import math

from isthmus.split.codecs import parse
from isthmus.split.errors import CodecError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import AUTO, TRAINING, choices
from isthmus.split.link.coding import Plan

_STEPS = {"hidden_up": 0.25, "hidden_down": 0.16, "gradients_up": 0.35, "gradients_down": 0.35}
_CALIBRATED_AT, _LARGEST_STEP = 0.005, 2.0


def kind_of(stream: str) -> str:
    """Kind of a training stream's tensors: `hidden` or `gradients`."""
    return stream.partition("_")[0]


def ladder(stream: str, budget: float) -> list[str]:
    """Codecs of a training stream within the budget, from the quickest to the one that makes the fewest bytes."""
    step = min(_STEPS[stream] * math.sqrt(budget / _CALIBRATED_AT), _LARGEST_STEP)
    rounding = ":stochastic" if kind_of(stream) == "gradients" else ""
    uniform = f"uniform:step={step:.3g}:per=tensor{rounding}"
    names = [
        "none",
        "bfloat16",
        f"hadamard,int8{rounding}",
        f"hadamard,{uniform},zstd",
        f"klt,{uniform},zstd",
        f"klt,{uniform},range",
    ]
    return [parse(name).name for name in names]


def candidates(config: TrainingConfig) -> list[str]:
    """All codecs that a job may use, with those that its configuration fixes."""
    names: list[str] = []
    for stream, name in choices(config.link.codec).items():
        if stream in TRAINING:
            names += ladder(stream, config.link.error_budget) if name == AUTO else [name]
    return list(dict.fromkeys(names))


def check_agreed(plan: Plan, config: TrainingConfig) -> None:
    """Checks that a job of this configuration may have the plan's codecs; raises CodecError if it may not."""
    for stream, chosen in choices(config.link.codec).items():
        name = plan.codec_of(stream)
        allowed = ladder(stream, config.link.error_budget) if chosen == AUTO else [chosen]
        if name not in allowed:
            raise CodecError(f"a plan with {name[:200]} for {stream}, which this job has not agreed on")
