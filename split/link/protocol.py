"""What each frame from a device has to hold. A frame is checked here before memory is allocated for its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs.packing import unpack_bits
from isthmus.split.codecs.wire import Expected, check_tensor, decode_tensor
from isthmus.split.errors import BadFrame, BadTensor
from isthmus.split.finite import DIVERGED, LARGEST, is_finite
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import stream_of
from isthmus.split.link.coding import Coder, Plan, Terms
from isthmus.split.link.profile import MAX_PROBE_BYTES
from isthmus.split.link.session import Frame, Phase
from isthmus.split.lora.sites import Layout

_MAX_SESSION = 64  # characters
_MAX_VALUES = 64  # scalars in a frame
_MAX_NAME = 64  # characters of a scalar's name
_MAX_CODECS = 64  # in a Measured, and families in an Open
_REQUIRED_VALUES = {
    Phase.BACKWARD: ("tokens",),
    Phase.STEP: ("tokens", "nll", "norm_squared"),
}
_MOST_TOKENS = 2**53  # that a device can have evaluated: a float counts no further
_EVALUATION = ("evaluation_nll", "evaluation_tokens")  # in a REPORT: both or neither
_FROM_DEVICES = (
    Phase.OPEN,
    Phase.FORWARD,
    Phase.BACKWARD,
    Phase.STEP,
    Phase.AGGREGATE,
    Phase.EVALUATE,
    Phase.REPORT,
    Phase.CLOSE,
    Phase.PROBE,
    Phase.MERGE,
)
_AT_SITES = (Phase.FORWARD, Phase.BACKWARD, Phase.EVALUATE)
EVALUATIONS_AHEAD = 2  # held-out batches that a device sends before the first one's answer has come


@dataclass(frozen=True)
class Rules:
    """What one job agreed on: the checks for every frame that a device sends for it."""

    job: str
    config: TrainingConfig
    hidden_size: int
    vocabulary_size: int
    adapter: tuple[tuple[int, ...], ...]  # shapes of the matrices of a device's adapter
    layout: Layout | None = None  # with method dlora

    def terms(self, samples: int = 1) -> Terms:
        """With a device of so many training sequences."""
        return Terms(self.config, samples, self.adapter, self.layout.widest if self.layout else 0)

    def decode(self, message: stage_pb2.Frame, session: str | None, coder: Coder) -> Frame:
        """The frame of a message in `session` (None: the first, which must be OPEN or PROBE). `coder`: of the session.

        Raises BadFrame or BadTensor.
        """
        self._check_envelope(message, session, coder.plan)
        tensor = labels = None
        expected = self._tensor_of(message, coder)
        if (expected is not None) != message.HasField("tensor"):
            raise BadFrame(f"{Phase.Name(message.phase)} {'without its' if expected else 'with a'} tensor")
        with_labels = self.config.devices.labels == "server" and message.phase in (Phase.FORWARD, Phase.EVALUATE)
        if with_labels != message.HasField("labels"):
            raise BadFrame(f"{Phase.Name(message.phase)} {'without its' if with_labels else 'with'} labels")
        if with_labels:
            check_tensor(message.labels, self._labels_of(message))
        if expected is not None:
            stream = stream_of(message.phase, upward=True, labels=self.config.devices.labels)
            place = message.step, message.micro_batch, message.site
            tensor = coder.decode(stream, message.tensor, expected, *place)
            if not is_finite(tensor):
                raise BadTensor(f"{Phase.Name(message.phase)} of step {message.step} holds NaN or infinity: {DIVERGED}")
        if with_labels:
            labels = decode_tensor(message.labels, self._labels_of(message)).long()
            if bool(((labels != -100) & ((labels < 0) | (labels >= self.vocabulary_size))).any()):
                raise BadTensor(f"labels outside the vocabulary of {self.vocabulary_size}")
        wanted = None
        if message.wanted:
            if tensor is None or message.phase not in (Phase.FORWARD, Phase.EVALUATE) or with_labels or message.site:
                raise BadFrame(f"{Phase.Name(message.phase)} with positions that are wanted")
            wanted = unpack_bits(message.wanted, tensor.shape[:2])
        return Frame(
            phase=message.phase,
            step=message.step,
            micro_batch=message.micro_batch,
            tensor=tensor,
            labels=labels,
            wanted=wanted,
            values=dict(message.values),
            open=message.open if message.HasField("open") else None,
            measured=message.measured if message.HasField("measured") else None,
            probe=message.probe if message.HasField("probe") else None,
            site=message.site,
            trained=message.trained,
            applied=message.applied,
        )

    def _check_envelope(self, message: stage_pb2.Frame, session: str | None, plan: Plan) -> None:
        if message.phase not in _FROM_DEVICES:
            raise BadFrame(f"phase {message.phase} is not one that a device sends")
        if message.job != self.job:
            raise BadFrame(f"a frame for job {message.job[:32]!r}; this stage serves {self.job}")
        if session is None:
            if message.phase not in (Phase.OPEN, Phase.PROBE) or not 0 < len(message.session) <= _MAX_SESSION:
                raise BadFrame("the first frame has to be OPEN, with a session of 1 to 64 characters")
        elif message.session != session or message.phase == Phase.OPEN:
            raise BadFrame("a frame of another session")
        if message.step > self.config.steps:
            raise BadFrame(f"step {message.step} of a job of {self.config.steps}")
        cut = message.phase in (Phase.FORWARD, Phase.BACKWARD)
        several = EVALUATIONS_AHEAD + 1 if self.layout and message.phase == Phase.EVALUATE else 1
        if message.micro_batch >= (plan.micro_batches if cut else several):
            steps_have = "one" if plan.micro_batches == 1 else str(plan.micro_batches)
            raise BadFrame(f"micro_batch {message.micro_batch}; this job's steps have {steps_have}")
        if message.site and (self.layout is None or message.phase not in _AT_SITES):
            raise BadFrame(f"{Phase.Name(message.phase)} for site {message.site}, where there are none")
        if self.layout is not None and message.site:
            self.layout.site(message.site)
        if self.layout is None and (message.phase == Phase.MERGE or message.trained or message.applied):
            raise BadFrame(f"{Phase.Name(message.phase)} with modules, in a job without method dlora")
        if (message.phase == Phase.PROBE) != message.HasField("probe"):
            raise BadFrame("PROBE without its contents, or another frame with them")
        if max(len(message.probe.filling), message.probe.answer_bytes) > MAX_PROBE_BYTES:
            raise BadFrame(f"a PROBE of more than {MAX_PROBE_BYTES} bytes")
        measured = message.measured
        if max(len(measured.codec_seconds), len(measured.compute_seconds), len(message.open.codecs)) > _MAX_CODECS:
            raise BadFrame(f"more than {_MAX_CODECS} codecs or times")
        if len(message.values) > _MAX_VALUES or any(len(name) > _MAX_NAME for name in message.values):
            raise BadFrame(f"more than {_MAX_VALUES} values, or one with a name of over {_MAX_NAME} characters")
        if not all(abs(value) <= LARGEST for value in message.values.values()):  # so that their sums are finite, too
            raise BadFrame(f"{Phase.Name(message.phase)} with a value that is not finite in float32: {DIVERGED}")
        required = () if message.site else _REQUIRED_VALUES.get(message.phase, ())
        if message.phase == Phase.FORWARD and self.config.devices.labels == "server":
            required = ("tokens",)
        for name in required:
            if name not in message.values or message.values[name] < 0:
                raise BadFrame(f"{Phase.Name(message.phase)} without its value {name}")
        evaluation = [message.values[name] for name in _EVALUATION if name in message.values]
        if len(evaluation) == 1 or any(value < 0 for value in evaluation):
            raise BadFrame(f"{' and '.join(_EVALUATION)} go together, and neither is below 0")
        if message.values.get("evaluation_tokens", 0) > _MOST_TOKENS:
            raise BadFrame(f"more than {_MOST_TOKENS} held-out tokens")
        if message.values.get("tokens", 0) > self.config.batch_size * self.config.text.sequence_length:
            raise BadFrame("more predicted tokens than the batch has")

    def _tensor_of(self, message: stage_pb2.Frame, coder: Coder) -> Expected | None:
        phase, hidden, length = message.phase, self.hidden_size, self.config.text.sequence_length
        stream = stream_of(phase, upward=True, labels=self.config.devices.labels)
        if message.site:
            rows = coder.batch_size if phase == Phase.EVALUATE else coder.rows(message.micro_batch)
            return coder.expected_at_site(stream, rows)
        if phase == Phase.MERGE and self.layout is not None:
            values = sum(self._values_of(number) for number in self.layout.unpack(message.trained))
            return coder.expected(stream, (values,), values)
        if phase in (Phase.FORWARD, Phase.BACKWARD):
            rows = coder.rows(message.micro_batch)
            return coder.expected(stream, (rows, length, hidden), rows * length * hidden)
        if phase == Phase.EVALUATE:
            return coder.expected(stream, (None, length, hidden), self.config.batch_size * length * hidden)
        if phase == Phase.AGGREGATE:
            values = sum(math.prod(shape) for shape in self.adapter)
            return coder.expected(stream, (values,), values)
        return None

    def _values_of(self, module: int) -> int:
        assert self.layout is not None
        return sum(math.prod(shape) for shape in self.layout.shapes(module).values())

    def _labels_of(self, message: stage_pb2.Frame) -> Expected:
        length = self.config.text.sequence_length
        rows = message.tensor.shape[0] if message.tensor.shape else 0  # as many as there are hidden states
        return Expected("int32", (rows, length), self.config.batch_size * length)
