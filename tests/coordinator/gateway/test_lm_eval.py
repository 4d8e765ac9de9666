"""What lm-eval's `local-completions` sends and how it reads the answer: its logprobs are the model's own."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import pytest
import torch

from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER
from tests.coordinator.gateway.generators import WholeModel, ask, ids_of

PAIRS = [
    ("The name of the", " file is returned to the caller"),
    ("Rivers carry sand", " and"),
    ("If the value is 🙂", " 🙂, an exception"),
    ("def f(x):\n", "    return x"),
]


@pytest.fixture(scope="module")
def model() -> WholeModel:
    return WholeModel(DEFAULT_MODEL_FOLDER, context=64)


def parse_logprobs(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """Sum of the continuation's logprobs, and whether each was the likeliest; the token that is generated is left out.

    As lm-eval 0.4 reads a completion.
    """
    read = []
    choices = sorted(answer["choices"], key=itemgetter("index"))
    for choice, length in zip(choices, context_lengths, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][length:-1]
        top = choice["logprobs"]["top_logprobs"][length:-1]
        greedy = all(logprob == max(one.values()) for logprob, one in zip(logprobs, top, strict=True))
        read.append((sum(logprobs), greedy))
    return read


def expected(model: WholeModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        scores = model.model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
    chosen = scores.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    return float(chosen.sum()), bool((scores.argmax(-1) == torch.tensor(continuation)).all())


def test_loglikelihoods_of_a_batch_of_token_ids_are_the_models_own(model: WholeModel) -> None:
    pairs = [(ids_of(context), ids_of(continuation)) for context, continuation in PAIRS]
    request = {
        "prompt": [context + continuation for context, continuation in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = ask(model, "/v1/completions", request)
    assert answer.status_code == 200, answer.text
    read = parse_logprobs(answer.json(), [len(context) for context, _ in pairs])
    for (total, greedy), pair in zip(read, pairs, strict=True):
        total_expected, greedy_expected = expected(model, *pair)
        assert total == pytest.approx(total_expected, abs=1e-4)
        assert greedy == greedy_expected


def test_a_continuation_that_is_the_likeliest_is_seen_as_such(model: WholeModel) -> None:
    context = ids_of("If the value of the")
    with torch.no_grad():
        ids = model.model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False)[0].tolist()
    request = {"prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    ((_, greedy),) = parse_logprobs(ask(model, "/v1/completions", request).json(), [len(context)])
    assert greedy


def test_texts_until_a_stop_string_are_generated_for_a_batch(model: WholeModel) -> None:
    request = {
        "prompt": [ids_of(context) for context, _ in PAIRS],
        "max_tokens": 16,
        "temperature": 0,
        "stop": ["\n\n", " the", "<|endoftext|>"],
        "seed": 1234,
    }
    choices = ask(model, "/v1/completions", request).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(PAIRS)))
    assert not any(" the" in choice["text"] for choice in choices)
