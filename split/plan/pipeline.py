"""How long a training step takes on a link: a small discrete-event simulation of its micro-batches.

Four resources, each doing one thing at a time in the order in which things become ready: the device, the uplink, the
stage, the downlink. What a codec costs is on the side that runs it. Seconds and bytes are of the whole step.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from split.plan.profile import LinkProfile

_A_TASK = 0.002  # seconds that a task of one more micro-batch costs, however small it is

_DEVICE, _UP, _STAGE, _DOWN = range(4)


@dataclass(frozen=True)
class StepCosts:
    """u_shaped: with labels on the device; else there is no tail, no gradient up and no hidden states down."""

    link: LinkProfile
    u_shaped: bool = True
    front: float = 0.0
    tail: float = 0.0
    front_backward: float = 0.0
    stage_forward: float = 0.0
    stage_backward: float = 0.0
    hidden_coding: float = 0.0  # on either side, of one stream: to encode or to decode it
    gradient_coding: float = 0.0
    hidden_bytes: float = 0.0  # of one stream
    gradient_bytes: float = 0.0


def step_seconds(costs: StepCosts, micro_batches: int, depth: int) -> float:
    """From the first forward to the last backward on the device, with `depth` micro-batches under way."""
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
    """What a micro-batch goes through: resource, and seconds or bytes."""
    hidden, gradient = costs.hidden_coding, costs.gradient_coding
    if not costs.u_shaped:
        return [
            (_DEVICE, costs.front + hidden),
            (_UP, costs.hidden_bytes),
            (_STAGE, hidden + costs.stage_forward + costs.stage_backward + gradient),
            (_DOWN, costs.gradient_bytes),
            (_DEVICE, gradient + costs.front_backward),
        ]
    return [
        (_DEVICE, costs.front + hidden),
        (_UP, costs.hidden_bytes),
        (_STAGE, hidden + costs.stage_forward + hidden),
        (_DOWN, costs.hidden_bytes),
        (_DEVICE, hidden + costs.tail + gradient),
        (_UP, costs.gradient_bytes),
        (_STAGE, gradient + costs.stage_backward + gradient),
        (_DOWN, costs.gradient_bytes),
        (_DEVICE, gradient + costs.front_backward),
    ]
