"""/v1/chat/completions: the template, messages of every form, logprobs with bytes, and the chunks of a stream."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from isthmus.coordinator.gateway import ServedModel, make_app
from tests.coordinator.gateway.generators import Script, ask, ids_of, saying, tokenizer
from tests.coordinator.gateway.test_completions import choice, events
from tests.split.inference.test_text import sentencepiece_like
from tests.split.tiny_models import make_tokenizer

PATH = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def test_messages_go_through_the_models_template() -> None:
    script = saying(" fine")
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "how"}, {"type": "text", "text": "are you"}]},
    ]
    answer = ask(script, PATH, {"messages": messages})
    expected = "system: be kind\n\nuser: how\nare you\n\nassistant:"
    assert tokenizer().decode(list(script.answers[0].request.prompt)) == expected
    assert choice(answer) == {
        "index": 0,
        "message": {"role": "assistant", "content": " fine", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert answer.json()["object"] == "chat.completion"
    assert answer.json()["usage"]["prompt_tokens"] == len(ids_of(expected))


def test_an_answer_may_fill_the_context_unless_a_length_is_asked_for() -> None:
    script = saying("x", context=40)
    ask(script, PATH, HELLO)
    ask(script, PATH, HELLO | {"max_tokens": 3})
    ask(script, PATH, HELLO | {"max_tokens": 9, "max_completion_tokens": 4})
    prompt = len(script.answers[0].request.prompt)
    assert [answer.request.max_tokens for answer in script.answers] == [40 - prompt, 3, 4]


def test_an_answer_can_be_sent_back_as_the_openai_client_has_it() -> None:
    sent: dict[str, Any] = {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "audio": None,
    }
    script = saying("x")
    ask(script, PATH, {"messages": [*HELLO["messages"], sent, {"role": "user", "content": "and?", "type": "text"}]})
    assert "assistant: hi" in str(tokenizer().decode(list(script.answers[0].request.prompt)))


def test_a_stream_opens_with_the_role_and_closes_with_the_reason() -> None:
    body = HELLO | {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, usage = events(ask(saying("one two"), PATH, body))
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in mine) == "one two"
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[-1]["delta"] == {}
    assert usage["usage"]["completion_tokens"] == 2 * (len(ids_of("one two")) + 1)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_the_bytes_of_every_token(stream: bool) -> None:
    answer = ask(saying("so 🙂"), PATH, HELLO | {"logprobs": True, "top_logprobs": 1, "stream": stream})
    told: list[dict[str, Any]] = []
    for part in [event["choices"][0] for event in events(answer)] if stream else [choice(answer)]:
        told += part["logprobs"]["content"] if part["logprobs"] else []
    assert b"".join(bytes(token["bytes"]) for token in told[:-1]).decode() == "so 🙂"
    assert told[-1]["token"] == "<|endoftext|>"
    assert told[0]["top_logprobs"] == [{"token": "so", "logprob": -1.0, "bytes": [115, 111]}]
    plain = choice(ask(saying("so"), PATH, HELLO | {"logprobs": True}))
    assert len(plain["logprobs"]["content"]) == len(ids_of("so")) + 1


def test_a_model_without_a_template_says_so_unless_one_is_given() -> None:
    async def both() -> list[httpx2.Response]:
        answers = []
        for template in (None, "{{ messages[0]['content'] }}?"):
            models = {"m": ServedModel(saying("x"), make_tokenizer())}
            app = make_app(models, key_sha256=None, chat_template=template)
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://g") as client:
                answers.append(await client.post(PATH, json={"model": "m"} | HELLO))
        return answers

    refused, answered = asyncio.run(both())
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "no_chat_template"
    assert answered.status_code == 200


def test_what_a_template_refuses_is_the_clients_error() -> None:
    async def refused() -> httpx2.Response:
        models = {"m": ServedModel(saying("x"), make_tokenizer())}
        app = make_app(models, key_sha256=None, chat_template="{{ raise_exception('roles must alternate') }}")
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://g") as client:
            return await client.post(PATH, json={"model": "m"} | HELLO)

    answer = asyncio.run(refused())
    assert answer.status_code == 400
    assert "roles must alternate" in answer.json()["error"]["message"]


def test_an_answer_in_a_chat_is_a_text_of_its_own() -> None:
    sentencepiece = sentencepiece_like()
    script = Script([6, 8, 2])  # ▁hello, a full stop, the end

    async def asked(path: str, body: dict[str, Any]) -> Any:
        app = make_app({"m": ServedModel(script, sentencepiece)}, key_sha256=None, chat_template="hello")
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://g") as client:
            return (await client.post(path, json={"model": "m"} | body)).json()["choices"][0]

    assert asyncio.run(asked(PATH, HELLO))["message"]["content"] == "hello."
    assert asyncio.run(asked("/v1/completions", {"prompt": [6]}))["text"] == " hello."
