"""`auto`: which codecs, how many micro-batches and how many of them under way, from what was measured.

A candidate has to keep within the error budget; among those the one with the shortest step wins, and of those that are
about as fast the one with the fewest bytes. The budget is a share by which perplexity may be worse. It is translated to
the quantiser's step by a calibration (benchmarks/README.md, compression): at 0.5 % hidden states bear steps of
_HIDDEN_STEP and gradients of _GRADIENT_STEP times their RMS, and the harm goes with the square of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

from torch import Tensor

from split.codecs import CodecState, parse
from split.codecs.base import matrix_shape
from split.coding import Plan
from split.config import TrainingConfig
from split.plan.pipeline import StepCosts, step_seconds
from split.plan.profile import LinkProfile, codec_seconds
from split.streams import AUTO, TRAINING, choices

FRONT, TAIL, FRONT_BACKWARD = "front", "tail", "front backward"
DEVICE_WORK = (FRONT, TAIL, FRONT_BACKWARD)  # names of a device's work in its ledger

_HIDDEN_STEP, _GRADIENT_STEP, _CALIBRATED_AT = 0.13, 0.5, 0.005
_ABOUT_AS_FAST = 1.03
_WORTH_A_CHANGE = 0.95
_MOST_MICRO_BATCHES = 8
_SAMPLE_ROWS = 512
_FIRST_BITS = {"hidden": 2.9, "gradients": 2.2}  # a value, of klt with an entropy coder, until they are measured


def _kind(stream: str) -> str:
    return stream.partition("_")[0]


def candidates_of(kind: str, budget: float) -> list[str]:
    """Codecs for `hidden` or `gradients` that keep within the budget."""
    step = (_HIDDEN_STEP if kind == "hidden" else _GRADIENT_STEP) * math.sqrt(budget / _CALIBRATED_AT)
    uniform = f"uniform:step={min(step, 2.0):.3g}:per=tensor"
    names = [
        "none",
        "bfloat16",
        "hadamard,int8",
        f"hadamard,{uniform},zstd",
        f"klt,{uniform},zstd",
        f"klt,{uniform},range",
    ]
    return [parse(name).name for name in names]


def candidates(config: TrainingConfig) -> list[str]:
    """All codecs that may be chosen in a job, those that the user has fixed included."""
    names: list[str] = []
    for stream, name in choices(config.codec).items():
        if stream in TRAINING:
            names += candidates_of(_kind(stream), config.error_budget) if name == AUTO else [name]
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class View:
    """What the stage knows of a device that it makes a plan for."""

    families: frozenset[str]
    link: LinkProfile
    codec_seconds: Mapping[str, float]
    compute_seconds: Mapping[str, float]  # of a step, by DEVICE_WORK; empty: not measured yet
    plan: Plan


@dataclass
class Planner:
    """Makes the plans of one job's devices."""

    config: TrainingConfig
    hidden_size: int
    bits: dict[tuple[str, str], float] = field(default_factory=dict)  # a value, by kind and codec
    _states: dict[tuple[str, str], CodecState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._choices = choices(self.config.codec)
        self.automatic = any(self._choices[stream] == AUTO for stream in TRAINING)
        self._seconds = codec_seconds(candidates(self.config)) if self.automatic else {}

    def look_at(self, stream: str, tensor: Tensor) -> None:
        """Learns from a tensor of a training stream what the candidates would make of it. (rows, sequence, hidden)."""
        if self._choices.get(stream) != AUTO:
            return
        kind = _kind(stream)
        rows = tensor.detach().reshape(matrix_shape(tensor.shape))[:_SAMPLE_ROWS]
        for name in candidates_of(kind, self.config.error_budget):
            codec = parse(name)
            if codec.exact or not len(rows):
                continue
            state = self._states.get((stream, name))
            sample = rows
            if state is None:  # a transform that learns is not asked about what it has just learnt from
                state = self._states[stream, name] = CodecState(0)
                codec.encode(rows[: len(rows) // 2], state)
                sample = rows[len(rows) // 2 :]
            bits = 8 * len(codec.encode(sample, state)) / max(1, sample.numel())
            known = self.bits.get((kind, name))
            self.bits[kind, name] = bits if known is None else (known + bits) / 2

    def plans(
        self, views: Mapping[str, View], stage_seconds: Mapping[str, float], micro_batches: int | None = None
    ) -> tuple[dict[str, Plan], list[str]]:
        """A plan for each device, and a sentence for each that changes what it had.

        stage_seconds: `forward` and `backward` of a step on the stage; empty: not measured yet. micro_batches: what the
        job has settled on, when not everyone is asked.
        """
        counts = [micro_batches] if micro_batches else self._counts(views.values(), bool(stage_seconds))
        best: dict[str, tuple[float, Plan]] = {}
        worst = math.inf
        for count in counts:
            found = {name: self._best(view, stage_seconds, count) for name, view in views.items()}
            slowest = max((seconds for seconds, _ in found.values()), default=0.0)
            if slowest < worst * (_WORTH_A_CHANGE if best else 1.0):
                best, worst = found, slowest
        plans, sentences = {}, []
        for name, (seconds, plan) in best.items():
            view = views[name]
            before = self._seconds_of(view, stage_seconds, view.plan)
            settled = view.plan.micro_batches == plan.micro_batches and view.plan.codecs
            fewer = self._bytes(plan) < 0.8 * self._bytes(view.plan)
            if settled and seconds > _WORTH_A_CHANGE * before and not fewer:
                plans[name] = view.plan
                continue
            plans[name] = plan
            if plan != view.plan and self.automatic:
                sentences.append(self._sentence(name, view, plan, seconds, before, bool(stage_seconds)))
        return plans, sentences

    def _counts(self, views: Iterable[View], measured: bool) -> list[int]:
        if self.config.micro_batches:
            return [self.config.micro_batches]
        most = min(_MOST_MICRO_BATCHES, self.config.batch_size)
        if not measured:  # computing takes an unknown time yet: cut only where there is something to hide
            slow = any(view.link.round_trip > 0.005 or min(view.link.up, view.link.down) < 5e7 for view in views)
            return [min(4, most) if slow else 1]
        return [count for count in (1, 2, 4, 8) if count <= most]

    def _best(self, view: View, stage_seconds: Mapping[str, float], count: int) -> tuple[float, Plan]:
        options = [self._options("hidden", view), self._options("gradients", view)]
        tried = []
        for hidden, gradients in product(*options):
            codecs = {
                stream: (hidden if _kind(stream) == "hidden" else gradients) if name == AUTO else name
                for stream, name in self._choices.items()
            }
            plan = Plan(count, count, codecs, self.config.seed)
            tried.append((self._seconds_of(view, stage_seconds, plan), plan))
        fastest = min(seconds for seconds, _ in tried)
        near = [(seconds, plan) for seconds, plan in tried if seconds <= _ABOUT_AS_FAST * fastest]
        seconds, plan = min(near, key=lambda pair: self._bytes(pair[1]))
        for depth in range(1, count):  # as few under way, and so as little memory, as are about as fast
            shallow = Plan(count, depth, plan.codecs, plan.seed)
            if self._seconds_of(view, stage_seconds, shallow) <= 1.01 * seconds:
                return seconds, shallow
        return seconds, plan

    def _options(self, kind: str, view: View) -> list[str]:
        streams = [stream for stream in TRAINING if _kind(stream) == kind]
        if all(self._choices[stream] != AUTO for stream in streams):
            return [self._choices[streams[0]]]
        names = candidates_of(kind, self.config.error_budget)
        return [name for name in names if parse(name).families <= view.families]

    def _seconds_of(self, view: View, stage_seconds: Mapping[str, float], plan: Plan) -> float:
        values = self.config.batch_size * self.config.sequence_length * self.hidden_size

        def coding(stream: str) -> float:
            name = plan.codec_of(stream)
            both = max(view.codec_seconds.get(name, 0.0), self._seconds.get(name, 0.0))
            return both / 2 * values / 1e6

        work = view.compute_seconds
        costs = StepCosts(
            view.link,
            u_shaped=self.config.labels == "device",
            front=work.get(FRONT, 0.0),
            tail=work.get(TAIL, 0.0),
            front_backward=work.get(FRONT_BACKWARD, 0.0),
            stage_forward=stage_seconds.get("forward", 0.0),
            stage_backward=stage_seconds.get("backward", 0.0),
            hidden_coding=coding("hidden_up"),
            gradient_coding=coding("gradients_down"),
            hidden_bytes=values * self._bits_of("hidden", plan.codec_of("hidden_up")) / 8,
            gradient_bytes=values * self._bits_of("gradients", plan.codec_of("gradients_down")) / 8,
        )
        return step_seconds(costs, plan.micro_batches, plan.depth)

    def _bits_of(self, kind: str, name: str) -> float:
        measured = self.bits.get((kind, name))
        if measured is not None:
            return measured
        codec = parse(name)
        if "klt" in codec.families and "uniform" in codec.families:
            return _FIRST_BITS[kind] + (0.4 if "zstd" in codec.families else 0.0)
        if "uniform" in codec.families:
            step = _HIDDEN_STEP if kind == "hidden" else _GRADIENT_STEP
            return math.log2(4.13 / step)  # the entropy of a Gaussian's symbols
        return 8 * codec.wire_bytes((64, self.hidden_size)) / (64 * self.hidden_size)

    def _bytes(self, plan: Plan) -> float:
        """Of a value in each training stream: only to compare plans with."""
        return sum(self._bits_of(_kind(stream), plan.codec_of(stream)) for stream in TRAINING)

    def _sentence(self, name: str, view: View, plan: Plan, seconds: float, before: float, measured: bool) -> str:
        expected = f"; about {seconds:.2g} s a step expected, {before:.2g} s as it was" if measured else ""
        return (
            f"{name}: hidden states by {plan.codec_of('hidden_up')}, gradients by {plan.codec_of('gradients_down')}, "
            f"{plan.micro_batches} micro-batches a step, {plan.depth} under way, on {view.link}{expected}"
        )
