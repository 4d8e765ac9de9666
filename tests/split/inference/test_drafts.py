"""Drafts change how soon tokens come, and never which ones."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.split.errors import BadRequest
from isthmus.split.inference.answer_state import AnswerState
from isthmus.split.inference.chain import LocalHolder
from isthmus.split.inference.draft_scheduler import DraftScheduler
from isthmus.split.inference.drafters import DraftRequest, ModelDrafter, look_up
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.local import EARLY, LOOKUP, local_engine
from isthmus.split.inference.pace import Mean, Pace
from isthmus.split.inference.request import Request, Sampling, Timing
from isthmus.split.inference.sampling import Chooser, probabilities
from isthmus.split.models.source import open_model
from isthmus.split.runtime.choose import TORCH, RuntimeChoice, make_runtime
from tests.split.inference.whole import (
    answers,
    greedy,
    ids_of,
    longrope_model,
    prompts,
    run,
    tokens_of,
    whole_model,
)
from tests.split.tiny_models import ARCHITECTURES, VOCABULARY, make_model

GREEDY = Sampling(temperature=0)
LENGTHS = (1, 3, 9, 17, 30, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> Path:
    return folders["llama"]


@pytest.fixture(scope="module")
def similar(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that often thinks as the llama does, and often not."""
    folder = Path(shutil.copytree(llama, tmp_path_factory.mktemp("similar") / "model"))
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for value in weights.values():
        value += 0.01 * torch.randn(value.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many drafts as may be, whether they are worth it or not."""

    def choose(self: DraftScheduler, batch: Sequence[AnswerState]) -> tuple[list[AnswerState], int]:
        return [stream for stream in batch if self._most(stream) > 0], 10

    monkeypatch.setattr(DraftScheduler, "_choose", choose)


def engine_of(folder: Path, **options: Any) -> Callable[[], Any]:
    return lambda: local_engine(open_model(str(folder)), **({"context": 80, "chunk": 8, "sequences": 4} | options))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("draft", [LOOKUP, EARLY, "itself"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_those_of_transformers(folders: dict[str, Path], architecture: str, draft: str) -> None:
    folder = folders[architecture]
    model = whole_model(folder)
    wanted = [greedy(model, prompt, 20) for prompt in prompts(LENGTHS)]
    requests = [Request(prompt, 20, GREEDY) for prompt in prompts(LENGTHS)]

    async def work(engine: Engine) -> None:
        assert await answers(engine, requests) == wanted
        figures = engine.stats()["answers"]
        assert figures["drafted"] > 0
        assert figures["tokens"] == 20 * len(requests)
        if draft == "itself":  # every draft is right, and the engine asks for ten of them
            assert figures["accepted"] == figures["drafted"]
            assert figures["rounds"] == 2 * len(requests)

    source = str(folder) if draft == "itself" else draft
    run(engine_of(folder, cuts=(2, 5), draft=source), work)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("draft", [LOOKUP, EARLY, "similar"])
def test_answers_with_a_seed_are_the_same_with_drafts(llama: Path, similar: Path, draft: str) -> None:
    requests = [
        Request(prompt, 25, Sampling(temperature=0.7, top_p=0.95, top_k=50, seed=number), logprobs=2)
        for number, prompt in enumerate(prompts(LENGTHS))
    ]

    async def all_tokens(engine: Engine) -> list[Any]:
        found = await asyncio.gather(*(tokens_of(engine.submit(request)) for request in requests))
        return [*found, engine.stats()["answers"]]

    *plain, _ = run(engine_of(llama), all_tokens)
    *drafted, figures = run(
        engine_of(llama, cuts=(2,), draft=str(similar) if draft == "similar" else draft), all_tokens
    )
    for mine, theirs in zip(drafted, plain, strict=True):
        assert [(token.id, token.last) for token in mine] == [(token.id, token.last) for token in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
            assert [token for token, _ in one.logprob.top] == [token for token, _ in other.logprob.top]
    if draft == "similar":
        assert 0 < figures["accepted"] < figures["drafted"]


@pytest.mark.usefixtures("eager")
def test_sampled_tokens_have_the_models_distribution(llama: Path, similar: Path) -> None:
    """Chi-square: the second token is chosen while drafts are verified, after each possible first one."""
    (prompt,) = prompts([6])
    count, sampling = 3000, Sampling(temperature=0.6)
    requests = [Request(prompt, 3, Sampling(temperature=0.6, seed=number)) for number in range(count)]

    async def work(engine: Engine) -> tuple[list[list[int]], dict[str, int]]:
        return await answers(engine, requests), engine.stats()["answers"]

    found, figures = run(engine_of(llama, draft=str(similar), sequences=32, context=16, queue=count), work)
    assert 0.2 < figures["accepted"] / figures["drafted"] < 0.95
    with torch.inference_mode():
        model = whole_model(llama)
        first = probabilities(model(torch.tensor([prompt])).logits[0, -1], sampling)
        texts = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        after = torch.stack([probabilities(logits, sampling) for logits in model(texts).logits[:, -1]])
    for place, chances in enumerate((first, first @ after)):
        counts = torch.bincount(torch.tensor([ids[place] for ids in found]), minlength=VOCABULARY).double()
        assert chi_square_p(counts, count * chances) > 1e-3


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """Probability of at least such a difference by chance; what is expected less than five times is put together."""
    rare = expected < 5
    pairs = [*zip(counts[~rare], expected[~rare], strict=True), (counts[rare].sum(), expected[rare].sum())]
    statistic = sum(float((seen - wanted) ** 2 / wanted) for seen, wanted in pairs if wanted > 0)
    return float(torch.special.gammaincc(torch.tensor((len(pairs) - 1) / 2), torch.tensor(statistic / 2)))


@pytest.mark.usefixtures("eager")
def test_answers_end_inside_drafts_and_the_next_turn_goes_on_from_them(llama: Path) -> None:
    first, more = prompts([15, 6])
    model = whole_model(llama)
    wanted = greedy(model, first, 20)
    stop = next(token for token in wanted[6:] if token not in wanted[:6])
    said = wanted[: wanted.index(stop) + 1]

    async def work(engine: Engine) -> None:
        assert await ids_of(engine.submit(Request(first, 20, GREEDY, stop_tokens=frozenset({stop})))) == said
        longer = (*first, *said, *more)
        answer = engine.submit(Request(longer, 10, GREEDY))
        assert await ids_of(answer) == greedy(model, longer, 10)
        assert answer.timing.cached_tokens == len(first) + len(said) - 1
        full = engine.submit(Request(longer, 80 - len(longer), GREEDY))  # up to the last place of the context
        assert await ids_of(full) == greedy(model, longer, 80 - len(longer))

    run(engine_of(llama, cuts=(3,), draft=str(llama)), work)


@pytest.mark.usefixtures("eager")
def test_a_drafter_goes_on_while_its_drafts_are_verified(llama: Path) -> None:
    (prompt,) = prompts([5])
    wanted = greedy(whole_model(llama), prompt, 40)

    async def work(engine: Engine) -> None:
        drafter: Any = engine._drafting._drafter  # type: ignore[union-attr]
        under_way, in_advance = False, []
        far = engine.spans[1].holders[0]
        compute, step = far.compute, drafter._step
        drafted = asyncio.Event()

        async def slow(rows: Any, hidden: Tensor) -> Tensor:
            nonlocal under_way
            under_way = True
            if not in_advance and 1 < len(hidden) != len(prompt):
                await asyncio.wait_for(drafted.wait(), 20)  # a link that is slower than the drafter
            output = await compute(rows, hidden)
            far.cost.beyond[-1] = 1.0
            under_way = False
            return output

        async def seen(due: Any) -> None:
            await step(due)
            if under_way:
                in_advance.extend(len(line.tokens) for _, line in due)
                drafted.set()

        far.cost.beyond.append(1.0)
        far.compute = slow  # type: ignore[method-assign]
        drafter._step = seen
        assert await ids_of(engine.submit(Request(prompt, 40, GREEDY))) == wanted
        assert in_advance

    run(engine_of(llama, cuts=(3,), draft=EARLY), work)


def test_a_model_drafts_what_it_would_say_itself_and_forgets_what_was_wrong(llama: Path) -> None:
    source, choice = open_model(str(llama)), RuntimeChoice(TORCH)
    blocks = LocalHolder("here", make_runtime(source, 0, 6, choice, sequences=4, tokens=60))
    drafter = ModelDrafter(Ends(source, choice), blocks, context=60, first_sequence=2, chunk=4)
    model, choose = whole_model(llama), Chooser(GREEDY)
    one, other = (list(prompt) for prompt in prompts([9, 5]))

    async def propose(tokens: Sequence[int], count: int, chooser: Chooser = choose) -> list[int]:
        (found,) = await drafter.propose([DraftRequest(1, tokens, 0, count, chooser)])
        return found

    async def work() -> None:
        line = greedy(model, one, 8)
        assert await propose(one, 4) == line[:4]
        computed = blocks.cost.tokens
        assert await propose([*one, *line[:2]], 2) == line[2:4]  # which it knows already
        assert blocks.cost.tokens == computed
        wrong = [*one, line[0], (line[1] + 1) % VOCABULARY]
        assert await propose(wrong, 3) == greedy(model, wrong, 3)
        assert await propose(other, 3, Chooser(GREEDY)) == greedy(model, other, 3)  # another answer in its place
        asks = [DraftRequest(0, one, 0, 5, Chooser(GREEDY)), DraftRequest(1, other, 0, 2, Chooser(GREEDY))]
        assert await drafter.propose(asks) == [line[:5], greedy(model, other, 2)]
        assert await propose(one, 55) == greedy(model, one, 51)  # as many as there is room for
        assert await propose([*one, VOCABULARY], 2) == []  # a token that it does not know
        (none,) = await drafter.propose([DraftRequest(0, other, 0, 5, choose)], lambda: True)
        assert none == []

    asyncio.run(work())


@pytest.mark.parametrize(
    ("tokens", "count", "wanted"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 3, [9, 2, 3]),  # the longer match, though another is later
        ([5, 1, 5, 2, 5], 4, [2, 5]),
        ([7, 7, 7], 5, [7]),
        ([1, 2, 3], 5, []),
        ([1], 5, []),
    ],
)
def test_prompt_lookup_finds_what_followed(tokens: list[int], count: int, wanted: list[int]) -> None:
    assert look_up(tokens, count) == wanted


def test_a_model_with_another_tokenizer_cannot_draft(llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<eos>"', '"<end>"'))
    with pytest.raises(BadRequest, match="its tokenizer is not the model's"):
        asyncio.run(engine_of(llama, draft=str(other))())
    with pytest.raises(BadRequest, match="after how many blocks"):
        asyncio.run(engine_of(llama, draft=EARLY)())


class Timed:
    """A drafter whose guesses are right so often, and a clock that drafts, reading and batches move on."""

    def __init__(self, right: float, draft: float, read: float) -> None:
        self.seconds, self.reading_seconds, self._right = draft, read, right
        self.clock = 0.0
        self._read: dict[int, int] = {}
        self._generator = torch.Generator().manual_seed(0)

    def unread(self, ask: DraftRequest) -> int:
        return len(ask.tokens) - self._read.get(ask.sequence, 0)

    async def propose(
        self, asks: Sequence[DraftRequest], enough: Callable[[], bool] = lambda: False
    ) -> list[list[int]]:
        self.clock += self.reading_seconds * sum(map(self.unread, asks)) + self.seconds * max(ask.count for ask in asks)
        self._read |= {ask.sequence: len(ask.tokens) for ask in asks}
        chances = [torch.rand(ask.count, generator=self._generator) for ask in asks]
        return [(chance < self._right).long().tolist() for chance in chances]  # 1: it will be right

    def forget(self, sequence: int) -> None:
        self._read.pop(sequence, None)


@dataclass
class Text:
    """Stands for a stream: tokens are only counted."""

    sequence: int
    left: int
    pace: Pace
    tokens: list[int]
    long: bool = False
    drafts: list[int] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)
    place: int = 0
    choose: Any = None
    request: Request = field(default_factory=lambda: Request((1,), 1))


async def simulate(
    right: float, *, batch: float, token: float, draft: float, read: float, answers: int, tokens: int, times: int
) -> float:
    """Seconds of `times` times so many answers of so many tokens at once, over those without drafts.

    Prompts of 100 tokens. batch, token, draft, read: seconds of each.
    """
    drafter = Timed(right, draft, read)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("isthmus.split.inference.draft_scheduler.time.perf_counter", lambda: drafter.clock)
    generator = torch.Generator().manual_seed(1)
    ends: Any = SimpleNamespace(vocabulary=2, rotary_boundary=None)
    drafting = DraftScheduler(drafter, ends, lambda: 0.0)
    plain = 0.0
    for _ in range(times):
        running = [Text(number, tokens, Pace(Mean(0.6, 0.03)), [0] * 100) for number in range(answers)]
        for text in running:
            drafting.begin(text)  # type: ignore[arg-type]
            drafter.forget(text.sequence)
        plain += tokens * (batch + token * answers)
        while running:
            await drafting.prepare(running)  # type: ignore[arg-type]
            fed = len(running) + sum(len(text.drafts) for text in running)
            seconds = (batch + token * fed) * (1 + 0.1 * float(torch.randn(1, generator=generator)))
            drafter.clock += seconds
            drafting.took(fed, seconds)
            for text in running:
                accepted = int(torch.tensor([*text.drafts, 0]).cumprod(0).sum())
                text.timing.drafted += len(text.drafts)
                if text.drafts:
                    text.pace.heard(accepted, accepted < len(text.drafts))
                text.left -= accepted + 1
                text.tokens += [0] * (accepted + 1)
                text.drafts = []
            running = [text for text in running if text.left > 0]
    monkeypatch.undo()
    return drafter.clock / plain


@pytest.mark.parametrize("answers", [1, 8])
@pytest.mark.parametrize("tokens", [4, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (16, 64)), 400])
@pytest.mark.parametrize("draft", [0.0, pytest.param(0.002, marks=pytest.mark.exhaustive), 0.01])
def test_drafts_that_are_wrong_cost_less_than_a_twentieth(answers: int, tokens: int, draft: float) -> None:
    for token in (0.0002, 0.002, 0.01):
        ratio = asyncio.run(
            simulate(
                0.0, batch=0.01, token=token, draft=draft, read=draft / 10, answers=answers, tokens=tokens,
                times=3200 // tokens,
            )
        )  # fmt: skip
        assert ratio < 1.05


@pytest.mark.parametrize("right", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("answers", [1, 2, 8])
def test_drafts_never_make_answers_slower(right: float, answers: int) -> None:
    for batch, token in ((0.04, 0.001), (0.02, 0.005), (0.001, 0.01)):
        settings = {"batch": batch, "token": token, "draft": 0.003, "read": 0.0003, "answers": answers}
        assert asyncio.run(simulate(right, **settings, tokens=100, times=20)) < 1.05


def test_drafts_that_are_right_are_used_as_far_as_they_are_worth_it() -> None:
    slow_link = {"batch": 0.04, "token": 0.001, "draft": 0.002, "read": 0.0002, "answers": 1}
    assert asyncio.run(simulate(0.95, **slow_link, tokens=400, times=5)) < 0.35
    assert asyncio.run(simulate(0.7, **slow_link, tokens=400, times=5)) < 0.55


@pytest.mark.parametrize("read", [0.0, 0.0005])
def test_drafting_begins_again_when_the_text_becomes_easy(read: float) -> None:
    async def work() -> None:
        drafter = Timed(0.0, 0.002, read)
        ends: Any = SimpleNamespace(vocabulary=2, rotary_boundary=None)
        drafting = DraftScheduler(drafter, ends, lambda: 0.0)
        text: Any = Text(0, 10_000, Pace(Mean(0.6, 0.03)), [0] * 100)
        drafting.begin(text)
        drafted: list[int] = []
        for number in range(3000):
            drafter._right = 0.0 if number < 600 else 0.95
            await drafting.prepare([text])
            drafted.append(len(text.drafts))
            drafting.took(1 + len(text.drafts), 0.04 + 0.001 * (1 + len(text.drafts)))
            accepted = int(torch.tensor([*text.drafts, 0]).cumprod(0).sum())
            if text.drafts:
                text.pace.heard(accepted, accepted < len(text.drafts))
            text.tokens += [0] * (accepted + 1)
            text.drafts = []
        assert sum(drafted[100:600]) < 60
        assert sum(drafted[-100:]) > 400

    asyncio.run(work())


def test_a_drafter_that_fails_costs_no_answer(llama: Path) -> None:
    texts = prompts(LENGTHS)
    wanted = [greedy(whole_model(llama), prompt, 20) for prompt in texts]

    async def work(engine: Engine) -> None:
        drafter: Any = engine._drafting._drafter  # type: ignore[union-attr]

        async def fails(due: Any) -> None:
            raise MemoryError("no room")

        drafter._step = fails
        assert await answers(engine, [Request(prompt, 20, GREEDY) for prompt in texts]) == wanted

    run(engine_of(llama, cuts=(3,), draft=EARLY), work)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("drafted_by", ["lookup", "early", "model"])
def test_answers_that_become_long_are_the_same_with_drafts(tmp_path: Path, drafted_by: str) -> None:
    folder = longrope_model(tmp_path)
    requests = [Request(prompt, 40, GREEDY) for prompt in prompts((5, 12, 20, 28, 40))]
    wanted = [greedy(whole_model(folder), request.prompt, 40) for request in requests]
    draft = str(folder) if drafted_by == "model" else drafted_by
    assert run(engine_of(folder, cuts=(3,), draft=draft), lambda engine: answers(engine, requests)) == wanted
