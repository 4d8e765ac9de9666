"""Rows of what a frame of each phase may hold and when it is due, one for each direction (docs/protocol.md).

A job has one of three tables: the U-shaped split (labels on the device), the split with labels at the server, and
DLoRA, where frames for sites of the server's blocks come in between. checks.py evaluates a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cache

from isthmus.protos.v1 import stage_pb2
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import stream_of
from isthmus.split.link.frames import ENDS, EVALUATIONS_AHEAD, HELD, INPUT_GRADIENT, Phase

Key = tuple[bool, stage_pb2.Phase, bool]  # upward, phase, for a site
UP, DOWN = True, False


class Size(Enum):
    """What determines the shape of a frame's tensor."""

    CUT = auto()  # (sequences of the micro-batch, sequence length, hidden size)
    HELD_OUT = auto()  # the same, of 1 to batch_size sequences
    ADAPTER = auto()  # (values of the device's adapter,)
    MODULES = auto()  # (values of the modules in `trained`,)
    QUESTION = auto()  # as in the question that the frame answers
    SITE = auto()  # (rows that are used, inputs or outputs of the site)


class Due(Enum):
    """The times at which a frame may come."""

    FIRST = auto()  # it opens the session, and comes once
    ALWAYS = auto()  # before the session is open, too
    OPENED = auto()  # at any time of an open session
    IN_ORDER = auto()  # where it is due in the order of a training step (order.py)
    BETWEEN_STEPS = auto()  # while no part of a step is under way
    ANSWER = auto()  # after its question, once all earlier questions are answered (questions.py)


@dataclass(frozen=True)
class Rule:
    """What one phase may hold in one direction. Fields have their names in protos/v1/stage.proto.

    must, may: fields that a frame has to have, and may have, beside its place and its values.
    size, stream: what determines the tensor's shape, and its stream; a tensor without a stream is not encoded.
    values: names of the scalars that a frame has to have, none of them below 0.
    other_values: names of the scalars that it may have; None for any.
    parts: how many numbers micro_batch can have; None for as many as the plan cuts a step into.
    answered: whether the other side answers.
    where_trained: whether the tensor is there exactly if the device trains anything.
    """

    due: Due
    must: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    size: Size | None = None
    stream: str = ""
    values: tuple[str, ...] = ()
    other_values: tuple[str, ...] | None = ()
    parts: int | None = 1
    answered: bool = True
    where_trained: bool = False


def rule_for(config: TrainingConfig, upward: bool, message: stage_pb2.Frame) -> Rule | None:
    """The row of a message; None if nobody sends such a message in this job."""
    table = _dlora() if config.devices_train_all else _split(config.devices.labels)
    return table.get((upward, message.phase, message.site != 0))


def _has(*names: str) -> frozenset[str]:
    return frozenset(names)


@cache
def _split(labels: str) -> dict[Key, Rule]:
    return _common() | (_labels_at_device() if labels == "device" else _labels_at_server())


def _common() -> dict[Key, Rule]:
    adapter = Rule(Due.ANSWER, size=Size.ADAPTER, other_values=(HELD,))
    return {
        (UP, Phase.PROBE, False): Rule(Due.ALWAYS, _has("probe")),
        (DOWN, Phase.PROBE, False): Rule(Due.ANSWER, _has("probe"), other_values=(HELD,)),
        (UP, Phase.OPEN, False): Rule(Due.FIRST, _has("open"), _has("measured")),
        (DOWN, Phase.OPEN, False): replace(
            adapter, must=_has("agreement", "plan"), may=_has("tensor", "frozen", "shape")
        ),
        (UP, Phase.STEP, False): Rule(
            Due.IN_ORDER, values=("tokens", "nll", "norm_squared"), other_values=(ENDS,), answered=False
        ),
        (UP, Phase.AGGREGATE, False): Rule(
            Due.IN_ORDER, _has("tensor"), _has("measured"), Size.ADAPTER, stream_of(Phase.AGGREGATE, UP, "")
        ),
        (DOWN, Phase.AGGREGATE, False): replace(
            adapter,
            must=_has("tensor"),
            may=_has("plan", "frozen", "shape"),
            stream=stream_of(Phase.AGGREGATE, DOWN, ""),
        ),
        (UP, Phase.REPORT, False): Rule(Due.OPENED, other_values=None, answered=False),
        (UP, Phase.CLOSE, False): Rule(Due.OPENED),
        (DOWN, Phase.CLOSE, False): Rule(Due.ANSWER, other_values=(HELD,)),
    }


