"""When a device's cut moves during a job: its link or its load has changed, and stays so.

At every aggregation the solver is asked what it would choose from what was measured since the last one. A cut moves
only where the step would become clearly shorter, and only when the same has been so for several aggregations one
after the other: a device that is slow for a moment keeps what it has. Ranks stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from isthmus.split.job.shapes import AUTO, Shape, asked
from isthmus.split.link.profile import LinkProfile
from isthmus.split.plan.costs import Costs
from isthmus.split.plan.shapes import Capabilities, ShapeChoice, choose_shapes, expected_step

ROUNDS = 3  # aggregations
WORTH = 0.85  # of the present step that the new one may take at most


@dataclass(frozen=True)
class MeasuredDevice:
    """What was measured of a device since the last aggregation.

    compute_seconds: its own computing in a step.
    """

    compute_seconds: float
    link: LinkProfile


@dataclass
class CutMover:
    """Decides when cuts of one job move. memory: bytes of each device, as it told them before the job."""

    costs: Costs
    memory: Mapping[str, float] = field(default_factory=dict)
    rounds: int = ROUNDS
    _wished: dict[str, tuple[bool, int]] = field(default_factory=dict)  # by device: upward, for how many rounds

    def look(
        self, shapes: Mapping[str, Shape], seen: Mapping[str, MeasuredDevice], stage_seconds: float
    ) -> dict[str, ShapeChoice]:
        """Find the devices whose cuts are to move now.

        shapes: of all devices at work. seen: what was measured of them. stage_seconds: of a step's computing at the
        stage.
        """
        wishes = self._wishes(shapes, seen, stage_seconds)
        counts = {}
        for device, choice in wishes.items():
            upward = choice.shape.cut > shapes[device].cut
            before, rounds = self._wished.get(device, (upward, 0))
            counts[device] = (upward, rounds + 1 if before == upward else 1)
        self._wished = counts
        if not counts or max(rounds for _, rounds in counts.values()) < self.rounds:
            return {}
        self._wished = {}  # what is so then has to show first
        return {device: wishes[device] for device, (_, rounds) in counts.items() if rounds >= self.rounds}

    def _wishes(
        self, shapes: Mapping[str, Shape], seen: Mapping[str, MeasuredDevice], stage_seconds: float
    ) -> dict[str, ShapeChoice]:
        """Find the devices that would better have another cut, if that is worth it."""
        cuts = asked(self.costs.training)[0]
        if stage_seconds <= 0 or any(one.compute_seconds <= 0 for one in seen.values()):
            return {}
        costs = self._with(shapes, {device: cuts.of(device) for device in shapes})
        able = {}
        for device, one in seen.items():
            work = costs.device_work(shapes[device].cut, shapes[device].rank)
            flops = work / one.compute_seconds if work else math.inf  # without blocks and a head its speed is no matter
            able[device] = Capabilities(flops, self.memory.get(device, 0.0), one.link)
        server = Capabilities(costs.server_work(shape.cut for shape in shapes.values()) / stage_seconds)
        chosen = choose_shapes(costs, able, server)
        now = expected_step(self._with(shapes, {d: shape.cut for d, shape in shapes.items()}), able, server, shapes)
        then = max(choice.step_seconds for choice in chosen.values())
        if then > WORTH * now:
            return {}
        return {device: choice for device, choice in chosen.items() if choice.shape.cut != shapes[device].cut}

    def _with(self, shapes: Mapping[str, Shape], cuts: Mapping[str, int | None]) -> Costs:
        """The costs of the job with these cuts, and with the present ranks."""
        named = ",".join(f"{device}={AUTO if cut is None else cut}" for device, cut in cuts.items())
        ranks = ",".join(f"{device}={shape.rank}" for device, shape in shapes.items())
        return replace(self.costs, training=self.costs.training.but(cuts=named, ranks=ranks))
