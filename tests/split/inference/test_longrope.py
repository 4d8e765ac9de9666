"""Texts that are, or become, longer than a longrope model was first trained for: all keys are rotated anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.split.inference.engine import Engine
from isthmus.split.inference.exits import parse_exit
from isthmus.split.inference.local import local_engine
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.models.source import open_model
from isthmus.split.runtime.choose import ONNX, TORCH, RuntimeChoice
from tests.split.inference.whole import answers, greedy, longrope_model, prompts, run, whole_model

GREEDY = Sampling(temperature=0)
LENGTHS = (5, 20, 31, 32, 33, 40, 60)  # 32 are the model's own


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longrope_model(tmp_path_factory.mktemp("longrope"))


@pytest.mark.parametrize("chunk", [8, 16, 64])
@pytest.mark.parametrize("cuts", [(), (2,), (2, 4)])
@pytest.mark.parametrize("sequences", [1, 4])
def test_answers_are_those_of_transformers(longrope: Path, cuts: tuple[int, ...], chunk: int, sequences: int) -> None:
    texts = prompts(LENGTHS)
    wanted = [greedy(whole_model(longrope), text, 30) for text in texts]
    assert (
        run(
            lambda: local_engine(open_model(str(longrope)), context=100, cuts=cuts, chunk=chunk, sequences=sequences),
            lambda engine: answers(engine, [Request(text, 30, GREEDY) for text in texts]),
        )
        == wanted
    )


def test_onnx_runtime_agrees(tmp_path: Path) -> None:
    folder = longrope_model(tmp_path / "model", hidden=64)
    texts = prompts(LENGTHS)
    wanted = [greedy(whole_model(folder), text, 30) for text in texts]
    choice = RuntimeChoice(ONNX, cache=tmp_path / "graphs")
    assert (
        run(
            lambda: local_engine(open_model(str(folder)), context=100, cuts=(3,), chunk=16, choice=choice),
            lambda engine: answers(engine, [Request(text, 30, GREEDY) for text in texts]),
        )
        == wanted
    )


def test_the_next_turn_of_a_conversation_may_be_long(tmp_path: Path) -> None:
    """Keys of a short text are of no use to a long one; those of a long one are."""
    folder = longrope_model(tmp_path)
    model = whole_model(folder)

    async def work(engine: Engine) -> None:
        text, cached = list(prompts([20])[0]), []
        for _ in range(3):
            answer = engine.submit(Request(tuple(text), 8, GREEDY))
            said = [token.id async for token in answer]
            assert said == greedy(model, text, 8)
            cached.append(answer.timing.cached_tokens)
            text += [*said, *range(10)]
        assert cached == [0, 0, 45]

    run(lambda: local_engine(open_model(str(folder)), context=100, sequences=4), work)


def test_logprobs_of_a_prompt_are_told_once(tmp_path: Path) -> None:
    folder = longrope_model(tmp_path)

    async def work(engine: Engine) -> None:
        answer = engine.submit(Request(prompts([28])[0], 12, GREEDY, logprobs=1, prompt_logprobs=True))
        assert len([token async for token in answer]) == 12
        assert len(await answer.prompt_logprobs()) == 28

    run(lambda: local_engine(open_model(str(folder)), context=100, chunk=8), work)


def test_early_exits_go_on(tmp_path: Path) -> None:
    folder = longrope_model(tmp_path)

    def engine_with(rule: str | None) -> Engine:
        return local_engine(  # type: ignore[return-value]
            open_model(str(folder)),
            context=100,
            cuts=(3,),
            exits=parse_exit(rule or ""),
            choice=RuntimeChoice(TORCH),
        )

    asked = [Request(text, 30, GREEDY) for text in prompts(LENGTHS)]
    wanted = [greedy(whole_model(folder), request.prompt, 30) for request in asked]
    assert run(lambda: engine_with("1"), lambda engine: answers(engine, asked)) == wanted  # nobody is so sure
    early = run(lambda: engine_with("0"), lambda engine: answers(engine, asked))
    assert [len(one) for one in early] == [30] * len(asked)
