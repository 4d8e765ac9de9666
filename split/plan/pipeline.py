"""How long a training step takes on a link: a small discrete-event simulation of its micro-batches.

Four resources, each doing one thing at a time in the order in which things become ready: the device, the uplink, the
stage, the downlink. What a codec costs is on the side that runs it. Seconds and bytes are of the whole step.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus.split.link.profile import LinkProfile

_A_TASK = 0.002  # seconds that a task of one more micro-batch costs, however small it is

_DEVICE, _UP, _STAGE, _DOWN = range(4)


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a whole step's work.

    u_shaped: whether labels are on the device; else there is no tail, no gradient up and no hidden states down. coding:
    seconds to encode or to decode, on either side, by stream. size: bytes, by stream.
    """

    link: LinkProfile
    u_shaped: bool = True
    front: float = 0.0
    tail: float = 0.0
    front_backward: float = 0.0
    stage_forward: float = 0.0
    stage_backward: float = 0.0
    coding: Mapping[str, float] = field(default_factory=dict)
    size: Mapping[str, float] = field(default_factory=dict)


def step_seconds(costs: StepCosts, micro_batches: int, depth: int) -> float:
    """Simulate a step: seconds from the first forward to the last backward on the device.

    depth: how many micro-batches are under way at the same time.
    """
    chain = _chain(costs)
    latency = costs.link.round_trip / 2
    rates = {_UP: costs.link.up, _DOWN: costs.link.down}
    free = [0.0] * 4
    ready: list[tuple[float, int, int]] = [(0.0, number, 0) for number in range(min(depth, micro_batches))]
    begun, end = len(ready), 0.0
    while ready:
        at, number, place = heapq.heappop(ready)
        resource, amount = chain[place]
        on_link = resource in rates
        seconds = amount / micro_batches / rates[resource] if on_link else amount / micro_batches + _A_TASK
        done = free[resource] = max(at, free[resource]) + seconds
        if on_link:
            done += latency
        if place + 1 < len(chain):
            heapq.heappush(ready, (done, number, place + 1))
            continue
        end = max(end, done)
        if begun < micro_batches:
            heapq.heappush(ready, (done, begun, 0))
            begun += 1
    return end


def _chain(costs: StepCosts) -> list[tuple[int, float]]:
    """The resources that a micro-batch goes through in order, each with its seconds or bytes."""

    def coding(*streams: str) -> float:
        return sum(costs.coding.get(stream, 0.0) for stream in streams)

    def size(stream: str) -> float:
        return costs.size.get(stream, 0.0)

    forward, backward = costs.stage_forward, costs.stage_backward
    if not costs.u_shaped:
        return [
            (_DEVICE, costs.front + coding("hidden_up")),
            (_UP, size("hidden_up")),
            (_STAGE, forward + backward + coding("hidden_up", "gradients_down")),
            (_DOWN, size("gradients_down")),
            (_DEVICE, coding("gradients_down") + costs.front_backward),
        ]
    return [
        (_DEVICE, costs.front + coding("hidden_up")),
        (_UP, size("hidden_up")),
        (_STAGE, forward + coding("hidden_up", "hidden_down")),
        (_DOWN, size("hidden_down")),
        (_DEVICE, coding("hidden_down", "gradients_up") + costs.tail),
        (_UP, size("gradients_up")),
        (_STAGE, backward + coding("gradients_up", "gradients_down")),
        (_DOWN, size("gradients_down")),
        (_DEVICE, coding("gradients_down") + costs.front_backward),
    ]
