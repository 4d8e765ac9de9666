"""One end of a training session: it turns frames into messages and back, checks them, and counts their bytes.

A session is one stream between a device and its job's stage. Both ends are this class, whatever carries the messages.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs.packing import pack_bits
from isthmus.split.codecs.wire import encode_tensor
from isthmus.split.data.sequences import seen_positions
from isthmus.split.job.streams import stream_of
from isthmus.split.link.checks import Envelope, check, decode
from isthmus.split.link.coding import Coder, Terms
from isthmus.split.link.frames import HELD, UNDER_WAY, Frame, Phase, is_answer, kind_and_sizes
from isthmus.split.link.phases import Rule, rule_for
from isthmus.split.link.questions import Questions
from isthmus.split.resources.ledger import Ledger
from isthmus.split.resources.traffic import Traffic

log = logging.getLogger(__name__)


class SessionEnd:
    """One end of a session: its codecs, the questions under way, and the count of what crossed.

    One thread may encode while another decodes.
    """

    def __init__(self, job: str, name: str, terms: Terms, ledger: Ledger, traffic: Traffic, *, device: bool) -> None:
        """name: the session's id, drawn by the device; empty at the stage until a frame has come.
        traffic: counts the bytes that cross.
        device: whether this is the device's end."""
        self.job, self.name, self.opened = job, name, device
        self.coder = Coder(terms, ledger)
        self._ledger, self._traffic, self._device = ledger, traffic, device
        self._questions = Questions(terms.layout)

    def encode(self, frame: Frame) -> stage_pb2.Frame:
        """Turns a frame into the message to send; a new plan or a new adapter's shape counts for the frames after it.

        Raises CodecError for a tensor that its codec cannot take.
        """
        message = self._message(frame)
        if self._device:
            self._asked(message, time.perf_counter(), frame)
        if frame.plan is not None and not self._device:
            self.coder.use(frame.plan)
        self.count("sent", message)
        return message

    def decode(self, message: stage_pb2.Frame) -> Frame:
        """Checks and decodes a received message. Raises BadFrame, BadTensor or CodecError for one not agreed."""
        at = time.perf_counter()
        self.count("received", message)
        envelope = Envelope(self.job, self.name, self.opened, upward=not self._device)
        rule = check(message, envelope, self.coder)
        return self._answer(message, rule, at) if self._device else self._question(message, rule, at)

    def answering(self, frame: Frame) -> Frame:
        """Adds to an answer, at the stage, the seconds for which the stage had its question."""
        if not is_answer(frame):
            return frame
        held = time.perf_counter() - self._questions.answered(frame).at
        return replace(frame, values={**frame.values, HELD: held})

    def count(self, way: str, message: stage_pb2.Frame) -> None:
        """Counts the bytes of a message under its codec, or as unknown if the plan lacks it: a stranger may name any.

        way: "sent" or "received".
        """
        kind, codec, payload, total = kind_and_sizes(message)
        known = {"", "none", *self.coder.plan.codecs.values()}
        self._traffic.crossed(way, kind, codec if codec in known else "unknown", payload, total)

    def _question(self, message: stage_pb2.Frame, rule: Rule, at: float) -> Frame:
        """Decodes a device's message, at the stage."""
        begun = self._questions.of_pass(message) if message.site else None
        frame = decode(message, rule, self.coder, upward=True, question=begun)
        self.name = message.session
        if frame.open is not None:
            self.opened = True
            samples = max(1, frame.open.samples)
            self.coder = Coder(replace(self.coder.terms, samples=samples), self._ledger)
        self._asked(message, at, frame)
        return frame

    def _answer(self, message: stage_pb2.Frame, rule: Rule, at: float) -> Frame:
        """Decodes the stage's message, at the device."""
        question = self._questions.of_pass(message) if message.site else None
        under_way = 0.0
        if is_answer(message):
            answered = self._questions.answered(message)
            under_way, question = at - answered.at, question or answered
        frame = decode(message, rule, self.coder, upward=False, question=question)
        if frame.plan is not None:
            if frame.plan != self.coder.plan:
                log.info("job %s: %s", self.job, frame.plan)
            self.coder.use(frame.plan)
        return replace(frame, values={**frame.values, UNDER_WAY: under_way})

    def _asked(self, message: stage_pb2.Frame, at: float, frame: Frame) -> None:
        rule = rule_for(self.coder.terms.config, True, message)
        if rule is not None and rule.answered:
            self._questions.asked(message, at, _rows_of_use(frame) if self.coder.terms.layout else 0)

    def _message(self, frame: Frame) -> stage_pb2.Frame:
        message = stage_pb2.Frame(
            job=self.job,
            session=self.name,
            step=frame.step,
            micro_batch=frame.micro_batch,
            phase=frame.phase,
            values=frame.values,
            open=frame.open,
            agreement=frame.agreement,
            plan=None if frame.plan is None else frame.plan.to_proto(),
            measured=frame.measured,
            probe=frame.probe,
            site=frame.site,
            trained=frame.trained,
            applied=frame.applied,
            frozen=frame.frozen,
            shape=None if frame.shape is None else stage_pb2.Shape(cut=frame.shape.cut, rank=frame.shape.rank),
        )
        if frame.encoded is not None:
            message.tensor.CopyFrom(frame.encoded)
        elif frame.tensor is not None:
            labels = self.coder.terms.config.devices.labels
            stream = "" if frame.shape else stream_of(frame.phase, self._device, labels)
            encoded = self.coder.encode(stream, frame.tensor, frame.step, frame.micro_batch, frame.site)
            message.tensor.CopyFrom(encoded)
        if frame.wanted is not None:
            message.wanted = pack_bits(frame.wanted)
        if frame.labels is not None:
            message.labels.CopyFrom(encode_tensor(frame.labels.to(torch.int32)))
        return message


def _rows_of_use(frame: Frame) -> int:
    """Number of positions that a site's modules have to see: in each row, those up to the last wanted one."""
    if frame.phase not in (Phase.FORWARD, Phase.EVALUATE) or frame.site or frame.tensor is None:
        return 0
    if frame.wanted is None:
        return frame.tensor.shape[0] * frame.tensor.shape[1]
    return int(seen_positions(frame.wanted).sum())
