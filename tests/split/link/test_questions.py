"""What a link expects an answer to: its shape, its turn, and since when."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from transformers import LlamaConfig

from isthmus.protos.v1 import stage_pb2
from isthmus.split.errors import BadFrame
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.frames import Phase
from isthmus.split.link.questions import Questions
from isthmus.split.lora.sites import Layout, layout_of


def frame(phase: stage_pb2.Phase, step: int = 0, *shape: int, micro_batch: int = 0, site: int = 0) -> stage_pb2.Frame:
    tensor = stage_pb2.Tensor(shape=shape) if shape else None
    return stage_pb2.Frame(phase=phase, step=step, micro_batch=micro_batch, site=site, tensor=tensor)


def test_answers_have_the_shapes_of_their_questions_in_turn() -> None:
    questions = Questions()
    for rows in (8, 8, 3):
        questions.asked(frame(Phase.EVALUATE, 5, rows, 16, 4), at=0.0)
    assert [questions.answered(frame(Phase.EVALUATE, 5)).shape[0] for _ in range(3)] == [8, 8, 3]
    with pytest.raises(BadFrame, match="EVALUATE of step 5, micro-batch 0 answers nothing"):
        questions.answered(frame(Phase.EVALUATE, 5))


def test_an_answer_out_of_turn_is_refused() -> None:
    questions = Questions()
    for micro_batch in range(2):
        questions.asked(frame(Phase.FORWARD, 5, 1, 16, 4, micro_batch=micro_batch), at=0.0)
    with pytest.raises(BadFrame, match="FORWARD of step 5, micro-batch 1 is out of turn: that of step 5"):
        questions.answered(frame(Phase.FORWARD, 5, micro_batch=1))
    with pytest.raises(BadFrame, match="BACKWARD of step 5, micro-batch 0 answers nothing"):
        questions.answered(frame(Phase.BACKWARD, 5))
    assert [questions.answered(frame(Phase.FORWARD, 5, micro_batch=number)).shape for number in range(2)]


def test_an_answer_to_open_names_any_step_and_may_be_close() -> None:
    questions = Questions()
    for answer in (frame(Phase.OPEN, 40), frame(Phase.CLOSE, 40)):
        questions.asked(stage_pb2.Frame(phase=Phase.OPEN, open=stage_pb2.Open(adapter_values=7)), at=3.0)
        assert questions.answered(answer).at == 3.0
        with pytest.raises(BadFrame, match="answers nothing"):
            questions.answered(answer)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    model = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    return layout_of(model, TrainingConfig.of(method="dlora", cut_layer=1, rank=2))


def test_micro_batches_of_dlora_are_answered_each_by_itself_with_sites_in_between(layout: Layout) -> None:
    questions = Questions(layout)
    for micro_batch in range(2):
        asked = frame(Phase.FORWARD, 5, 1, 8, 16, micro_batch=micro_batch)
        asked.applied = layout.pack(layout.remote)
        questions.asked(asked, at=float(micro_batch), rows=6 + micro_batch)
    about_site = frame(Phase.FORWARD, 5, micro_batch=1, site=len(layout.sites))
    assert questions.answered(about_site).at == 1.0
    assert questions.of_pass(about_site).rows == 7
    assert questions.of_pass(about_site).applied == layout.remote
    with pytest.raises(BadFrame, match="FORWARD of step 5, micro-batch 1 answers nothing"):
        questions.answered(about_site)
    questions.asked(about_site, at=9.0)
    last = questions.answered(frame(Phase.FORWARD, 5, micro_batch=1))
    assert (last.at, last.shape) == (9.0, (1, 8, 16))
    questions.asked(frame(Phase.BACKWARD, 5, 1, 8, 16, micro_batch=1), at=10.0)
    assert questions.answered(frame(Phase.BACKWARD, 5, micro_batch=1)).shape == (1, 8, 16)
    assert questions.answered(frame(Phase.FORWARD, 5, micro_batch=0)).at == 0.0


def test_a_site_of_a_pass_that_nobody_began_is_refused(layout: Layout) -> None:
    with pytest.raises(BadFrame, match="BACKWARD of step 5, micro-batch 1, which is not under way"):
        Questions(layout).of_pass(frame(Phase.BACKWARD, 5, micro_batch=1, site=len(layout.sites)))


def test_one_thread_may_ask_while_another_hears_the_answers() -> None:
    questions, said = Questions(), threading.Semaphore(0)

    def ask() -> None:
        for rows in range(1, 20_001):
            questions.asked(frame(Phase.EVALUATE, 5, rows), at=0.0)
            said.release()

    thread = threading.Thread(target=ask)
    thread.start()
    heard = []
    for _ in range(20_000):
        assert said.acquire(timeout=60)
        heard.append(questions.answered(frame(Phase.EVALUATE, 5)).shape[0])
    thread.join()
    assert heard == list(range(1, 20_001))
