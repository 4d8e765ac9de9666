"""/v1/completions: prompts of every form, stop strings, logprobs, echo, n, usage and streams."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from isthmus.split.inference.request import Sampling
from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER
from tests.coordinator.gateway.generators import END, Script, WholeModel, ask, ids_of, saying, tokenizer

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def model() -> WholeModel:
    return WholeModel(DEFAULT_MODEL_FOLDER, context=64)


def events(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream, of which the last is [DONE]."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def choice(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    (only,) = answer.json()["choices"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one two", ["one two"]),
        (["one two", "three"], ["one two", "three"]),
        (ids_of("one two"), ["one two"]),
        ([ids_of("one two"), ids_of("three")], ["one two", "three"]),
    ],
)
def test_a_prompt_may_be_text_or_token_ids_one_or_several(prompt: Any, prompts: list[str]) -> None:
    script = saying(" done")
    body = ask(script, PATH, {"prompt": prompt}).json()
    assert [answer.request.prompt for answer in script.answers] == [tuple(ids_of(text)) for text in prompts]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (index, " done", "stop") for index in range(len(prompts))
    ]
    count = sum(len(ids_of(text)) for text in prompts)
    assert body["usage"]["prompt_tokens"] == count
    assert body["usage"]["completion_tokens"] == len(prompts) * len(script.ids)
    assert body["usage"]["total_tokens"] == count + len(prompts) * len(script.ids)
    assert (body["object"], body["model"], body["id"][:5]) == ("text_completion", "m", "cmpl-")


def test_the_answer_is_the_models_own(model: WholeModel) -> None:
    body = {"prompt": "The value of the", "temperature": 0, "max_tokens": 12}
    answer = choice(ask(model, PATH, body))
    ids = model.answers[-1].request.prompt
    whole = model.model.generate(model.model.dummy_inputs["input_ids"].new_tensor([ids]), max_new_tokens=12)
    assert answer["text"] == tokenizer().decode(whole[0, len(ids) :], skip_special_tokens=True)


def test_sampling_parameters_reach_the_engine_and_each_of_n_answers_has_its_own_seed() -> None:
    script = saying("x")
    ask(script, PATH, {"prompt": "a", "n": 2, "seed": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "best_of": 2})
    assert [answer.request.sampling for answer in script.answers] == [
        Sampling(temperature=0.5, top_p=0.9, top_k=5, seed=seed) for seed in (7, 8)
    ]
    ask(script, PATH, {"prompt": "a"})
    assert script.answers[-1].request.sampling == Sampling()
    assert script.answers[-1].request.max_tokens == 16
    assert script.answers[-1].request.stop_tokens == {END}


def test_the_same_seed_gives_the_same_answers(model: WholeModel) -> None:
    body = {"prompt": "If the", "n": 3, "seed": 5, "max_tokens": 8}
    texts = [[c["text"] for c in ask(model, PATH, body).json()["choices"]] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_the_default_length_shrinks_to_the_room_that_is_left() -> None:
    script = saying("x", context=10)
    ask(script, PATH, {"prompt": [5] * 8})
    assert script.answers[-1].request.max_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string_and_the_engine_is_told(stream: bool) -> None:
    script = saying("one two three four five six")
    answer = ask(script, PATH, {"prompt": "a", "stop": ["o thr", "six"], "stream": stream, "max_tokens": 50})
    if stream:
        chunks = [event["choices"][0] for event in events(answer)]
        assert "".join(chunk["text"] for chunk in chunks) == "one tw"
        assert [chunk["finish_reason"] for chunk in chunks][-1] == "stop"
    else:
        assert (choice(answer)["text"], choice(answer)["finish_reason"]) == ("one tw", "stop")
    assert script.answers[0].given_up.is_set()
    assert not script.answers[0].ended


def test_an_answer_of_full_length_says_so_and_gives_what_could_have_become_a_stop_string() -> None:
    answer = choice(ask(saying("one two three"), PATH, {"prompt": "a", "max_tokens": 3, "stop": "o three!"}))
    assert answer["finish_reason"] == "length"
    assert answer["text"] == tokenizer().decode(ids_of("one two three")[:3])


def test_a_stream_has_the_same_text_as_a_whole_answer_and_ends_with_usage(model: WholeModel) -> None:
    body: dict[str, Any] = {"prompt": ["If the", "The"], "seed": 3, "max_tokens": 9, "n": 2, "logprobs": 2}
    whole = ask(model, PATH, body).json()
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = events(ask(model, PATH, body | stream))
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for expected in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(part["text"] for part in mine) == expected["text"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [expected["finish_reason"]]
        for key, values in expected["logprobs"].items():
            assert [value for part in mine for value in part["logprobs"][key]] == values


def test_a_stream_gives_every_token_as_it_comes() -> None:
    chunks = events(ask(saying("one two three"), PATH, {"prompt": "a", "stream": True}))
    assert len(chunks) == len(ids_of("one two three")) + 1
    assert "usage" not in chunks[0]


def test_logprobs_have_openais_form() -> None:
    told = choice(ask(saying("so 🙂"), PATH, {"prompt": "a", "logprobs": 1}))["logprobs"]
    ids = [*ids_of("so 🙂"), END]
    assert told["tokens"][0] == "so"
    assert told["tokens"][-1] == "<|endoftext|>"
    assert any(token.startswith("bytes:\\x") for token in told["tokens"])
    assert told["token_logprobs"] == [-float(i) for i in range(1, len(ids) + 1)]
    assert told["top_logprobs"] == [{t: v} for t, v in zip(told["tokens"], told["token_logprobs"], strict=True)]
    assert told["text_offset"][0] == 0
    assert told["text_offset"][-1] == len("so 🙂")


def test_logprobs_end_with_the_text_at_a_stop_string() -> None:
    told = choice(ask(saying("one two three"), PATH, {"prompt": "a", "logprobs": 0, "stop": " two"}))["logprobs"]
    assert "".join(told["tokens"]) == "one"


def test_an_infinite_logprob_is_a_number_that_json_has() -> None:
    script = saying("x")
    script._prompt = lambda request: [None, *([_infinite()] * (len(request.prompt) - 1))]  # type: ignore[method-assign]
    told = choice(ask(script, PATH, {"prompt": "one two", "logprobs": 0, "echo": True}))["logprobs"]
    assert told["token_logprobs"][1] == -9999.0


def _infinite() -> Any:
    from isthmus.split.inference.request import Logprob

    return Logprob(float("-inf"))


@pytest.mark.parametrize("prompt", ["one two", ids_of("one two")])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_with_its_logprobs_before_the_answer(prompt: Any, stream: bool) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "stream": stream}
    answer = ask(saying(" done"), PATH, body)
    parts = [event["choices"][0] for event in events(answer)] if stream else [choice(answer)]
    assert "".join(part["text"] for part in parts) == "one two done"
    told = {key: [value for part in parts for value in part["logprobs"][key]] for key in parts[0]["logprobs"]}
    assert "".join(told["tokens"]) == "one two done<|endoftext|>"
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert None not in told["token_logprobs"][1:]
    text = "one two done"
    for token, offset in zip(told["tokens"][:-1], told["text_offset"], strict=False):
        assert text[offset:].startswith(token)


def test_echo_of_no_new_tokens_gives_the_prompt_alone(model: WholeModel) -> None:
    answer = ask(model, PATH, {"prompt": "one two", "echo": True, "logprobs": 1, "max_tokens": 0})
    assert choice(answer)["text"] == "one two"
    assert choice(answer)["finish_reason"] == "length"
    assert len(choice(answer)["logprobs"]["tokens"]) == len(ids_of("one two"))
    assert answer.json()["usage"]["completion_tokens"] == 0


def test_echo_of_half_a_character_is_completed_by_the_answer() -> None:
    ids = ids_of("🙂")
    answer = choice(ask(Script([*ids[1:], END]), PATH, {"prompt": ids[:1], "echo": True}))
    assert answer["text"] == "🙂"


def test_cached_tokens_are_told() -> None:
    script = saying("x")
    submit = script.submit

    def cached(request: Any) -> Any:
        answer = submit(request)
        answer.timing.cached_tokens = 1
        return answer

    script.submit = cached  # type: ignore[method-assign]
    usage = ask(script, PATH, {"prompt": ["a", "b"], "n": 2}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
