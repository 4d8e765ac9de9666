"""The engine's answers are those of the whole model, however it is cut and whatever else is computed meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.split.errors import BadRequest
from isthmus.split.inference.answer_state import AnswerState
from isthmus.split.inference.chain import Span
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.local import local_engine
from isthmus.split.inference.request import Busy, Request, Sampling
from isthmus.split.models.source import open_model
from isthmus.split.runtime.base import Row
from tests.split.inference.whole import answers, greedy, ids_of, prompts, run, tokens_of, whole_model
from tests.split.tiny_models import ARCHITECTURES, make_model

GREEDY = Sampling(temperature=0)
LENGTHS = (1, 3, 9, 17, 30, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> Path:
    return folders["llama"]


def engine_of(folder: Path, **options: Any) -> Any:
    return lambda: local_engine(open_model(str(folder)), **({"context": 80, "chunk": 8, "sequences": 4} | options))


@pytest.mark.parametrize("cuts", [(), (2,), (1, 4), (1, 2, 3, 5)], ids=["1", "2", "3", "5"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_those_of_transformers(
    folders: dict[str, Path], architecture: str, cuts: tuple[int, ...]
) -> None:
    folder = folders[architecture]
    model = whole_model(folder)
    wanted = [greedy(model, prompt, 20) for prompt in prompts(LENGTHS)]
    requests = [Request(prompt, 20, GREEDY) for prompt in prompts(LENGTHS)]
    assert run(engine_of(folder, cuts=cuts), lambda engine: answers(engine, requests)) == wanted


def test_sampling_with_a_seed_is_the_same_alone_cut_and_in_company(llama: Path) -> None:
    requests = [
        Request(prompt, 15, Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=number))
        for number, prompt in enumerate(prompts(LENGTHS))
    ]

    async def one_by_one(engine: Engine) -> list[list[int]]:
        return [await ids_of(engine.submit(request)) for request in requests]

    alone = run(engine_of(llama), one_by_one)
    assert run(engine_of(llama, cuts=(2, 4)), lambda engine: answers(engine, requests)) == alone
    assert len({tuple(one) for one in alone}) == len(alone)
    other = [Request(requests[0].prompt, 15, Sampling(temperature=0.8, seed=99))]
    assert run(engine_of(llama), lambda engine: answers(engine, other)) != alone[:1]


def test_an_answer_ends_at_a_stop_token_or_at_its_length(llama: Path) -> None:
    (prompt,) = prompts([5])
    wanted = greedy(whole_model(llama), prompt, 12)
    stop = next(token for token in wanted[4:] if token not in wanted[:4])

    async def work(engine: Engine) -> None:
        tokens = await tokens_of(engine.submit(Request(prompt, 12, GREEDY, stop_tokens=frozenset({stop}))))
        assert [token.id for token in tokens] == wanted[: wanted.index(stop) + 1]
        assert [token.last for token in tokens] == [""] * (len(tokens) - 1) + ["stop"]
        answer = engine.submit(Request(prompt, 12, GREEDY))
        assert (await tokens_of(answer))[-1].last == "length"
        assert answer.timing.tokens == 12
        assert 0 < answer.timing.first_token < answer.timing.total

    run(engine_of(llama), work)


def test_logprobs_of_answer_and_prompt_are_the_models(llama: Path) -> None:
    (prompt,) = prompts([20])
    model = whole_model(llama)
    text = [*prompt, *greedy(model, prompt, 6)]
    with torch.inference_mode():
        scores = model(torch.tensor([text])).logits[0].log_softmax(-1)

    async def work(engine: Engine) -> None:
        await ids_of(engine.submit(Request(prompt, 3, GREEDY)))  # leaves the prompt's keys and values behind
        answer = engine.submit(Request(prompt, 6, GREEDY, logprobs=3, prompt_logprobs=True))
        tokens = await tokens_of(answer)
        told = [*await answer.prompt_logprobs(), *(token.logprob for token in tokens)]
        assert told[0] is None
        assert len(told) == len(text)
        for place in range(1, len(text)):
            one = told[place]
            assert one is not None
            assert one.logprob == pytest.approx(float(scores[place - 1, text[place]]), abs=1e-4)
            best = scores[place - 1].topk(3)
            assert [token for token, _ in one.top] == best.indices.tolist()
            assert [score for _, score in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        only = engine.submit(Request(prompt, 0, GREEDY, logprobs=0, prompt_logprobs=True))
        assert await tokens_of(only) == []
        assert len(await only.prompt_logprobs()) == len(prompt)

    run(engine_of(llama, cuts=(3,)), work)


def test_a_conversations_next_turn_goes_on_from_what_is_there(llama: Path) -> None:
    first, more, other = prompts([15, 6, 15])
    model = whole_model(llama)

    async def work(engine: Engine) -> None:
        said = await ids_of(engine.submit(Request(first, 8, GREEDY)))
        await answers(engine, [Request(other, 8, GREEDY)])
        longer = (*first, *said, *more)
        answer = engine.submit(Request(longer, 10, GREEDY))
        assert await ids_of(answer) == greedy(model, longer, 10)
        assert answer.timing.cached_tokens == len(first) + len(said) - 1
        shorter = engine.submit(Request(first[:9], 10, GREEDY))  # which does not cost the longer one its place
        assert await ids_of(shorter) == greedy(model, first[:9], 10)
        assert shorter.timing.cached_tokens == 0
        again = engine.submit(Request(longer, 10, GREEDY))
        assert await ids_of(again) == greedy(model, longer, 10)
        assert again.timing.cached_tokens == len(longer) - 1

    run(engine_of(llama, cuts=(2,)), work)


def test_ten_times_the_load_is_refused_beyond_the_queue_and_all_others_are_answered(llama: Path) -> None:
    wanted = greedy(whole_model(llama), prompts([4])[0], 10)

    async def work(engine: Engine) -> None:
        request = Request(prompts([4])[0], 10, GREEDY)
        taken = [engine.submit(request) for _ in range(10)]  # for four of which there is room at once
        for _ in range(90):
            with pytest.raises(Busy, match="6 requests are waiting") as refused:
                engine.submit(request)
            assert refused.value.retry_after >= 1
        assert await asyncio.gather(*map(ids_of, taken)) == [wanted] * 10
        assert engine.load["waiting"] == engine.load["running"] == 0
        assert engine.load["kept"] <= 4

    run(engine_of(llama, queue=6), work)


def test_clients_that_wait_take_turns(llama: Path) -> None:
    async def work(engine: Engine) -> None:
        text = prompts([4])[0]
        ended: list[str] = []

        async def ask(client: str, number: int) -> None:
            await ids_of(engine.submit(Request(text, 3, GREEDY, client=client)))
            ended.append(f"{client}{number}")

        many = [asyncio.create_task(ask("a", number)) for number in range(6)]
        await asyncio.sleep(0)
        few = [asyncio.create_task(ask(client, number)) for client in ("b", "c") for number in range(2)]
        await asyncio.gather(*many, *few)
        # a0 was there alone; who has not had a turn comes first, in the order of coming.
        assert ended == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "a3", "a4", "a5"]

    run(engine_of(llama, sequences=1), work)


def test_with_enough_requests_every_span_is_busy(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [greedy(whole_model(llama), prompt, 20) for prompt in prompts(range(3, 9))]
    all_busy = asyncio.Barrier(3)
    waited: set[str] = set()
    compute = Span.compute

    async def compute_when_all_are_busy(span: Span, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        if all(row.position for row in rows) and str(span) not in waited:
            waited.add(str(span))
            await asyncio.wait_for(all_busy.wait(), 60)
        return await compute(span, rows, hidden)

    monkeypatch.setattr(Span, "compute", compute_when_all_are_busy)
    requests = [Request(prompt, 20, GREEDY) for prompt in prompts(range(3, 9))]
    assert run(engine_of(llama, cuts=(2, 4), sequences=6), lambda engine: answers(engine, requests)) == wanted
    assert waited == {"0-2", "2-4", "4-6"}


def test_no_more_batches_are_under_way_than_are_faster(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(prompt, 20, GREEDY) for prompt in prompts([5] * 6)]
    under_way, most, sizes = 0, 0, set()
    advance = Engine._advance

    async def counted(engine: Engine, batch: list[AnswerState]) -> None:
        nonlocal under_way, most
        decodes = not batch[0].prefilling
        sizes.update({len(batch)} if decodes else ())
        under_way += decodes
        most = max(most, under_way)
        try:
            await advance(engine, batch)
        finally:
            under_way -= decodes

    async def work(engine: Engine) -> list[list[int]]:
        monkeypatch.setattr(engine._in_flight, "value", 1)
        monkeypatch.setattr(engine._in_flight, "took", lambda *_: None)
        return await answers(engine, requests)

    monkeypatch.setattr(Engine, "_advance", counted)
    assert run(engine_of(llama, cuts=(2, 4), sequences=6, chunk=64), work) == [
        greedy(whole_model(llama), request.prompt, 20) for request in requests
    ]
    assert most == 1
    assert 6 in sizes


def test_who_fills_the_queue_locks_nobody_out(llama: Path) -> None:
    async def work(engine: Engine) -> None:
        text = prompts([4])[0]
        greedy_ones = [engine.submit(Request(text, 20, GREEDY, client="many")) for _ in range(8)]
        others = [engine.submit(Request(text, 20, GREEDY, client=client)) for client in ("one", "two")]
        with pytest.raises(Busy):
            engine.submit(Request(text, 20, GREEDY, client="many"))
        ended = await asyncio.gather(*map(ids_of, [*greedy_ones, *others]), return_exceptions=True)
        assert [isinstance(one, Busy) for one in ended] == [False] * 6 + [True] * 2 + [False] * 2

    run(engine_of(llama, sequences=2, queue=6), work)


def test_what_was_asked_for_together_is_not_refused_in_part(llama: Path) -> None:
    async def work(engine: Engine) -> None:
        text = prompts([4])[0]
        together = [engine.submit(Request(text, 20, GREEDY, client="many", alone=False)) for _ in range(8)]
        with pytest.raises(Busy):
            engine.submit(Request(text, 20, GREEDY, client="one"))
        assert len(await asyncio.gather(*map(ids_of, together))) == 8

    run(engine_of(llama, sequences=2, queue=6), work)


def test_refused_requests_leave_nothing_behind(llama: Path) -> None:
    async def work(engine: Engine) -> None:
        text = prompts([4])[0]
        taken = [engine.submit(Request(text, 20, GREEDY, client=str(number))) for number in range(4)]
        for number in range(100):
            with pytest.raises(Busy):
                engine.submit(Request(text, 20, GREEDY, client=f"refused {number}"))
        assert len(engine._queue._turns) == 4
        await asyncio.gather(*map(ids_of, taken))

    run(engine_of(llama, sequences=2, queue=2), work)


def test_a_queue_of_none_takes_what_there_is_room_for(llama: Path) -> None:
    async def work(engine: Engine) -> None:
        request = Request(prompts([4])[0], 10, GREEDY)
        taken = [engine.submit(request) for _ in range(4)]
        with pytest.raises(Busy):
            engine.submit(request)
        assert len(set(map(tuple, await asyncio.gather(*map(ids_of, taken))))) == 1

    run(engine_of(llama, queue=0), work)


def test_a_cancelled_request_makes_room_and_changes_no_other(llama: Path) -> None:
    texts = prompts([6, 7, 8, 9, 10, 11])
    model = whole_model(llama)

    async def work(engine: Engine) -> None:
        running = [engine.submit(Request(prompt, 60, GREEDY)) for prompt in texts]
        streams = [aiter(answer) for answer in running]
        await asyncio.gather(*(anext(stream) for stream in streams[:2]))  # the others wait: there is room for two
        for answer in (running[0], running[2]):
            answer.cancel()
        rest = [ids_of(running[number]) for number in (3, 4, 5)]
        assert await asyncio.gather(*rest) == [greedy(model, texts[number], 60) for number in (3, 4, 5)]
        assert [token.id async for token in streams[1]] == greedy(model, texts[1], 60)[1:]
        assert [token async for token in streams[2]] == []
        assert engine.load["running"] == 0

    run(engine_of(llama, cuts=(3,), sequences=2), work)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 5), "prompt is empty"),
        (Request((1, 300), 5), "token 300 is not in the vocabulary of 300"),
        (Request((-1,), 5), "token -1 is not"),
        (Request((1, 2, 3), 78), "more than the context of 80"),
        (Request((1,), -1), "max_tokens has to be 0 or more"),
        (Request((1,), 1, logprobs=21), "logprobs 0 to 20"),
        (Request((1,), 1, Sampling(temperature=-1)), "temperature -1"),
        (Request((1,), 1, Sampling(top_p=0)), "top_p 0"),
        (Request((1,), 1, Sampling(top_k=301)), "top_k 301"),
    ],
)
def test_requests_that_cannot_be_are_refused(llama: Path, request_: Request, message: str) -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(BadRequest, match=message):
            engine.submit(request_)

    run(engine_of(llama), work)


@pytest.mark.parametrize("cuts", [(0,), (6,), (3, 2), (2, 2)])
def test_cuts_that_are_not_inside_the_model_are_refused(llama: Path, cuts: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest, match="not rising places inside 6 blocks"):
        asyncio.run(engine_of(llama, cuts=cuts)())
