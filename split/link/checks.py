"""Checks a message against what its phase's row and the job allow, and decodes it. Both ends are equally strict.

Everything is checked before memory is allocated for what a message claims to hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs.finite import DIVERGED, LARGEST
from isthmus.split.codecs.packing import unpack_bits
from isthmus.split.codecs.wire import Expected, check_tensor, decode_tensor
from isthmus.split.errors import BadFrame, BadTensor
from isthmus.split.job.shapes import STACKING, Shape, asked
from isthmus.split.link.coding import Coder, Plan, Terms
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.ladder import check_agreed
from isthmus.split.link.phases import Due, Rule, Size, rule_for
from isthmus.split.link.profile import MAX_PROBE_BYTES
from isthmus.split.link.questions import Question
from isthmus.split.tls import check_name

_MAX_VALUES = 64  # scalars in a frame
_MAX_NAME = 64  # characters of a scalar's name
_MAX_TIMES = 64  # entries of each table of times in a Measured, and codec families in an Open
_MOST_TOKENS = 2**53  # most tokens that a device can have evaluated: a float does not count further
_EVALUATION = ("evaluation_nll", "evaluation_tokens")  # in a REPORT: both or neither
_PLACE = frozenset({"job", "session", "step", "micro_batch", "phase", "values"})  # checked by functions of their own
_WORDS = {  # how an error names a field, where "a" and the field's name would not be English
    "wanted": "positions that are wanted",
    "trained": "modules that train",
    "applied": "modules to ask for",
    "labels": "labels",
    "measured": "measurements",
    "open": "the contents of OPEN",
    "probe": "the contents of PROBE",
    "agreement": "an agreement",
    "frozen": "a frozen part",
}


@dataclass(frozen=True)
class Envelope:
    """Whose frames these are.

    session: the session's id; empty before the first frame.
    opened: whether OPEN has come, or this end has sent it.
    upward: whether the frames come from the device.
    """

    job: str
    session: str
    opened: bool
    upward: bool


def check(message: stage_pb2.Frame, envelope: Envelope, coder: Coder) -> Rule:
    """Checks a message against the row of its phase and returns that row, without a look into any tensor's contents.

    Raises BadFrame for what the row, the job or the session does not allow.
    """
    terms = coder.terms
    if message.phase not in Phase.values() or not message.phase:
        sender = "a device" if envelope.upward else "the coordinator"
        raise BadFrame(f"phase {message.phase} is not one that {sender} sends")
    if message.job != envelope.job:
        raise BadFrame(f"a frame for job {message.job[:32]!r}; this stream is of {envelope.job}")
    rule = rule_for(terms.config, envelope.upward, message)
    _check_session(message, rule, envelope)
    if rule is None:
        place = f" for site {message.site}" if message.site else ""
        sender = "device" if envelope.upward else "coordinator"
        raise BadFrame(f"{Phase.Name(message.phase)}{place} is not one that a {sender} sends in this job")
    _check_place(message, rule, coder)
    _check_sizes(message)
    _check_fields(message, rule, terms)
    _check_values(message, rule, terms)
    return rule


def decode(
    message: stage_pb2.Frame, rule: Rule, coder: Coder, *, upward: bool = True, question: Question | None = None
) -> Frame:
    """Decodes a message that `check` let through.

    rule: the row that `check` returned.
    upward: whether the message comes from the device.
    question: the question that the message answers or, for a frame of a site, the one that began the site's pass.

    Raises BadFrame, BadTensor or CodecError.
    """
    terms = coder.terms
    expected = _expected(message, rule, coder, upward, question)
    labels_as = None
    if "labels" in rule.must:
        labels_as = _labels_expected(message, terms)
        check_tensor(message.labels, labels_as)
    tensor = None
    if message.HasField("tensor"):
        stream = "" if message.HasField("shape") else rule.stream
        try:
            tensor = coder.decode(stream, message.tensor, expected, message.step, message.micro_batch, message.site)
        except BadTensor as error:
            raise type(error)(f"{Phase.Name(message.phase)} of step {message.step}: {error}") from None
    return Frame(
        phase=message.phase,
        step=message.step,
        micro_batch=message.micro_batch,
        tensor=tensor,
        labels=None if labels_as is None else _labels(message, labels_as, terms),
        wanted=unpack_bits(message.wanted, tensor.shape[:2]) if message.wanted and tensor is not None else None,
        values=dict(message.values),
        open=message.open if message.HasField("open") else None,
        agreement=message.agreement if message.HasField("agreement") else None,
        plan=_plan(message, terms) if message.HasField("plan") else None,
        measured=message.measured if message.HasField("measured") else None,
        probe=message.probe if message.HasField("probe") else None,
        site=message.site,
        trained=message.trained,
        applied=message.applied,
        frozen=message.frozen if message.HasField("frozen") else None,
        shape=Shape(message.shape.cut, message.shape.rank) if message.HasField("shape") else None,
    )


def _check_session(message: stage_pb2.Frame, rule: Rule | None, envelope: Envelope) -> None:
    early = rule is not None and rule.due in (Due.FIRST, Due.ALWAYS)
    if not envelope.opened:
        if not early:
            raise BadFrame("the first frame has to be OPEN")
        check_name(message.session, "a session's id")
    again = envelope.opened and rule is not None and rule.due is Due.FIRST
    if again or (envelope.session and message.session != envelope.session):
        raise BadFrame("a frame of another session")


def _check_place(message: stage_pb2.Frame, rule: Rule, coder: Coder) -> None:
    steps = coder.terms.config.steps
    if message.step > steps:
        raise BadFrame(f"step {message.step} of a job of {steps}")
    parts = coder.plan.micro_batches if rule.parts is None else rule.parts
    if message.micro_batch >= parts:
        have = "one" if coder.plan.micro_batches == 1 else str(coder.plan.micro_batches)
        raise BadFrame(f"micro_batch {message.micro_batch}; this job's steps have {have}")
    if message.site and coder.terms.layout is not None:
        coder.terms.layout.site(message.site)  # raises BadFrame for a site that does not exist


def _check_sizes(message: stage_pb2.Frame) -> None:
    if max(len(message.probe.filling), message.probe.answer_bytes) > MAX_PROBE_BYTES:
        raise BadFrame(f"a PROBE of more than {MAX_PROBE_BYTES} bytes")
    measured = message.measured
    if max(len(measured.codec_seconds), len(measured.compute_seconds), len(message.open.codecs)) > _MAX_TIMES:
        raise BadFrame(f"more than {_MAX_TIMES} codecs or times")
    if len(message.values) > _MAX_VALUES or any(len(name) > _MAX_NAME for name in message.values):
        raise BadFrame(f"more than {_MAX_VALUES} values, or one with a name of over {_MAX_NAME} characters")


def _check_fields(message: stage_pb2.Frame, rule: Rule, terms: Terms) -> None:
    """Checks that a message has all the fields it must have, and no others than it may have."""
    must = rule.must
    if rule.where_trained and terms.adapter_values:
        must = must | {"tensor"}
    has = {descriptor.name for descriptor, _ in message.ListFields()} - _PLACE
    missing, strange = sorted(must - has), sorted(has - must - _possible(rule, terms))
    if missing:
        what = "contents" if missing[0] in ("open", "probe") else missing[0]
        raise BadFrame(f"{Phase.Name(message.phase)} without its {what}")
    if strange:
        raise BadFrame(f"{Phase.Name(message.phase)} with {_WORDS.get(strange[0], f'a {strange[0]}')}")


def _possible(rule: Rule, terms: Terms) -> frozenset[str]:
    """Fields that the row allows, without those that a job of this configuration never has."""
    never = set()
    if rule.where_trained and not terms.adapter_values:
        never.add("tensor")
    if terms.config.devices.aggregation != STACKING:
        never.add("frozen")
    if "shape" in rule.may and not asked(terms.config)[0].automatic:
        never.add("shape")
    return rule.may - never


def _check_values(message: stage_pb2.Frame, rule: Rule, terms: Terms) -> None:
    name, values = Phase.Name(message.phase), message.values
    if not all(abs(value) <= LARGEST for value in values.values()):  # so that their sums are finite, too
        raise BadFrame(f"{name} with a value that is not finite in float32: {DIVERGED}")
    for wanted in rule.values:
        if wanted not in values or values[wanted] < 0:
            raise BadFrame(f"{name} without its value {wanted}")
    if rule.other_values is not None:
        strange = sorted(set(values) - {*rule.values, *rule.other_values})
        if strange:
            raise BadFrame(f"{name} with a value {strange[0]!r}")
    evaluation = [values[one] for one in _EVALUATION if one in values]
    if len(evaluation) == 1 or any(value < 0 for value in evaluation):
        raise BadFrame(f"{' and '.join(_EVALUATION)} go together, and neither is below 0")
    if values.get("tokens", 0) > terms.config.batch_size * terms.config.text.sequence_length:
        raise BadFrame("more predicted tokens than the batch has")
    if values.get("evaluation_tokens", 0) > _MOST_TOKENS:
        raise BadFrame(f"more than {_MOST_TOKENS} held-out tokens")


def _expected(message: stage_pb2.Frame, rule: Rule, coder: Coder, upward: bool, question: Question | None) -> Expected:
    """What the message's tensor has to be: its codec, its shape and the most values it may have."""
    terms = coder.terms
    length, hidden = terms.config.text.sequence_length, terms.hidden_size
    stream, shape, at_most = rule.stream, tuple[int | None, ...](), 0
    if message.HasField(
        "shape"
    ):  # the adapter after a change of shape, for which the device has yet to make room; gRPC has bounded the message
        stream, shape = "", tuple(message.tensor.shape[:1])
    elif rule.size is Size.CUT:
        shape = (coder.rows(message.micro_batch), length, hidden)
    elif rule.size is Size.HELD_OUT:
        shape, at_most = (None, length, hidden), coder.batch_size * length * hidden
    elif rule.size is Size.ADAPTER:
        shape = (terms.adapter_values,)
    elif rule.size is Size.MODULES and terms.layout is not None:
        modules = terms.layout.unpack(message.trained)
        shape = (sum(math.prod(one) for number in modules for one in terms.layout.shapes(number).values()),)
    elif rule.size is Size.SITE and question is not None and terms.layout is not None:
        site = terms.layout.site(message.site)
        inputs = (message.phase == Phase.BACKWARD) == upward  # a site's inputs go down, the gradient by them goes up
        shape = (question.rows, site.inputs if inputs else site.outputs(question.applied))
    elif rule.size is Size.QUESTION and question is not None:
        shape = question.shape
    return coder.expected(stream, shape, at_most or math.prod(size or 0 for size in shape))


def _labels_expected(message: stage_pb2.Frame, terms: Terms) -> Expected:
    length = terms.config.text.sequence_length
    rows = message.tensor.shape[0] if message.tensor.shape else 0  # as many as there are hidden states
    return Expected("int32", (rows, length), terms.config.batch_size * length)


def _labels(message: stage_pb2.Frame, expected: Expected, terms: Terms) -> Tensor:
    labels = decode_tensor(message.labels, expected).long()
    if bool(((labels != -100) & ((labels < 0) | (labels >= terms.vocabulary_size))).any()):
        raise BadTensor(f"labels outside the vocabulary of {terms.vocabulary_size}")
    return labels


def _plan(message: stage_pb2.Frame, terms: Terms) -> Plan:
    plan = Plan.from_proto(message.plan, terms.config.batch_size)
    check_agreed(plan, terms.config)
    return plan
