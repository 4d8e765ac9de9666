"""The project's own engine behind the API gives the answers and the logprobs of the whole model."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from isthmus.coordinator.gateway import make_app
from isthmus.split.inference.local import local_engine
from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER
from isthmus.split.models.source import open_model
from tests.coordinator.gateway.generators import WholeModel, ask, ids_of, served_model

TEXTS = ["If the value of the", "Rivers carry sand and", "def f(x):\n", "🙂"]


async def post(body: dict[str, Any]) -> httpx2.Response:
    async with await local_engine(open_model("default"), cuts=(2, 4), context=64, sequences=3) as engine:
        app = make_app({"m": served_model(engine)}, key_sha256=None)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://g") as client:
            return await client.post("/v1/completions", json={"model": "m"} | body)


def test_answers_logprobs_and_echo_are_those_of_the_whole_model() -> None:
    body = {
        "prompt": [ids_of(text) for text in TEXTS],
        "temperature": 0,
        "max_tokens": 6,
        "logprobs": 2,
        "seed": 1,
        "echo": True,
    }
    mine = asyncio.run(post(body)).json()
    whole = ask(WholeModel(DEFAULT_MODEL_FOLDER, context=64), "/v1/completions", body).json()
    assert len(mine["choices"]) == len(TEXTS)
    for one, other in zip(mine["choices"], whole["choices"], strict=True):
        assert one["text"] == other["text"]
        assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
        assert one["logprobs"]["text_offset"] == other["logprobs"]["text_offset"]
        assert one["logprobs"]["token_logprobs"][1:] == pytest.approx(other["logprobs"]["token_logprobs"][1:], abs=1e-3)
    assert mine["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {"prompt_tokens_details": None}
