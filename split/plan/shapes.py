"""`--cut auto` and `--rank auto`: what each device holds and trains, from what was measured of it.

All devices' rows go through the server as one batch, so a step takes as long as its slowest device. The deadline is the
shortest step that can be reached: found by bisection, where for each deadline every device takes the largest cut with
which it keeps it. A smaller cut leaves the server more to do, which takes time from all devices, so this is repeated
until nothing changes. Then cuts are lowered again as far as the step grows by no more than _CUT_SLACK: a block at the
server learns from everyone's batch at every step, one on devices from an average now and then, so a larger cut that
saves no time costs steps (benchmarks/README.md, heterogeneous). At last every device gets the largest rank, up to the
job's, with which it is at most _RANK_SLACK over the deadline, its adapters' way to the coordinator included. Memory
bounds both. Times come from the simulation of a step (pipeline.py) with the codecs that the planner would take
(choose.py).

A cut is never chosen below 1: with 0 what a device sends is as good as its text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus.protos.v1.events_pb2 import ShapeChosen
from isthmus.split.codecs import FAMILIES
from isthmus.split.errors import BadRequest
from isthmus.split.job.shapes import ByName, Shape, asked
from isthmus.split.link.profile import LinkProfile
from isthmus.split.plan.choose import FRONT, FRONT_BACKWARD, TAIL, DeviceView, Planner
from isthmus.split.plan.costs import Costs
from isthmus.split.plan.memory import training_bytes
from isthmus.split.plan.pipeline import StepCosts, step_seconds

_CUT_SLACK = 1.03  # over the shortest step, below which no block is worth being held by a device
_RANK_SLACK = 1.05
_NEAR = 1.005  # two deadlines are about the same
_MOST_MICRO_BATCHES = 8
_OF_MEMORY = 0.9  # of a device's memory that a job may take
_ADAPTER_BYTES = {True: 4.0, False: 5 / 8}  # of a value, each way, by whether adapters cross as they are


@dataclass(frozen=True)
class Capabilities:
    """What a device, or the server, can do. flops: operations a second in training. memory: bytes; 0: not told."""

    flops: float
    memory: float = 0.0
    link: LinkProfile = field(default_factory=LinkProfile)


@dataclass(frozen=True)
class ShapeChoice:
    """A device's shape and why it was chosen.

    step_seconds: expected of the device's step. deadline: the job's, in seconds. memory: bytes that it takes.
    """

    shape: Shape
    step_seconds: float
    deadline: float
    memory: float

    def told(self, device: str, when: str = "") -> ShapeChosen:
        """The event that tells about the choice. when: how its sentence for people begins."""
        line = (
            f"{when}{device}: {self.shape}; about {self.step_seconds:.2g} s a step expected, "
            f"{self.deadline:.2g} s for all, and {self.memory / 2**30:.2g} GiB of memory"
        )
        return ShapeChosen(
            cut=self.shape.cut,
            rank=self.shape.rank,
            step_seconds=self.step_seconds,
            deadline_seconds=self.deadline,
            memory_bytes=self.memory,
            message=line,
        )


def choose_shapes(
    costs: Costs, devices: Mapping[str, Capabilities], server: Capabilities, kept: Mapping[str, Shape] | None = None
) -> dict[str, ShapeChoice]:
    """Choose a shape for each device; equal figures give equal choices. kept: the shapes that devices have already.

    Raises BadRequest for a device whose memory is not enough for the smallest share that it may have.
    """
    cuts, ranks = asked(costs.training)
    for name, shape in (kept or {}).items():
        cuts, ranks = cuts.but(name, shape.cut), ranks.but(name, shape.rank)
    job = _Solver(
        costs, server, {n: _Device(costs, n, able, server, cuts, ranks) for n, able in sorted(devices.items())}
    )
    best = min((job.smallest(), job.fitting(math.inf)), key=job.slowest)
    least, greatest = 0.0, job.slowest(best)
    while greatest > _NEAR * least and greatest > 1e-6:
        middle = (least + greatest) / 2
        shapes = job.fitting(middle)
        slowest = job.slowest(shapes)
        if slowest <= middle:
            best, greatest = shapes, slowest
        else:
            least = middle
    best = job.with_ranks(job.lowered(best, _CUT_SLACK * greatest), _RANK_SLACK * greatest)
    server_seconds = job.server_seconds(best)
    chosen = {}
    for name, one in job.devices.items():
        shape = best[name]
        needed = training_bytes(costs, shape.cut, shape.rank)
        chosen[name] = ShapeChoice(shape, one.seconds(shape, server_seconds), greatest, needed)
    return chosen


def expected_step(
    costs: Costs, devices: Mapping[str, Capabilities], server: Capabilities, shapes: Mapping[str, Shape]
) -> float:
    """Seconds of a step with these shapes. costs: of a job that has them."""
    cuts, ranks = asked(costs.training)
    job = _Solver(
        costs, server, {n: _Device(costs, n, able, server, cuts, ranks) for n, able in sorted(devices.items())}
    )
    return job.slowest(shapes)


def check_memory(costs: Costs, device: str, shape: Shape, memory: float, share: str = "share") -> None:
    """Raises BadRequest where a device's memory is not enough for a shape.

    memory: bytes that a job may take; 0: not known. share: what the shape is called in the message.
    """
    needed, training = training_bytes(costs, shape.cut, shape.rank), costs.training
    if memory and needed > memory:
        raise BadRequest(
            f"device {device} has {memory / 2**30:.2f} GiB of memory for a job; its {share} ({shape}, batches of "
            f"{training.batch_size} x {training.text.sequence_length}) takes {needed / 2**30:.2f} GiB: choose a "
            "smaller cut, batch_size or sequence_length, or leave it out"
        )


@dataclass
class _Solver:
    costs: Costs
    server: Capabilities
    devices: dict[str, _Device]

    def smallest(self) -> dict[str, Shape]:
        """The smallest shape that each device may have."""
        return {name: Shape(one.cuts[0], one.ranks[0]) for name, one in self.devices.items()}

    def fitting(self, deadline: float) -> dict[str, Shape]:
        """The largest cuts, with the least ranks, with which everyone keeps the deadline; where one cannot, its
        smallest.

        Cuts are lowered from the largest: the server's time is then the least, and grows as cuts are given up.
        """
        shapes = {name: Shape(one.cuts[-1], one.ranks[0]) for name, one in self.devices.items()}
        while True:
            seconds = self.server_seconds(shapes)
            kept = {name: one.largest(shapes[name], seconds, deadline) for name, one in self.devices.items()}
            if kept == shapes:
                return shapes
            shapes = kept

    def lowered(self, shapes: Mapping[str, Shape], deadline: float) -> dict[str, Shape]:
        """Lower cuts, the largest first, as long as everyone keeps the deadline."""
        shapes = dict(shapes)
        while True:
            for name in sorted(shapes, key=lambda name: (-shapes[name].cut, name)):
                smaller = [cut for cut in self.devices[name].cuts if cut < shapes[name].cut]
                tried = {**shapes, name: Shape(smaller[-1], shapes[name].rank)} if smaller else None
                if tried and self.slowest(tried) <= deadline:
                    shapes = tried
                    break
            else:
                return shapes

    def with_ranks(self, shapes: Mapping[str, Shape], deadline: float) -> dict[str, Shape]:
        """Give each device the largest rank with which it keeps the deadline and has the memory."""
        seconds = self.server_seconds(shapes)
        return {
            name: max(
                [shapes[name]]
                + [
                    shape
                    for shape in (Shape(shapes[name].cut, rank) for rank in one.ranks)
                    if one.fits(shape) and one.seconds(shape, seconds) <= deadline
                ]
            )
            for name, one in self.devices.items()
        }

    def server_seconds(self, shapes: Mapping[str, Shape]) -> tuple[float, float]:
        """Seconds of the server's forward and backward, for all devices' rows."""
        costs, rank = self.costs, self.costs.training.lora.rank
        forward = sum(costs.forward(costs.layers - shape.cut, rank, costs.tokens) for shape in shapes.values())
        backward = sum(costs.backward(costs.layers - shape.cut, rank, costs.tokens) for shape in shapes.values())
        backward += len(shapes) * costs.head_at_server
        return forward / self.server.flops, backward / self.server.flops

    def slowest(self, shapes: Mapping[str, Shape]) -> float:
        """Seconds of the slowest device's step."""
        seconds = self.server_seconds(shapes)
        return max(one.seconds(shapes[name], seconds) for name, one in self.devices.items())


