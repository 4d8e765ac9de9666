"""A stage that decodes several sequences at once computes what each of them gives alone, in the whole model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.split.errors import BadRequest
from isthmus.split.models.stage import Stage, StageSpec
from isthmus.split.runtime import BadPosition, Row
from isthmus.split.runtime.torch_runtime import TorchRuntime
from tests.split.runtime.stages import alone, blocks, states_of
from tests.split.tiny_models import ARCHITECTURES, make_model

HIDDEN = 32


def states(count: int, seed: int) -> Tensor:
    return states_of(HIDDEN, count, seed)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def stage(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return blocks(make_model(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return blocks(make_model(tmp_path_factory.mktemp("llama"), "llama"))


def test_sequences_that_come_and_go_are_each_computed_as_if_alone(stage: Stage) -> None:
    runtime, chance = TorchRuntime(stage, sequences=4, tokens=40), random.Random(0)
    texts = {number: states(chance.randint(12, 40), number) for number in range(9)}
    wanted = {number: alone(stage, text) for number, text in texts.items()}
    waiting, done = list(texts), dict.fromkeys(texts, 0)
    here: list[int] = []
    while waiting or here:
        while waiting and len(here) < 4:
            here.append(waiting.pop())
        chosen = chance.sample(here, chance.randint(1, len(here)))
        rows = [Row(one, done[one], min(chance.choice([1, 1, 1, 2, 7]), len(texts[one]) - done[one])) for one in chosen]
        given = torch.cat([texts[row.sequence][row.position : row.position + row.count] for row in rows])
        output = runtime.compute(rows, given).split([row.count for row in rows])
        for row, part in zip(rows, output, strict=True):
            end = row.position + row.count
            torch.testing.assert_close(part, wanted[row.sequence][row.position : end], atol=2e-5, rtol=1e-4)
            done[row.sequence] = end
            if end == len(texts[row.sequence]):
                runtime.forget([row.sequence])
                here.remove(row.sequence)
    assert runtime.lengths() == {}


def test_tokens_that_are_taken_back_leave_no_trace(stage: Stage) -> None:
    runtime = TorchRuntime(stage, sequences=2, tokens=40)
    right, wrong = states(30, 1), states(30, 2)
    runtime.compute([Row(0, 0, 12), Row(1, 0, 5)], torch.cat([right[:12], wrong[:5]]))
    runtime.compute([Row(0, 12, 9)], wrong[:9])
    assert runtime.lengths() == {0: 21, 1: 5}
    output = runtime.compute([Row(0, 12, 18)], right[12:])
    torch.testing.assert_close(output, alone(stage, right)[12:], atol=2e-5, rtol=1e-4)
    again = runtime.compute([Row(0, 0, 30)], wrong)
    torch.testing.assert_close(again, alone(stage, wrong), atol=2e-5, rtol=1e-4)


def test_a_position_beyond_the_cache_is_an_error_and_changes_nothing(llama: Stage) -> None:
    runtime = TorchRuntime(llama, sequences=2, tokens=40)
    text = states(20, 3)
    runtime.compute([Row(0, 0, 5)], text[:5])
    for rows in ([Row(0, 6, 1)], [Row(0, 5, 1), Row(1, 3, 1)], [Row(7, 1, 1)]):
        with pytest.raises(BadPosition, match="are here"):
            runtime.compute(rows, text[: sum(row.count for row in rows)])
    assert runtime.lengths() == {0: 5}
    torch.testing.assert_close(runtime.compute([Row(0, 5, 15)], text[5:]), alone(llama, text)[5:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "tokens", "message"),
    [
        ([], 0, "one row for each"),
        ([Row(0, 0, 1), Row(0, 1, 1)], 2, "one row for each"),
        ([Row(0, 0, 3)], 2, "2 tokens for rows of 3"),
        ([Row(0, 0, 11)], 11, "there is room for 10"),
        ([Row(0, 0, 1), Row(1, 0, 1), Row(2, 0, 1)], 3, "room for 2 sequences"),
        ([Row(-1, 0, 1)], 1, "is not a row"),
        ([Row(0, 0, 0)], 0, "is not a row"),
    ],
)
def test_rows_that_cannot_be_are_refused(llama: Stage, rows: list[Row], tokens: int, message: str) -> None:
    runtime = TorchRuntime(llama, sequences=2, tokens=10)
    with pytest.raises(BadRequest, match=message):
        runtime.compute(rows, states(tokens, 0))
    assert runtime.lengths() == {}


def test_nan_of_one_sequence_is_not_seen_by_the_next_in_its_place(llama: Stage) -> None:
    runtime = TorchRuntime(llama, sequences=1, tokens=40)
    runtime.compute([Row(0, 0, 9)], torch.full((9, HIDDEN), torch.nan))
    runtime.compute([Row(0, 0, 1)], states(1, 0))
    runtime.forget([0, 5])
    text = states(12, 4)
    runtime.compute([Row(1, 0, 2)], text[:2])
    output = runtime.compute([Row(1, 2, 10)], text[2:])
    torch.testing.assert_close(output, alone(llama, text)[2:], atol=2e-5, rtol=1e-4)


def test_neither_embedding_nor_head_belong_in_it(llama: Stage) -> None:
    with pytest.raises(ValueError, match="blocks alone"):
        TorchRuntime(
            Stage(StageSpec(0, 0, embeds=True, head=False), llama.model, _architecture()), sequences=1, tokens=8
        )


def _architecture() -> Any:
    from isthmus.split.models.architectures import ARCHITECTURES as known

    return known["llama"]