def _labels_at_device() -> dict[Key, Rule]:
    up, down = _streams("device")
    hidden = Rule(Due.IN_ORDER, _has("tensor"), _has("wanted"), Size.CUT, up[Phase.FORWARD], parts=None)
    last = Rule(Due.ANSWER, _has("tensor"), size=Size.QUESTION, other_values=(HELD,))
    return {
        (UP, Phase.FORWARD, False): hidden,
        (DOWN, Phase.FORWARD, False): replace(last, stream=down[Phase.FORWARD], parts=None),
        (UP, Phase.BACKWARD, False): replace(hidden, may=_has(), stream=up[Phase.BACKWARD], values=("tokens",)),
        (DOWN, Phase.BACKWARD, False): _gradient(down[Phase.BACKWARD], "norm_squared"),
        (UP, Phase.EVALUATE, False): replace(
            hidden, due=Due.BETWEEN_STEPS, size=Size.HELD_OUT, stream=up[Phase.EVALUATE], parts=1
        ),
        (DOWN, Phase.EVALUATE, False): replace(last, stream=down[Phase.EVALUATE]),
    }


def _labels_at_server() -> dict[Key, Rule]:
    up, down = _streams("server")
    hidden = Rule(Due.IN_ORDER, _has("tensor", "labels"), size=Size.CUT, stream=up[Phase.FORWARD], parts=None)
    return {
        (UP, Phase.FORWARD, False): replace(hidden, values=("tokens",)),
        (DOWN, Phase.FORWARD, False): _gradient(down[Phase.FORWARD], "nll", "tokens", "norm_squared"),
        (UP, Phase.EVALUATE, False): replace(
            hidden, due=Due.BETWEEN_STEPS, size=Size.HELD_OUT, stream=up[Phase.EVALUATE], parts=1
        ),
        (DOWN, Phase.EVALUATE, False): Rule(Due.ANSWER, values=("nll", "tokens"), other_values=(HELD,)),
    }


def _gradient(stream: str, *values: str) -> Rule:
    """Row of the gradient at the cut, from the stage."""
    return Rule(
        Due.ANSWER,
        may=_has("tensor"),
        size=Size.QUESTION,
        stream=stream,
        values=values,
        other_values=(HELD,),
        parts=None,
        where_trained=True,
    )


@cache
def _dlora() -> dict[Key, Rule]:
    up, down = _streams("device")
    table = dict(_split("device"))

    def change(upward: bool, phase: stage_pb2.Phase, *may: str, parts: int | None) -> None:
        rule = table[upward, phase, False]
        table[upward, phase, False] = replace(rule, may=rule.may | _has(*may), parts=parts)

    ahead = EVALUATIONS_AHEAD + 1
    change(UP, Phase.FORWARD, "trained", "applied", parts=None)
    change(UP, Phase.EVALUATE, "applied", parts=ahead)
    change(DOWN, Phase.EVALUATE, parts=ahead)
    # The server trains nothing: it tells no norm, and sends no gradient where nothing before the cut trains.
    table[DOWN, Phase.BACKWARD, False] = replace(_gradient(down[Phase.BACKWARD]), where_trained=False)
    table[UP, Phase.MERGE, False] = Rule(
        Due.BETWEEN_STEPS, _has("tensor", "trained"), size=Size.MODULES, answered=False
    )
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.EVALUATE):
        parts = ahead if phase == Phase.EVALUATE else None
        flags = (INPUT_GRADIENT,) if phase == Phase.BACKWARD else ()
        site = Rule(Due.ANSWER, _has("tensor", "site"), size=Size.SITE, parts=parts)
        table[UP, phase, True] = replace(site, stream=up[phase])
        table[DOWN, phase, True] = replace(site, stream=down[phase], values=flags, other_values=(HELD,))
    return table


def _streams(labels: str) -> tuple[dict[stage_pb2.Phase, str], dict[stage_pb2.Phase, str]]:
    """Streams of the tensors that go up, and of those that go down, by phase."""
    phases = (Phase.FORWARD, Phase.BACKWARD, Phase.EVALUATE)
    up, down = ({phase: stream_of(phase, upward, labels) for phase in phases} for upward in (UP, DOWN))
    return up, down
