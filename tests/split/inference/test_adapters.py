"""Answers with adapters are peft's, whatever the base and other adapters answer meanwhile."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.split.errors import BadRequest
from isthmus.split.inference.chain import Span
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.local import local_engine
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.lora.folder import AdapterFolder
from isthmus.split.lora.served import LoraAdapter
from isthmus.split.models.source import open_model
from isthmus.split.runtime.base import Row
from isthmus.split.runtime.choose import ONNX, TORCH, RuntimeChoice, make_runtime
from isthmus.split.runtime.onnx_shape import SUPPORTED
from tests.split.inference.test_failover import Mortal
from tests.split.inference.whole import answers, greedy, ids_of, prompts, run, whole_model
from tests.split.tiny_adapters import make_adapter, with_adapter
from tests.split.tiny_models import ARCHITECTURES, make_model

GREEDY = Sampling(temperature=0)
LENGTHS = (1, 3, 9, 17, 30, 2)
COUNT = 16
RUNTIMES = [*((name, TORCH) for name in ARCHITECTURES), *((name, ONNX) for name in SUPPORTED)]


class House:
    """A tiny model of every architecture with two adapters, and what peft answers: [adapter][prompt]."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.model = make_model(folder / "model", architecture, hidden=64)
        self.adapters = [
            make_adapter(folder / "all", self.model, seed=1),
            make_adapter(folder / "few", self.model, seed=2, r=3, target_modules=[FEW[architecture]], use_rslora=True),
        ]
        models = [whole_model(self.model), *(with_adapter(self.model, one) for one in self.adapters)]
        self.wanted = [[greedy(model, prompt, COUNT) for prompt in prompts(LENGTHS)] for model in models]

    def engine(self, runtime: str = TORCH, **options: Any) -> Any:
        source = open_model(str(self.model))
        adapters = [LoraAdapter(one.name, AdapterFolder(one), source.config) for one in self.adapters]
        settings = {"context": 80, "chunk": 8, "sequences": 6, "choice": RuntimeChoice(runtime), **options}
        return lambda: local_engine(source, adapters=adapters, **settings)


FEW = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral"), "v_proj"),
    "phi3": "gate_up_proj",
    "gpt2": "c_proj",
    "gpt_neox": "dense",
}


