"""What a link expects an answer to: its shape, its turn, and since when."""

from __future__ import annotations

import threading

import pytest

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame
from isthmus.split.link.session import Phase, Questions


def frame(phase: stage_pb2.Phase, step: int = 0, *shape: int) -> stage_pb2.Frame:
    return stage_pb2.Frame(phase=phase, step=step, tensor=stage_pb2.Tensor(shape=shape) if shape else None)


def test_answers_have_the_shapes_of_their_questions_in_turn() -> None:
    questions = Questions()
    for rows in (8, 8, 3):
        questions.asked(frame(Phase.EVALUATE, 5, rows, 16, 4))
    assert [questions.answered(frame(Phase.EVALUATE, 5))[1][0] for _ in range(3)] == [8, 8, 3]
    with pytest.raises(BadFrame, match="EVALUATE of step 5 answers nothing"):
        questions.answered(frame(Phase.EVALUATE, 5))


def test_an_answer_to_open_has_the_shape_of_the_adapter_wherever_it_says_to_start() -> None:
    questions = Questions()
    questions.asked(stage_pb2.Frame(phase=Phase.OPEN, open=stage_pb2.Open(adapter_values=7)))
    assert questions.answered(frame(Phase.OPEN, 40))[1] == (7,)


def test_what_has_no_answer_is_not_kept() -> None:
    questions = Questions()
    for step in range(1000):
        questions.asked(frame(Phase.STEP, step))
    questions.asked(frame(Phase.REPORT, 1000))
    assert not questions._due


def test_one_thread_may_ask_while_another_hears_the_answers() -> None:
    questions, asked = Questions(), threading.Semaphore(0)

    def ask() -> None:
        for rows in range(1, 20_001):
            questions.asked(frame(Phase.EVALUATE, 5, rows))
            asked.release()

    thread = threading.Thread(target=ask)
    thread.start()
    heard = []
    for _ in range(20_000):
        assert asked.acquire(timeout=60)
        heard.append(questions.answered(frame(Phase.EVALUATE, 5))[1][0])
    thread.join()
    assert heard == list(range(1, 20_001))
