"""Every refusal is one line in OpenAI's form, and names the parameter; nothing that is sent makes the gateway fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.coordinator.gateway import make_app
from isthmus.split.errors import BadRequest, IsthmusError, LinkLost, NotFound
from isthmus.split.inference.request import Busy
from tests.coordinator.gateway.generators import ask, forever, saying, served_model, sha256_of
from tests.examples import examples

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def fault(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": 2.1}, {"temperature": "hot"}, {"temperature": True}, {"top_p": 0},
        {"top_p": 1.5}, {"top_k": -2}, {"top_k": 1.5}, {"seed": "x"}, {"seed": 2**70}, {"n": 0}, {"n": 1000},
        {"max_tokens": -1}, {"max_tokens": 1.5}, {"stop": ["a"] * 17}, {"stop": ""}, {"stop": [1]},
        {"stop": "a" * 1001}, {"stream": "yes"}, {"stream_options": {"include_usage": True}},
        {"presence_penalty": 0.1}, {"frequency_penalty": -1}, {"logit_bias": {"5": 1}}, {"magic": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_wrong_or_unsupported_parameter_is_named(path: str, wrong: dict[str, Any]) -> None:
    rest: dict[str, Any] = {"prompt": "a"} if path == COMPLETIONS else {"messages": HELLO}
    error = fault(ask(saying("x"), path, rest | wrong), 400)
    (name,) = wrong
    assert error["param"].startswith(name)
    assert name in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": None}, {"prompt": []}, {"prompt": [[]]}, {"prompt": ""}, {"prompt": [1, "a"]}, {"prompt": [-1]},
        {"prompt": [10**9]}, {"prompt": [4096]}, {"prompt": {"a": 1}}, {"prompt": ["a"] * 200}, {"logprobs": 21},
        {"logprobs": True}, {"best_of": 2}, {"suffix": "b"}, {"echo": 1}, {"max_completion_tokens": 4},
    ],
)  # fmt: skip
def test_a_wrong_parameter_of_a_completion_is_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    error = fault(ask(saying("x"), COMPLETIONS, {"prompt": "a"} | wrong), 400)
    assert error["param"].startswith(name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []}, {"messages": "hi"}, {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        {"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"functions": [{"name": "f"}]},
        {"response_format": {"type": "json_object"}}, {"top_logprobs": 2}, {"logprobs": 1}, {"max_tokens": 0},
        {"max_completion_tokens": 0}, {"audio": {}}, {"modalities": ["audio"]}, {"reasoning_effort": "low"},
        {"web_search_options": {}}, {"prediction": {"type": "content"}}, {"echo": True},
    ],
)  # fmt: skip
def test_a_wrong_parameter_of_a_chat_is_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    error = fault(ask(saying("x"), CHAT, {"messages": HELLO} | wrong), 400)
    assert error["param"].startswith(name)


def test_one_request_may_not_have_too_many_answers() -> None:
    script = saying("x")
    assert fault(ask(script, COMPLETIONS, {"prompt": ["a", "b"], "n": 100}), 400)["param"] == "n"
    assert not script.answers


def test_a_million_faults_are_told_as_one() -> None:
    for body in (
        b'"messages":[' + b"1," * 500_000 + b"1]",
        b'"messages":[],"k' + b'":1,"k'.join([b"1"] * 1000) + b'":1',
    ):
        error = fault(ask(saying("x"), CHAT, b'{"model":"m",' + body + b"}"), 400)
        assert len(error["message"]) <= 500


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_changes_nothing_is_accepted(path: str) -> None:
    harmless: dict[str, Any] = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "presence_penalty": 0,
        "frequency_penalty": 0.0, "logit_bias": {}, "stop": None, "n": None, "seed": None, "logprobs": None,
        "stream": False, "stream_options": None, "temperature": None, "top_p": None, "top_k": -1, "max_tokens": None,
    }  # fmt: skip
    if path == CHAT:
        harmless |= {
            "messages": HELLO, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
            "modalities": ["text"], "parallel_tool_calls": True,
        }  # fmt: skip
    else:
        harmless |= {"prompt": "a", "best_of": 1, "suffix": None, "echo": False}
    answer = ask(saying("x"), path, harmless)
    assert answer.status_code == 200, answer.text


def test_a_missing_parameter_is_named() -> None:
    assert fault(ask(saying("x"), COMPLETIONS, {}), 400)["param"] == "prompt"
    assert fault(ask(saying("x"), CHAT, {}), 400)["param"] == "messages"
    assert fault(ask(saying("x"), CHAT, b"{}"), 400)["param"] == "model"


def test_the_place_in_a_list_is_told() -> None:
    wrong = {"messages": [*HELLO, {"role": "king", "content": "x"}]}
    assert fault(ask(saying("x"), CHAT, wrong), 400)["param"] == "messages[1].role"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "\xff"}', b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "m", "prompt": "\\udfff"}', b'{"model": "m", "prompt": NaN}', b"[" * 100000,
        b'{"model": "m", "prompt": "a", "temperature": Infinity}', b'{"model": "m", "prompt": "a", "seed": 1e999}',
        b'{"model": "m", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_body_that_is_no_request_is_refused(path: str, body: bytes) -> None:
    fault(ask(saying("x"), path, body), 400)


def test_an_unknown_model_is_not_found() -> None:
    error = fault(ask(saying("x"), COMPLETIONS, {"model": "gpt-5", "prompt": "a"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_more_than_the_context_is_refused_and_the_numbers_are_told() -> None:
    script = saying("x", context=10)
    for asked in ({"prompt": [5] * 10}, {"prompt": [5] * 6, "max_tokens": 5}, {"prompt": [5] * 11, "max_tokens": 0}):
        error = fault(ask(script, COMPLETIONS, asked), 400)
        assert error["code"] == "context_length_exceeded"
        assert "10 tokens" in error["message"]
    assert fault(ask(script, CHAT, {"messages": HELLO * 9}), 400)["code"] == "context_length_exceeded"
    assert not script.answers


@pytest.mark.parametrize(
    ("error", "status", "type_"),
    [
        (Busy("32 requests wait", 2.5), 429, "rate_limit_error"),
        (BadRequest("the prompt does not fit"), 400, "invalid_request_error"),
        (NotFound("no adapter x"), 404, "invalid_request_error"),
        (LinkLost("device edge went away"), 503, "server_error"),
        (IsthmusError("out of memory"), 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine_has_its_status_also_when_a_stream_was_asked_for(
    error: Exception, status: int, type_: str, stream: bool
) -> None:
    answer = ask(saying("x", refuse=error), COMPLETIONS, {"prompt": "a", "stream": stream})
    assert fault(answer, status) == {
        "message": str(error), "type": type_, "param": None, "code": "rate_limit_exceeded" if status == 429 else None,
    }  # fmt: skip
    assert answer.headers.get("retry-after") == ("3" if status == 429 else None)


@pytest.mark.parametrize("asked", [{"n": 7}, {"prompt": ["a", "b", "c", "d"], "n": 2}, {"prompt": ["a"] * 7}])
def test_more_answers_than_could_ever_wait_are_refused_with_the_limit(asked: dict[str, Any]) -> None:
    script = saying("x", capacity=6)
    error = fault(ask(script, COMPLETIONS, {"prompt": "a"} | asked), 400)
    assert "answers are more than the 6 that one request may ask for" in error["message"]
    assert error["param"] == "n"
    assert not script.answers
    assert ask(script, COMPLETIONS, {"prompt": ["a", "b"], "n": 3}).status_code == 200


def test_requests_are_known_by_address_and_user() -> None:
    script = saying("x")
    for user in ({}, {"user": "ann"}, {"user": "ann"}, {"user": 5}):
        ask(script, COMPLETIONS, {"prompt": "a"} | user)
    ask(script, CHAT, {"messages": HELLO, "user": "ann"})
    address, ann, *others = [answer.request.client for answer in script.answers]
    assert address
    assert ann == f"{address}/ann"
    assert others == [ann, address, ann]


async def lost() -> None:
    raise LinkLost("device edge went away")


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    script = saying("one", after=lost)
    answer = ask(script, COMPLETIONS, {"prompt": "a", "stream": True, "max_tokens": 9})
    *_, last, nothing = answer.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "device edge went away"
    assert nothing == ""
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_when_one_answer_fails_the_others_are_given_up(stream: bool) -> None:
    script = saying("one", after=forever)
    submit = script.submit

    def second_fails(request: Any) -> Any:
        script.after = forever if not script.answers else lost
        return submit(request)

    script.submit = second_fails  # type: ignore[method-assign]
    ask(script, COMPLETIONS, {"prompt": "a", "n": 2, "max_tokens": 9, "stream": stream})
    assert [answer.given_up.is_set() for answer in script.answers] == [True, True]


def test_when_the_queue_is_full_for_the_second_answer_the_first_is_given_up() -> None:
    script = saying("one")
    submit = script.submit

    def full(request: Any) -> Any:
        if script.answers:
            raise Busy("full", 0)
        return submit(request)

    script.submit = full  # type: ignore[method-assign]
    assert ask(script, COMPLETIONS, {"prompt": "a", "n": 2}).headers["retry-after"] == "1"
    assert script.answers[0].given_up.is_set()


def test_a_bug_is_answered_without_a_word_of_it() -> None:
    async def sent() -> httpx2.Response:
        app = make_app({"m": served_model(saying("x", refuse=KeyError("a secret")))}, key_sha256=None)
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://g") as client:
            return await client.post(COMPLETIONS, json={"model": "m", "prompt": "a"})

    assert "secret" not in fault(asyncio.run(sent()), 500)["message"]


def test_a_body_that_is_too_large_is_refused_whether_or_not_its_length_is_told() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(100):
            sent.append(1)
            yield b" " * 1000

    sent: list[int] = []

    async def both() -> list[httpx2.Response]:
        app = make_app({"m": served_model(saying("x"))}, key_sha256=None, max_body=5000)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://g") as client:
            return [await client.post(CHAT, content=b" " * 5001), await client.post(CHAT, content=parts())]

    for answer in asyncio.run(both()):
        assert fault(answer, 413)["code"] == "body_too_large"
    assert len(sent) < 100


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic secret", "secret", "Bearer ", "Bearer sécret"])
def test_a_wrong_key_is_refused_everywhere_but_for_the_health(header: str | None) -> None:
    async def sent() -> list[httpx2.Response]:
        app = make_app({"m": served_model(saying("x"))}, key_sha256=sha256_of("secret"))
        headers = {} if header is None else {b"Authorization": header.encode("latin-1")}
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://g") as client:
            answers = [
                await client.get("/v1/models", headers=headers),
                await client.get("/v1/models/m", headers=headers),
            ]
            answers += [await client.post(path, content=b"{", headers=headers) for path in (COMPLETIONS, CHAT)]
            return [*answers, await client.get("/health", headers=headers)]

    *refused, health = asyncio.run(sent())
    for answer in refused:
        assert fault(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert health.json() == {"status": "ok"}


def test_a_key_may_have_any_characters() -> None:
    async def status(key: str) -> int:
        app = make_app({}, key_sha256=sha256_of("schlüssel"))
        headers = {b"Authorization": f"Bearer {key}".encode()}
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://g") as client:
            return (await client.get("/v1/models", headers=headers)).status_code

    assert [asyncio.run(status(key)) for key in ("schlüssel", "schluessel")] == [200, 401]


def test_an_unknown_address_or_method_has_the_same_form() -> None:
    async def sent() -> list[httpx2.Response]:
        app = make_app({}, key_sha256=None)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://g") as client:
            return [await client.get("/v1/nothing"), await client.get(CHAT), await client.get("/docs")]

    nothing, method, docs = asyncio.run(sent())
    fault(nothing, 404)
    fault(method, 405)
    fault(docs, 404)


NAMES = (
    "model", "prompt", "messages", "stop", "n", "stream", "stream_options", "temperature", "logprobs", "echo", "seed",
    "max_tokens", "top_logprobs", "tools", "response_format", "logit_bias", "top_p", "top_k", "user", "x",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5000) | st.floats() | st.text(max_size=8) | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "king"]), "content": JSON | st.text(max_size=5)},
        optional={"name": JSON, "tool_calls": JSON},
    ),
    max_size=3,
)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@settings(max_examples=examples(300), deadline=None)
@given(
    body=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6),
    model=st.just("m") | JSON,
    prompt=st.text(max_size=5) | st.lists(st.integers(0, 4100), max_size=5) | JSON,
    messages=MESSAGES | JSON,
)
def test_no_json_makes_it_fail(path: str, body: dict[str, Any], model: Any, prompt: Any, messages: Any) -> None:
    request = body | {"model": model} | ({"prompt": prompt} if path == COMPLETIONS else {"messages": messages})
    answer = ask(saying("hello"), path, json.dumps(request).encode())  # raises what is not answered
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        fault(answer, answer.status_code)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@settings(max_examples=examples(200), deadline=None)
@given(body=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: f'{{"model":"m","prompt":{text}'.encode()))
def test_no_bytes_make_it_fail(path: str, body: bytes) -> None:
    fault(ask(saying("hello"), path, body), 400)
