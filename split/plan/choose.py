"""`auto`: which codecs, how many micro-batches and how many of them under way, from what was measured.

A candidate has to keep within the error budget; among those the one with the shortest step wins, and of those that are
about as fast the one with the fewest bytes. link/ladder.py has the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import CodecState, parse
from isthmus.split.codecs.base import matrix_shape
from isthmus.split.codecs.uniform import Uniform
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import AUTO, TRAINING, choices
from isthmus.split.link.coding import Plan
from isthmus.split.link.ladder import candidates, kind_of, ladder
from isthmus.split.link.profile import LinkProfile, codec_seconds
from isthmus.split.plan.pipeline import StepCosts, step_seconds

FRONT, TAIL, FRONT_BACKWARD = "front", "tail", "front backward"
RECENT = "recent"  # beside them: all of that work, since the last aggregation
DEVICE_WORK = (FRONT, TAIL, FRONT_BACKWARD)  # names of a device's work in its ledger

_ABOUT_AS_FAST = 1.03
_WORTH_A_CHANGE = 0.95
_MOST_MICRO_BATCHES = 8
_SAMPLE_ROWS = 512
_LONGEST = 3600.0  # seconds that a device may say that something takes


@dataclass(frozen=True)
class DeviceView:
    """What the stage knows of a device that it makes a plan for."""

    families: frozenset[str]
    link: LinkProfile
    codec_seconds: Mapping[str, float]
    compute_seconds: Mapping[str, float]  # of a step, by DEVICE_WORK; empty: not measured yet
    plan: Plan

    @classmethod
    def of(cls, families: frozenset[str], measured: stage_pb2.Measured, plan: Plan) -> DeviceView:
        """Read what a device says that it has measured; what cannot be true is left out or bounded."""
        coding, computing = (
            {name: min(seconds, _LONGEST) for name, seconds in told.items() if seconds >= 0}
            for told in (measured.codec_seconds, measured.compute_seconds)
        )
        return cls(families, LinkProfile.from_proto(measured), coding, computing, plan)


@dataclass
class Planner:
    """Makes the link plans of one job's devices: codecs, micro-batches, and how many of these are under way."""

    config: TrainingConfig
    hidden_size: int
    bits: dict[tuple[str, str], float] = field(default_factory=dict)  # a value, by stream and codec
    _states: dict[tuple[str, str], CodecState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._choices = choices(self.config.link.codec)
        self.automatic = any(self._choices[stream] == AUTO for stream in TRAINING)
        self._ladders = {stream: ladder(stream, self.config.link.error_budget) for stream in TRAINING}
        self._seconds = codec_seconds(candidates(self.config), self.hidden_size) if self.automatic else {}

    def look_at(self, stream: str, tensor: Tensor) -> None:
        """Learn from a tensor of a training stream, (rows, sequence, hidden), what the candidates would make of it."""
        if self._choices.get(stream) != AUTO:
            return
        rows = tensor.detach().reshape(matrix_shape(tensor.shape))[:_SAMPLE_ROWS]
        for name in self._ladders[stream]:
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
            known = self.bits.get((stream, name))
            self.bits[stream, name] = bits if known is None else (known + bits) / 2

    def plans(
        self, views: Mapping[str, DeviceView], stage_seconds: Mapping[str, float], micro_batches: int | None = None
    ) -> tuple[dict[str, Plan], list[str]]:
        """Make a plan for each device. Returns the plans, and a sentence for each that changes what there was.

        stage_seconds: of a step's `forward` and `backward` on the stage; empty: not measured yet. micro_batches: what
        the job has settled on, when not everyone is asked.
        """
        counts = [micro_batches] if micro_batches else self._counts(views.values(), bool(stage_seconds))
        present = {view.plan.micro_batches for view in views.values() if view.plan.codecs}
        counts.sort(key=lambda count: (count not in present, count))  # what is has to be beaten
        best: dict[str, tuple[float, Plan]] = {}
        worst = math.inf
        for count in counts:
            found = {name: self._best(view, stage_seconds, count) for name, view in views.items()}
            slowest = max((seconds for seconds, _ in found.values()), default=0.0)
            if not best or slowest < worst * _WORTH_A_CHANGE:
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

    @property
    def nothing_yet(self) -> Plan:
        return Plan()

    @property
    def exact_adapters(self) -> bool:
        return parse(self._choices["adapters_up"]).exact

    def expected(self, view: DeviceView, stage_seconds: Mapping[str, float], slower: float) -> StepCosts:
        """The costs of a device's step before anything has crossed, with the plan that the device would get.

        slower: how many times slower the device is than this machine.
        """
        view = replace(view, codec_seconds={name: slower * seconds for name, seconds in self._seconds.items()})
        _, plan = min(
            (self._best(view, stage_seconds, count) for count in self._counts([view], True)), key=lambda pair: pair[0]
        )
        return self._costs_of(view, stage_seconds, plan)

    def _counts(self, views: Iterable[DeviceView], measured: bool) -> list[int]:
        if self.config.link.micro_batches:
            return [self.config.link.micro_batches]
        most = min(_MOST_MICRO_BATCHES, self.config.batch_size)
        if not measured:  # computing takes an unknown time yet: cut only where there is something to hide
            slow = any(view.link.round_trip > 0.005 or min(view.link.up, view.link.down) < 5e7 for view in views)
            return [min(4, most) if slow else 1]
        return [count for count in (1, 2, 4, 8) if count <= most]

    def _best(self, view: DeviceView, stage_seconds: Mapping[str, float], count: int) -> tuple[float, Plan]:
        tried = []
        for levels in product(self._levels("hidden", view), self._levels("gradients", view)):
            level = dict(zip(("hidden", "gradients"), levels, strict=True))
            codecs = {
                stream: self._ladders[stream][level[kind_of(stream)]] if name == AUTO else name
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

    def _levels(self, kind: str, view: DeviceView) -> list[int]:
        """The rungs of a kind's ladder that the device can follow; one where there is nothing to choose."""
        automatic = [stream for stream in TRAINING if kind_of(stream) == kind and self._choices[stream] == AUTO]
        if not automatic:
            return [0]
        names = self._ladders[automatic[0]]
        return [level for level, name in enumerate(names) if parse(name).families <= view.families]

    def _seconds_of(self, view: DeviceView, stage_seconds: Mapping[str, float], plan: Plan) -> float:
        return step_seconds(self._costs_of(view, stage_seconds, plan), plan.micro_batches, plan.depth)

    def _costs_of(self, view: DeviceView, stage_seconds: Mapping[str, float], plan: Plan) -> StepCosts:
        values = self.config.batch_size * self.config.text.sequence_length * self.hidden_size

        def coding(stream: str) -> float:
            name = plan.codec_of(stream)
            both = max(view.codec_seconds.get(name, 0.0), self._seconds.get(name, 0.0))
            return both / 2 * values / 1e6

        work = view.compute_seconds
        return StepCosts(
            view.link,
            u_shaped=self.config.devices.labels == "device",
            front=work.get(FRONT, 0.0),
            tail=work.get(TAIL, 0.0),
            front_backward=work.get(FRONT_BACKWARD, 0.0),
            stage_forward=stage_seconds.get("forward", 0.0),
            stage_backward=stage_seconds.get("backward", 0.0),
            coding={stream: coding(stream) for stream in TRAINING},
            size={stream: values * self._bits_of(stream, plan.codec_of(stream)) / 8 for stream in TRAINING},
        )

    def _bits_of(self, stream: str, name: str) -> float:
        """Bits a value takes in a stream by a codec: as measured, or an estimate until then."""
        measured = self.bits.get((stream, name))
        if measured is not None:
            return measured
        codec = parse(name)
        if isinstance(codec.quantiser, Uniform):
            # A Gaussian's entropy, and what klt saved on models that were looked at.
            return max(0.5, math.log2(4.13 / codec.quantiser.step) - ("klt" in codec.families))
        return 8 * codec.wire_bytes((64, self.hidden_size)) / (64 * self.hidden_size)

    def _bytes(self, plan: Plan) -> float:
        """Bits of one value in each training stream, added up: only for comparing plans."""
        return sum(self._bits_of(stream, plan.codec_of(stream)) for stream in TRAINING)

    def _sentence(self, name: str, view: DeviceView, plan: Plan, seconds: float, before: float, measured: bool) -> str:
        expected = f"; about {seconds:.2g} s a step expected, {before:.2g} s as it was" if measured else ""
        return (
            f"{name}: hidden states by {_both(plan, 'hidden')}, gradients by {_both(plan, 'gradients')}, "
            f"{plan.micro_batches} micro-batches a step, {plan.depth} under way, on {view.link}{expected}"
        )


def _both(plan: Plan, kind: str) -> str:
    """Name the codecs up and down, once where they are the same."""
    up, down = plan.codec_of(f"{kind}_up"), plan.codec_of(f"{kind}_down")
    return up if up == down else f"{up} up and {down} down"
