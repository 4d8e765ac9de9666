"""The unmodified `openai` client, over real sockets, with a model that really computes."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from isthmus.split.errors import LinkLost
from isthmus.split.inference.request import Busy
from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER
from tests.coordinator.gateway.generators import Script, WholeModel, forever, ids_of, openai_client, saying, tokenizer

HELLO: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "What is a stream?"}]


@pytest.fixture(scope="module")
def model() -> WholeModel:
    return WholeModel(DEFAULT_MODEL_FOLDER, context=96)


def test_models_are_listed_and_found() -> None:
    async def use() -> None:
        async with openai_client(saying("x")) as client:
            (listed,) = [found async for found in client.models.list()]
            assert (listed.id, listed.owned_by, listed.created) == ("m", "isthmus", 1700000000)
            assert (await client.models.retrieve("m")).id == "m"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("org/other")

    asyncio.run(use())


def test_completions(model: WholeModel) -> None:
    async def use() -> None:
        async with openai_client(model) as client:
            asked: dict[str, Any] = {"model": "m", "prompt": "If the file", "temperature": 0, "max_tokens": 12}
            whole = await client.completions.create(**asked, logprobs=3)
            stream = await client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
            text = whole.choices[0].text
            assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
            assert chunks[-1].usage == whole.usage
            told = whole.choices[0].logprobs
            assert told is not None
            assert told.tokens is not None
            assert told.top_logprobs is not None
            assert "".join(told.tokens) == text
            assert all(
                max(top, key=lambda t: top[t]) == t for top, t in zip(told.top_logprobs, told.tokens, strict=True)
            )
            several = await client.completions.create(model="m", prompt=["a", "b"], n=2, seed=1, max_tokens=3)
            assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
            stop = text[len(text) // 2 :][:3]
            stopped = await client.completions.create(**asked, stop=[stop])
            assert stopped.choices[0].text == text[: text.index(stop)]
            assert stopped.choices[0].finish_reason == "stop"

    asyncio.run(use())


def test_chat(model: WholeModel) -> None:
    async def use() -> None:
        async with openai_client(model) as client:
            asked: dict[str, Any] = {"model": "m", "messages": HELLO, "seed": 4, "max_completion_tokens": 10}
            whole = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
            stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
            text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
            assert text == whole.choices[0].message.content
            assert chunks[0].choices[0].delta.role == "assistant"
            assert chunks[-1].usage == whole.usage
            told = whole.choices[0].logprobs
            assert told is not None
            assert told.content is not None
            assert len(told.content) == 10
            assert all(len(token.top_logprobs) == 2 for token in told.content)
            again = await client.chat.completions.create(
                **(asked | {"messages": [*HELLO, whole.choices[0].message.model_dump(), *HELLO]})
            )
            assert again.choices[0].finish_reason == "length"

    asyncio.run(use())


def test_errors_are_the_clients_own() -> None:
    async def raised(error: Exception | None, **asked: Any) -> openai.APIStatusError:
        async with openai_client(saying("x", refuse=error)) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(**({"model": "m", "messages": HELLO} | asked))
            return caught.value

    def error_of(error: Exception | None = None, **asked: Any) -> openai.APIStatusError:
        return asyncio.run(raised(error, **asked))

    refused = error_of(tools=[{"type": "function", "function": {"name": "f"}}])
    assert isinstance(refused, openai.BadRequestError)
    assert (refused.param, refused.code) == ("tools", "unsupported_parameter")
    assert isinstance(error_of(model="other"), openai.NotFoundError)
    busy = error_of(Busy("32 requests wait", 4))
    assert isinstance(busy, openai.RateLimitError)
    assert busy.response.headers["retry-after"] == "4"
    assert isinstance(error_of(LinkLost("away")), openai.InternalServerError)


def test_a_wrong_key_is_an_authentication_error() -> None:
    async def use() -> None:
        async with openai_client(saying("x"), key="right") as client:
            assert (await client.models.list()).data
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="wrong").models.list()

    asyncio.run(use())


def test_an_error_in_a_stream_is_raised_by_the_client() -> None:
    async def lost() -> None:
        raise LinkLost("device edge went away")

    async def use() -> str:
        async with openai_client(Script(ids_of("one")[:1], after=lost)) as client:
            stream = aiter(await client.completions.create(model="m", prompt="a", stream=True))
            text = (await anext(stream)).choices[0].text
            with pytest.raises(openai.APIError, match="device edge went away"):
                await anext(stream)
        return text

    assert asyncio.run(use()) == tokenizer().decode(ids_of("one")[:1])


def test_a_stream_that_the_client_leaves_is_given_up_by_the_engine() -> None:
    script = saying("one two three", after=forever)

    async def use() -> None:
        async with openai_client(script) as client:
            stream = await client.completions.create(model="m", prompt="a", stream=True, n=2)
            await anext(aiter(stream))
            await stream.close()
            for answer in script.answers:
                await asyncio.wait_for(answer.given_up.wait(), 10)

    asyncio.run(use())
    assert len(script.answers) == 2
    assert not any(answer.ended for answer in script.answers)


def test_an_answer_that_the_client_does_not_wait_for_is_given_up_by_the_engine() -> None:
    script = saying("one", after=forever)

    async def use(client: AsyncOpenAI) -> None:
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=3).completions.create(model="m", prompt="a", max_tokens=9)
        await asyncio.wait_for(script.answers[0].given_up.wait(), 10)

    async def run() -> None:
        async with openai_client(script) as client:
            await use(client)

    asyncio.run(run())
    assert not script.answers[0].ended


def test_many_at_once_each_get_their_own(model: WholeModel) -> None:
    async def use() -> list[str]:
        async with openai_client(model) as client:
            asked: list[dict[str, Any]] = [{"prompt": f"Line {i}: the", "seed": i} for i in range(8)]
            together = [client.completions.create(model="m", max_tokens=6, **one) for one in asked]
            texts = [answer.choices[0].text for answer in await asyncio.gather(*together)]
            for one, text in zip(asked, texts, strict=True):
                alone = await client.completions.create(model="m", max_tokens=6, **one)
                assert alone.choices[0].text == text
            return texts

    assert len(set(asyncio.run(use()))) > 1