class Houses(dict[str, House]):
    """By architecture; each is made when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._factory = factory

    def __missing__(self, name: str) -> House:
        self[name] = House(self._factory.mktemp(name), name)
        return self[name]


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, House]:
    return Houses(tmp_path_factory)


@pytest.fixture(autouse=True)
def graphs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("cuts", [(), (2,), (1, 4)], ids=["1", "2", "3"])
@pytest.mark.parametrize(("architecture", "runtime"), RUNTIMES)
def test_base_and_adapters_at_the_same_time_are_each_what_peft_answers(
    houses: dict[str, House], architecture: str, runtime: str, cuts: tuple[int, ...]
) -> None:
    house = houses[architecture]
    requests = [Request(prompt, COUNT, GREEDY, adapter=adapter) for prompt in prompts(LENGTHS) for adapter in range(3)]
    got = run(house.engine(runtime, cuts=cuts), lambda engine: answers(engine, requests))
    assert [got[adapter::3] for adapter in range(3)] == house.wanted
    assert len({str(wanted) for wanted in house.wanted}) == 3


@pytest.mark.parametrize(("architecture", "runtime"), RUNTIMES)
def test_each_alone_answers_the_same(houses: dict[str, House], architecture: str, runtime: str) -> None:
    house = houses[architecture]

    async def work(engine: Engine) -> None:
        for adapter, wanted in enumerate(house.wanted):
            requests = [Request(prompt, COUNT, GREEDY, adapter=adapter) for prompt in prompts(LENGTHS)]
            assert await answers(engine, requests) == wanted

    run(house.engine(runtime, cuts=(2,)), work)


def test_what_one_adapter_has_computed_is_not_reused_by_another(houses: dict[str, House]) -> None:
    house = houses["llama"]
    first, more = prompts([15, 6])

    async def work(engine: Engine) -> None:
        models = [whole_model(house.model), *(with_adapter(house.model, one) for one in house.adapters)]
        for adapter, model in enumerate(models):
            answer = engine.submit(Request(first, COUNT, GREEDY, adapter=adapter))
            assert await ids_of(answer) == greedy(model, first, COUNT)
            assert answer.timing.cached_tokens == 0
        for adapter, model in enumerate(models):
            answer = engine.submit(Request((*first, *more), COUNT, GREEDY, adapter=adapter))
            assert await ids_of(answer) == greedy(model, (*first, *more), COUNT)
            assert answer.timing.cached_tokens == len(first)

    run(house.engine(cuts=(2,)), work)
    run(house.engine(sequences=1), lambda engine: alternating(engine, house))


async def alternating(engine: Engine, house: House) -> None:
    """With room for one sequence, which another adapter takes over each time."""
    for place, prompt in enumerate(prompts(LENGTHS)):
        for adapter in (1, 0, 2):
            answer = engine.submit(Request(prompt, COUNT, GREEDY, adapter=adapter))
            assert await ids_of(answer) == house.wanted[adapter][place]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_adapters_are_computed_beside_few_bits(houses: dict[str, House], weights: str) -> None:
    """The base's rounding is all that differs: what an adapter adds is the same as in float32."""
    house = houses["llama"]
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def added(choice: RuntimeChoice) -> torch.Tensor:
        source = open_model(str(house.model))
        adapter = LoraAdapter("a", AdapterFolder(house.adapters[1]), source.config)  # v_proj alone
        runtime = make_runtime(source, 0, 1, choice, sequences=2, tokens=8, adapters=[adapter])
        rows = [Row(0, 0, 5, 1), Row(1, 0, 5)]
        adapted, base = runtime.compute(rows, torch.cat([hidden, hidden])).split(5)
        return adapted - base

    wanted = added(RuntimeChoice(TORCH))
    assert (added(RuntimeChoice(ONNX, weights)) - wanted).norm() < 0.2 * wanted.norm()
    torch.testing.assert_close(added(RuntimeChoice(ONNX)), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("runtime", [TORCH, ONNX])
def test_a_row_with_an_adapter_that_is_not_there_is_refused(houses: dict[str, House], runtime: str) -> None:
    source = open_model(str(houses["llama"].model))
    made = make_runtime(source, 0, 1, RuntimeChoice(runtime), sequences=2, tokens=8)
    with pytest.raises(BadRequest, match="adapter 1 of a row; 0 are here"):
        made.compute([Row(0, 0, 1, 1)], torch.zeros(1, 64))


def test_deaths_at_random_tokens_change_no_answer_with_adapters(houses: dict[str, House]) -> None:
    house, chance = houses["llama"], random.Random(3)
    source = open_model(str(house.model))
    adapters = [LoraAdapter(one.name, AdapterFolder(one), source.config) for one in house.adapters]

    def holder(name: str, first: int, last: int, batches: float) -> Mortal:
        choice = RuntimeChoice(TORCH)
        runtime = make_runtime(source, first, last, choice, sequences=6, tokens=80, adapters=adapters)
        return Mortal(name, runtime, batches, chance.random() < 0.5)

    async def work() -> None:
        spans = [Span(first, last, 64, chunk=16, patience=5) for first, last in ((0, 2), (2, 6))]
        for span in spans:
            for number in range(3):
                batches = chance.randint(0, 25) if number < 2 else float("inf")
                await span.add(holder(f"{span}/{number}", span.first, span.last, batches))
        ends = Ends(source, RuntimeChoice(TORCH))
        async with asyncio.timeout(120), Engine(ends, spans, context=80, sequences=6, chunk=16) as engine:
            requests = [
                Request(prompt, COUNT, GREEDY, adapter=adapter) for prompt in prompts(LENGTHS) for adapter in range(3)
            ]
            got = await answers(engine, requests)
        assert [got[adapter::3] for adapter in range(3)] == house.wanted
        assert sum(len(span.recoveries) for span in spans) > 3

    asyncio.run(work())
