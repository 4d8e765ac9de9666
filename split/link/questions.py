"""Matching of answers to questions: which are due, since when, and of which shape their tensors have to be."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import NamedTuple

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.turns import Turns
from isthmus.split.lora.sites import Layout


class _FramePlace(NamedTuple):
    """The place of a frame in a session."""

    step: int
    micro_batch: int

    def __str__(self) -> str:
        return f"step {self.step}, micro-batch {self.micro_batch}"


_NOWHERE = _FramePlace(0, 0)


@dataclass(frozen=True)
class Question:
    """A frame from the device that the stage has to answer.

    at: when it was asked, in seconds of time.perf_counter.
    shape: shape of its tensor.
    rows: number of positions in it that are used (DLoRA).
    applied: modules that the stage asks the device for (DLoRA).
    """

    at: float
    shape: tuple[int, ...] = ()
    rows: int = 0
    applied: frozenset[int] = frozenset()


class Questions:
    """One session's questions, as either end keeps them.

    The answers of a phase come in the order of its questions. In DLoRA micro-batches proceed independently, and the
    order holds within each one. There a frame for a site, between a question and its answer, answers one frame and asks
    for another.
    """

    def __init__(self, layout: Layout | None = None) -> None:
        """layout: where the modules are, in a job of the method dlora."""
        self._layout = layout
        self._due: dict[tuple[int, _FramePlace], Turns[_FramePlace, Question]] = {}
        self._passes: dict[tuple[bool, int], Question] = {}  # DLoRA: evaluating, micro-batch
        self._lock = threading.Lock()  # one thread asks, another hears the answers

    def asked(self, message: stage_pb2.Frame, at: float, rows: int = 0) -> None:
        """Notes a frame that went to the stage and that will be answered.

        at: when it was asked, in seconds of time.perf_counter.
        rows: number of positions that are used, for FORWARD and EVALUATE in DLoRA.
        """
        with self._lock:
            if message.site or (self._layout and message.phase == Phase.BACKWARD):
                question = replace(self._pass_of(message), at=at)
            else:
                question = Question(at, tuple(message.tensor.shape), rows, self._applied(message))
            if self._layout and not message.site and message.phase in (Phase.FORWARD, Phase.EVALUATE):
                self._passes[_pass_key(message)] = question
            place = _place(message)
            self._due.setdefault(self._key(message.phase, place), Turns()).ask(place, question)

    def answered(self, frame: stage_pb2.Frame | Frame) -> Question:
        """Removes and returns the question that a frame answers. Raises BadFrame unless this answer is due."""
        place = _place(frame)
        key = self._key(frame.phase, place)
        with self._lock:
            if frame.phase == Phase.CLOSE and key not in self._due:  # CLOSE also answers an OPEN that has come too late
                place = _NOWHERE
                key = self._key(Phase.OPEN, place)
            due = self._due.get(key) or Turns[_FramePlace, Question]()
            try:
                question = due.next(place)
            except BadFrame as error:
                raise BadFrame(f"{_named(frame)} {error}") from None
            due.done()
            if not due:
                del self._due[key]
        return question

    def of_pass(self, message: stage_pb2.Frame) -> Question:
        """The question that began the pass of a frame for a site. Raises BadFrame where none has."""
        with self._lock:
            return self._pass_of(message)

    def _pass_of(self, message: stage_pb2.Frame) -> Question:
        begun = self._passes.get(_pass_key(message))
        if begun is None:
            raise BadFrame(f"{_named(message)}, which is not under way")
        return begun

    def _applied(self, message: stage_pb2.Frame) -> frozenset[int]:
        return self._layout.unpack(message.applied) if self._layout and message.applied else frozenset()

    def _key(self, phase: int, place: _FramePlace) -> tuple[int, _FramePlace]:
        return phase, place if self._layout else _NOWHERE


def _place(frame: stage_pb2.Frame | Frame) -> _FramePlace:
    return _NOWHERE if frame.phase in (Phase.OPEN, Phase.PROBE) else _FramePlace(frame.step, frame.micro_batch)


def _pass_key(message: stage_pb2.Frame) -> tuple[bool, int]:
    return message.phase == Phase.EVALUATE, message.micro_batch


def _named(frame: stage_pb2.Frame | Frame) -> str:
    return f"{Phase.Name(frame.phase)} of {_FramePlace(frame.step, frame.micro_batch)}"
