"""Decides who best holds which blocks of a served model, and how fast answers will come, from profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.codecs import parse
from isthmus.split.errors import BadRequest, UnsupportedModel
from isthmus.split.inference.serving import CLOUD, ServingConfig, SpanConfig, format_stages, memory_of
from isthmus.split.link.profile import LinkProfile
from isthmus.split.models.source import TensorSource
from isthmus.split.plan.serving_speed import Node, Placement, ServedSizes, best_chain, best_single, token_seconds
from isthmus.split.runtime.choose import AUTO, ONNX
from isthmus.split.runtime.speed import BYTES, Speed, speeds_of

_GIB = 2**30


@dataclass(frozen=True)
class StagesPlan:
    """How a model's blocks are spread.

    spans: the spans that are served.
    told: what the job's event says of them; None if there is nothing to tell.
    """

    spans: tuple[SpanConfig, ...]
    told: pb.ServingPlanned | None = None


def plan_serving(
    source: TensorSource, serving: ServingConfig, profiles: Mapping[str, pb.Profile], adapter_bytes: float = 0.0
) -> StagesPlan:
    """Plans who holds which blocks.

    serving: the configuration asked for; spans are chosen here if it has none.
    profiles: profiles of CLOUD and of the devices in question, by name.
    adapter_bytes: the most bytes that all adapters together have for one block.

    Raises BadRequest if spans are to be chosen and all the memory is not enough.
    """
    nodes = {name: _node(name, profile, source, serving) for name, profile in profiles.items()}
    order = [nodes[CLOUD], *(nodes[name] for name in sorted(nodes) if name != CLOUD)]
    served = _served(source, serving, profiles[CLOUD], adapter_bytes)
    if serving.spans:
        spans = serving.spans
        away = {name: Node(name, math.inf, None) for name in serving.devices}
        chain = [Placement((away | nodes)[one.holders[0]], one.last - one.first) for one in spans]
    else:
        chain = _choose(order, served, serving)
        spans = _spans(chain)
    if len(spans) == len(nodes) == 1:
        return StagesPlan(spans)
    return StagesPlan(spans, _comparison(format_stages(spans), chain, order, served))


def _choose(nodes: Sequence[Node], served: ServedSizes, serving: ServingConfig) -> list[Placement]:
    here = nodes[0]
    if served.room(here) == served.blocks:  # hidden states go to devices only if somebody asks for it or needs them
        return [Placement(here, served.blocks)]
    chain = best_chain(nodes, served)
    if chain is None:
        needed = served.blocks * (served.block_bytes + served.cache_bytes)
        have = ", ".join(
            f"{node.name} {node.memory / _GIB:.1f} GiB" + ("" if node.rate else " (not measured yet)") for node in nodes
        )
        raise BadRequest(
            f"nobody has the memory: {served.blocks} blocks take {needed / _GIB:.1f} GiB with room for "
            f"{serving.room} sequences of {serving.limits.context} tokens, and free for them are: {have}; serve fewer "
            "sequences, a shorter context, or --weights int4, or connect more devices"
        )
    return chain


def _spans(chain: Sequence[Placement]) -> tuple[SpanConfig, ...]:
    spans: list[SpanConfig] = []
    for part in chain:
        first = spans[-1].last if spans else 0
        spans.append(SpanConfig(first, first + part.blocks, (part.node.name,)))
    return tuple(spans)


def _comparison(
    stages: str, chain: Sequence[Placement], nodes: Sequence[Node], served: ServedSizes
) -> pb.ServingPlanned:
    """Compares a chain with the best single node, in tokens a second of one answer; None where they are not known."""
    single = best_single(nodes, served)
    unknown = sorted({part.node.name for part in chain if not part.node.rate})
    mine = None if unknown else 1 / token_seconds(chain, served)
    alone = None if single is None else 1 / token_seconds([single], served)
    name = "" if single is None else single.node.name
    same = [part.node.name for part in chain] == [name]
    if mine is None:
        line = f"no prediction for {stages}: speed and link of {', '.join(unknown)} are not known yet"
        if alone is not None:
            line += f"; {name} alone has the memory and is predicted at {alone:.3g} tokens/s"
    else:
        line = f"{stages} is predicted at {mine:.3g} tokens/s (one answer at a time)"
        if alone is None:
            able = [node.name for node in nodes if served.room(node) == served.blocks]
            line += f"; of {', '.join(able)} alone nothing is known yet" if able else "; no single node has the memory"
        elif not same:
            line += f"; {name} alone has the memory and would give {alone:.3g}"
    slower = mine is not None and alone is not None and not same and mine < alone
    if slower:
        line += f": use --stages {name}:0-{served.blocks}"
    return pb.ServingPlanned(
        message=line,
        stages=stages,
        tokens_per_second=mine,
        single=name,
        single_tokens_per_second=alone,
        slower=slower,
    )


def _node(name: str, profile: pb.Profile, source: TensorSource, serving: ServingConfig) -> Node:
    memory = memory_to_use(profile) or math.inf
    if name == CLOUD:
        memory -= memory_of(source.config, serving).ends_bytes
    speed = _speed(profile, source, serving, serving.chain.weights)
    if speed is None or not profile.HasField("link"):
        return Node(name, memory, None)
    link = LinkProfile.from_proto(profile.link)
    return Node(name, memory, speed.bytes_per_second, speed.block_seconds, speed.batch_seconds, link)


def _served(source: TensorSource, serving: ServingConfig, here: pb.Profile, adapter_bytes: float) -> ServedSizes:
    config, memory = source.config, memory_of(source.config, serving)
    head = _speed(here, source, serving, memory.head_weights)
    head_bytes = memory.end_values * BYTES[memory.head_weights]
    return ServedSizes(
        blocks=config.num_hidden_layers,
        block_bytes=memory.weight_bytes(1) + adapter_bytes,
        cache_bytes=memory.cache_bytes(1),
        hidden_bytes=parse(serving.chain.codec).wire_bytes((1, config.hidden_size)),
        gateway_seconds=0.0 if head is None else head.batch_seconds + head_bytes / head.bytes_per_second,
    )


def _speed(profile: pb.Profile, source: TensorSource, serving: ServingConfig, weights: str) -> Speed | None:
    """Speed of the runtime that a holder there will have; None if not known."""
    block = memory_of(source.config, serving).weight_bytes(1)
    known = [
        speed
        for speed in speeds_of(profile)
        if speed.weights == weights
        and (serving.chain.runtime == AUTO or speed.runtime == serving.chain.runtime)
        and (speed.runtime != ONNX or _has_graph(source))
    ]
    return min(known, key=lambda speed: speed.seconds(block), default=None)


def _has_graph(source: TensorSource) -> bool:
    from isthmus.split.runtime.onnx_shape import check_supported

    try:
        check_supported(source.config)
    except UnsupportedModel:
        return False
    return True


def memory_to_use(profile: pb.Profile) -> float:
    """Bytes of memory where blocks lie, which is the accelerator's where there is one; 0 if not known."""
    return float(profile.accelerator_bytes or profile.memory_bytes)
