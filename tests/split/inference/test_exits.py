"""Tokens of which the first span is sure do not wait for the others, which make up for them later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.split.errors import BadRequest
from isthmus.split.inference.chain import Span
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.exits import ExitRule, parse_exit
from isthmus.split.inference.local import LOOKUP, local_engine
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.models.source import open_model
from isthmus.split.runtime.base import Row
from tests.split.inference.test_failover import CONTEXT, Mortal, runtime
from tests.split.inference.test_failover import engine as engine_over
from tests.split.inference.whole import answers, greedy, ids_of, prompts, run, whole_model
from tests.split.tiny_models import make_model

GREEDY = Sampling(temperature=0)
LENGTHS = (1, 3, 9, 17, 30, 2)
CUT = 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def engine_of(folder: Path, **options: Any) -> Callable[[], Any]:
    return lambda: local_engine(
        open_model(str(folder)), **({"context": CONTEXT, "chunk": 200, "sequences": 4, "cuts": (CUT,)} | options)
    )


@torch.inference_mode()
def both_opinions(model: Any, text: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits (tokens, vocabulary) of the head after the first blocks, and after all."""
    output = model(torch.tensor([list(text)]), output_hidden_states=True)
    early = model.lm_head(model.model.norm(output.hidden_states[CUT]))
    return early[0], output.logits[0]


def check(model: Any, prompt: Sequence[int], answer: Sequence[int], rule: ExitRule) -> int:
    """Every token is what the rule says, by the whole model; how many came early."""
    early, full = both_opinions(model, [*prompt, *answer])
    sure = rule.sure(early)
    exited = 0
    for place, token in enumerate(answer[1:], start=len(prompt)):  # the first one comes from the prompt's prefill
        assert token == int((early if sure[place] else full)[place].argmax())
        exited += sure[place]
    assert answer[0] == int(full[len(prompt) - 1].argmax())
    return exited


@pytest.mark.parametrize("cuts", [(CUT,), (CUT, 4)], ids=["2", "3"])
@pytest.mark.parametrize("text", ["0.0015", "entropy:5.54"])
def test_a_token_is_the_first_spans_where_it_is_sure_and_else_the_whole_models(
    llama: Path, text: str, cuts: tuple[int, ...]
) -> None:
    rule = parse_exit(text)
    assert rule is not None
    model = whole_model(llama)
    texts = prompts(LENGTHS)

    async def work(engine: Engine) -> None:
        found = await answers(engine, [Request(prompt, 40, GREEDY) for prompt in texts])
        exited = sum(check(model, prompt, answer, rule) for prompt, answer in zip(texts, found, strict=True))
        figures = engine.stats()["answers"]
        assert figures["exited"] == exited
        assert 20 < exited < figures["tokens"] - 20
        assert figures["rounds"] == figures["tokens"] - len(texts) - exited

    run(engine_of(llama, cuts=cuts, exits=rule), work)


def test_a_rule_that_is_never_met_changes_nothing(llama: Path) -> None:
    model, texts = whole_model(llama), prompts(LENGTHS)
    requests = [Request(prompt, 20, GREEDY) for prompt in texts]
    wanted = [greedy(model, prompt, 20) for prompt in texts]
    assert run(engine_of(llama, exits=ExitRule(1.0)), lambda engine: answers(engine, requests)) == wanted


def test_the_next_turn_is_right_after_an_answer_that_ended_early(llama: Path) -> None:
    first, more = prompts([15, 6])
    model = whole_model(llama)
    always = ExitRule(0.0)

    async def work(engine: Engine) -> None:
        said = await ids_of(engine.submit(Request(first, 8, GREEDY)))
        assert check(model, first, said, always) == 7
        longer = (*first, *said, *more)
        answer = engine.submit(Request(longer, 10, GREEDY, logprobs=0))
        again = await ids_of(answer)
        check(model, longer, again, always)
        assert answer.timing.cached_tokens == len(first)  # of the others the second span has nothing

    run(engine_of(llama, exits=always), work)


def test_the_other_spans_never_lack_more_than_they_may(llama: Path) -> None:
    (prompt,) = prompts([4])

    async def work(engine: Engine) -> None:
        answer = engine.submit(Request(prompt, 31, GREEDY))
        assert len(await ids_of(answer)) == 31
        assert (answer.timing.exited, answer.timing.rounds) == (24, 6)

    run(engine_of(llama, exits=ExitRule(0.0), chunk=5), work)


def test_a_token_that_came_early_does_not_wait_for_others_of_its_batch(llama: Path) -> None:
    class FirstIsSure(ExitRule):
        def sure(self, logits: Tensor) -> list[bool]:
            return [place == 0 for place in range(len(logits))]

    async def work(engine: Engine) -> None:
        far = engine.spans[1].holders[0]
        compute, free = far.compute, asyncio.Event()

        async def held_up(rows: Sequence[Row], hidden: Tensor) -> Tensor:
            if rows[0].position:  # not the prompts
                await free.wait()
            return await compute(rows, hidden)

        far.compute = held_up  # type: ignore[method-assign]
        running = [asyncio.create_task(ids_of(engine.submit(Request(p, 20, GREEDY)))) for p in prompts([5, 6, 7, 8])]
        done, waiting = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED, timeout=60)
        assert done
        assert waiting
        free.set()
        assert [len(ids) for ids in await asyncio.gather(*running)] == [20] * 4

    run(engine_of(llama, exits=FirstIsSure(0.5)), work)


def test_deaths_change_no_answer_with_early_exits(llama: Path) -> None:
    rule, model, texts = ExitRule(0.0015), whole_model(llama), prompts(LENGTHS)

    async def work() -> None:
        spans = [Span(first, last, 32, chunk=16, patience=5) for first, last in ((0, CUT), (CUT, 6))]
        for span in spans:
            for number, batches in enumerate((9, 14, float("inf"))):
                await span.add(Mortal(f"{span}/{number}", runtime(llama, span.first, span.last), batches, number == 1))
        async with asyncio.timeout(120), engine_over(llama, spans, exits=rule, chunk=200) as running:
            found = await answers(running, [Request(prompt, 24, GREEDY) for prompt in texts])
        assert sum(check(model, prompt, answer, rule) for prompt, answer in zip(texts, found, strict=True)) > 20
        assert all(span.recoveries for span in spans)

    asyncio.run(work())


@pytest.mark.parametrize("text", ["2", "-0.1", "margin:x", "entropy:-1", "luck:0.5", "nan"])
def test_rules_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="exit"):
        parse_exit(text)


def test_exits_need_a_chain_and_exclude_drafts(llama: Path) -> None:
    assert parse_exit("") is None
    for options in ({"cuts": ()}, {"draft": LOOKUP}):
        with pytest.raises(BadRequest, match="two spans at least, and no drafts"):
            asyncio.run(engine_of(llama, exits=ExitRule(0.5), **options)())