class _Device:
    """One device's possible shapes, and how long its steps take with them."""

    def __init__(
        self, costs: Costs, name: str, able: Capabilities, server: Capabilities, cuts: ByName, ranks: ByName
    ) -> None:
        self._slower = server.flops / able.flops  # at coding, too
        self.costs, self.able = costs, able
        cut, rank = cuts.of(name), ranks.of(name)
        every_cut = [cut] if cut is not None else list(range(1, costs.layers))
        self.ranks = [rank] if rank is not None else list(range(1, costs.training.lora.rank + 1))
        self.cuts = [cut for cut in every_cut if self.fits(Shape(cut, self.ranks[0]))]
        if not self.cuts:
            check_memory(costs, name, Shape(every_cut[0], self.ranks[0]), _OF_MEMORY * able.memory, "smallest share")
        self._planner = Planner(costs.training, costs.hidden)
        self._costs = self._step_costs(Shape(self.cuts[0], self.ranks[0]))

    def fits(self, shape: Shape) -> bool:
        needed = training_bytes(self.costs, shape.cut, shape.rank)
        return not self.able.memory or needed <= _OF_MEMORY * self.able.memory

    def largest(self, at_most: Shape, server: tuple[float, float], deadline: float) -> Shape:
        """The largest cut up to this one that keeps the deadline; the smallest where none does."""
        for cut in reversed(self.cuts):
            shape = Shape(cut, at_most.rank)
            if shape <= at_most and self.seconds(shape, server) <= deadline:
                return shape
        return Shape(self.cuts[0], at_most.rank)

    def work(self, shape: Shape) -> dict[str, float]:
        """Seconds of the device's work in a step, by kind."""
        costs, flops = self.costs, self.able.flops
        trains = bool(shape.rank and shape.cut)
        return {
            FRONT: costs.forward(shape.cut, shape.rank, costs.tokens) / flops,
            TAIL: costs.tail / flops,
            FRONT_BACKWARD: costs.backward(shape.cut, shape.rank, costs.tokens) / flops if trains else 0.0,
        }

    def seconds(self, shape: Shape, server: tuple[float, float]) -> float:
        """Seconds of a step, with its share of an aggregation. server: seconds of its forward and backward."""
        work = self.work(shape)
        costs = StepCosts(
            self.able.link,
            u_shaped=self._costs.u_shaped,
            front=work[FRONT],
            tail=work[TAIL],
            front_backward=work[FRONT_BACKWARD],
            stage_forward=server[0],
            stage_backward=server[1],
            coding=self._costs.coding,
            size=self._costs.size,
        )
        most = min(_MOST_MICRO_BATCHES, self.costs.training.batch_size)
        counts = [self.costs.training.link.micro_batches or count for count in (1, 2, 4, 8) if count <= most]
        size = self._adapter_bytes * self.costs.adapter_values(shape.cut, shape.rank)
        adapters = size / self.able.link.up + size / self.able.link.down
        if self.costs.training.devices_train_all:
            return min(step_seconds(costs, count, count) + self._modules(shape, count) for count in counts)
        return min(step_seconds(costs, count, count) for count in counts) + (
            adapters / self.costs.training.devices.aggregate_every
        )

    def _modules(self, shape: Shape, count: int) -> float:
        """Seconds of a step in which modules of the server's blocks are asked for (DLoRA), in `count` micro-batches."""
        costs, link = self.costs, self.able.link
        blocks = costs.layers - shape.cut if shape.rank else 0
        values = blocks * costs.tokens * costs.site_values  # each way, forward and backward together
        size = values * self._costs.size["hidden_up"] / (costs.tokens * costs.hidden)
        waits = 2 * blocks * costs.sites * link.round_trip / count
        return size / link.up + size / link.down + waits

    @property
    def _adapter_bytes(self) -> float:
        return _ADAPTER_BYTES[self._planner.exact_adapters]

    def _step_costs(self, shape: Shape) -> StepCosts:
        """Costs with the codecs that the planner would choose for this link; they hardly depend on the cut."""
        view = DeviceView(frozenset(FAMILIES), self.able.link, {}, self.work(shape), self._planner.nothing_yet)
        return self._planner.expected(view, {"forward": 0.1, "backward": 0.1}, self._slower)
