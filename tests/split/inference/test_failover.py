"""Whoever dies, whenever: the answers are those that nobody disturbed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from isthmus.split.errors import BadRequest, IsthmusError, LinkLost
from isthmus.split.inference.chain import LocalHolder, Span
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.models.source import open_model
from isthmus.split.models.stage import StageSpec, build_stages
from isthmus.split.runtime.base import BadPosition, Row, Runtime
from isthmus.split.runtime.choose import TORCH, RuntimeChoice
from isthmus.split.runtime.torch_runtime import TorchRuntime
from tests.split.inference.whole import answers, greedy, ids_of, prompts, whole_model
from tests.split.tiny_models import make_model

GREEDY = Sampling(temperature=0)
LENGTHS = (2, 20, 5, 11, 1, 7, 16, 9)
SEQUENCES, CONTEXT = 8, 80


class Mortal(LocalHolder):
    """Dies in the batch after `batches` of them: before it has computed, or when it has and nobody hears of it."""

    def __init__(self, name: str, runtime: Runtime, batches: float, after_computing: bool) -> None:
        super().__init__(name, runtime)
        self._left, self._after_computing = batches, after_computing
        self.seen: list[list[Row]] = []

    async def compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        if self.gone:
            raise LinkLost(f"{self.name} is dead")
        self.seen.append(list(rows))
        self._left -= 1
        if self._left < 0 and not self._after_computing:
            self.gone = True
            raise LinkLost(f"{self.name} died")
        output = await super().compute(rows, hidden)
        if self._left < 0:
            self.gone = True
            raise LinkLost(f"{self.name} died")
        return output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def runtime(folder: Path, first: int, last: int) -> TorchRuntime:
    stage = build_stages(open_model(str(folder)), [StageSpec(first, last, embeds=False, head=False)])[0]
    return TorchRuntime(stage, sequences=SEQUENCES, tokens=CONTEXT)


def engine(folder: Path, spans: Sequence[Span], **options: Any) -> Engine:
    return Engine(
        Ends(open_model(str(folder)), RuntimeChoice(TORCH)),
        spans,
        context=CONTEXT,
        sequences=SEQUENCES,
        **({"chunk": 16} | options),
    )


@pytest.mark.parametrize("seed", range(6))
def test_deaths_at_random_tokens_change_no_answer(llama: Path, seed: int) -> None:
    chance = random.Random(seed)
    model = whole_model(llama)
    texts = prompts(LENGTHS, seed)
    wanted = [greedy(model, prompt, 24) for prompt in texts]

    async def work() -> None:
        spans = [Span(first, last, 32, chunk=16, patience=5) for first, last in ((0, 2), (2, 3), (3, 6))]
        for span in spans:
            for number in range(3):
                batches = chance.randint(0, 25) if number < 2 else float("inf")
                computes = chance.random() < 0.5
                await span.add(Mortal(f"{span}/{number}", runtime(llama, span.first, span.last), batches, computes))
        async with asyncio.timeout(120), engine(llama, spans) as running:
            assert await answers(running, [Request(prompt, 24, GREEDY) for prompt in texts]) == wanted
        recoveries = [one for span in spans for one in span.recoveries]
        assert recoveries
        assert all(one.lost and one.lost != one.holder and one.tokens > 0 and one.seconds > 0 for one in recoveries)

    asyncio.run(work())


def test_a_replacement_is_sent_each_sequence_from_its_first_token_in_one_prefill(llama: Path) -> None:
    (prompt,) = prompts([10])

    async def work() -> None:
        span = Span(0, 6, 32, chunk=64)
        dying = Mortal("dying", runtime(llama, 0, 6), 4, True)
        standby = Mortal("standby", runtime(llama, 0, 6), float("inf"), False)
        await span.add(dying)
        await span.add(standby)
        async with asyncio.timeout(60), engine(llama, [span]) as running:
            assert await ids_of(running.submit(Request(prompt, 8, GREEDY))) == greedy(whole_model(llama), prompt, 8)
        assert [[row.position for row in rows] for rows in dying.seen] == [[0], [10], [11], [12], [13]]
        assert [(row.position, row.count) for rows in standby.seen for row in rows] == [
            (0, 13),
            *((place, 1) for place in range(13, 17)),
        ]
        (recovery,) = span.recoveries
        assert (recovery.lost, recovery.holder, recovery.tokens) == ("dying", "standby", 13)

    asyncio.run(work())


def test_a_holder_that_forgot_everything_is_sent_it_again(llama: Path) -> None:
    (prompt,) = prompts([10])

    async def work() -> None:
        span, mine = Span(0, 6, 32), LocalHolder("here", runtime(llama, 0, 6))
        await span.add(mine)
        async with asyncio.timeout(60), engine(llama, [span]) as running:
            answer = running.submit(Request(prompt, 12, GREEDY))
            got = []
            async for token in answer:
                got.append(token.id)
                if len(got) == 5:
                    mine.forget(range(SEQUENCES))  # as if it had been started again
        assert got == greedy(whole_model(llama), prompt, 12)
        assert [one.holder for one in span.recoveries] == ["here"]

    asyncio.run(work())


class Faulty(LocalHolder):
    """Never computes anything."""

    def __init__(self, runtime: TorchRuntime, error: IsthmusError) -> None:
        super().__init__("faulty", runtime)
        self._error = error
        self.asked = 0

    async def compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        self.asked += 1
        raise self._error


@pytest.mark.parametrize("error", [BadPosition("go back"), BadRequest("no"), IsthmusError("no memory")])
def test_a_holder_that_only_gives_errors_is_left_for_another(llama: Path, error: IsthmusError) -> None:
    texts = prompts(LENGTHS)

    async def work() -> None:
        span, faulty = Span(0, 6, 32), Faulty(runtime(llama, 0, 6), error)
        await span.add(faulty)
        await span.add(LocalHolder("sound", runtime(llama, 0, 6)), 1)
        async with asyncio.timeout(60), engine(llama, [span]) as running:
            wanted = [greedy(whole_model(llama), prompt, 8) for prompt in texts]
            assert await answers(running, [Request(prompt, 8, GREEDY) for prompt in texts]) == wanted
        assert faulty.gone
        assert faulty.asked <= 2
        assert [holder.name for holder in span.holders] == ["sound"]

    asyncio.run(work())


def test_what_nobody_can_compute_ends_with_its_error(llama: Path) -> None:
    async def work() -> None:
        span = Span(0, 6, 32)
        for rank in range(3):
            await span.add(Faulty(runtime(llama, 0, 6), IsthmusError("no memory")), rank)
        async with asyncio.timeout(60), engine(llama, [span]) as running:
            with pytest.raises(IsthmusError, match="no memory"):
                await ids_of(running.submit(Request(prompts([4])[0], 8, GREEDY)))
        assert len(span.holders) == 2  # a batch costs one of them at most

    asyncio.run(work())


def test_an_answer_waits_for_a_holder_that_comes_later(llama: Path) -> None:
    (prompt,) = prompts([10])

    async def work() -> None:
        spans = [Span(0, 3, 32), Span(3, 6, 32)]
        await spans[0].add(LocalHolder("here", runtime(llama, 0, 3)))
        async with asyncio.timeout(60), engine(llama, spans) as running:
            answer = asyncio.create_task(ids_of(running.submit(Request(prompt, 6, GREEDY))))
            done, _ = await asyncio.wait({answer}, timeout=0.05)
            assert not done
            await spans[1].add(LocalHolder("late", runtime(llama, 3, 6)))
            assert await answer == greedy(whole_model(llama), prompt, 6)

    asyncio.run(work())


def test_without_a_holder_the_answer_ends_with_one_line_and_the_next_is_answered(llama: Path) -> None:
    (prompt,) = prompts([10])

    async def work() -> None:
        span = Span(0, 6, 32, patience=0.1)
        await span.add(Mortal("dying", runtime(llama, 0, 6), 3, True))
        async with asyncio.timeout(60), engine(llama, [span]) as running:
            with pytest.raises(LinkLost, match="nobody holds blocks 0-6, and nobody came for 0 s"):
                await ids_of(running.submit(Request(prompt, 12, GREEDY)))
            await span.add(LocalHolder("new", runtime(llama, 0, 6)))
            answer = running.submit(Request(prompt, 12, GREEDY))
            assert await ids_of(answer) == greedy(whole_model(llama), prompt, 12)
            assert running.load["running"] == 0

    asyncio.run(work())
