"""What the benchmarks of generation share: a served model in real processes, and whoever asks it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import AutoModelForCausalLM

from isthmus.coordinator.connection import Connection
from isthmus.coordinator.emulation.local_cluster import LocalCluster, submit
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import LinkLost
from isthmus.split.inference.serving import ServingConfig, parse_stages

NAME = "model"
_PATIENCE = 300.0  # seconds for devices to measure themselves


@dataclass
class Asked:
    """One answer as its reader saw it: text, and when each piece came, in seconds since the question."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def longest_gap(self) -> float:
        """Seconds without a piece, from the question on."""
        return max((later - earlier for earlier, later in pairwise([0.0, *self.times])), default=0.0)


@dataclass
class Served:
    connection: Connection
    job: str
    url: str

    async def ask(self, client: httpx2.AsyncClient, prompt: str | list[int], tokens: int) -> Asked:
        """Greedy, streamed, not ended before `tokens`."""
        body = {
            "model": NAME,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked, started = Asked(), time.perf_counter()
        async with client.stream("POST", f"{self.url}/completions", json=body, timeout=600) as response:
            if response.status_code != 200:
                raise LinkLost((await response.aread()).decode()[:300])
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data in (line, "[DONE]"):
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise LinkLost(str(event["error"]["message"]))
                asked.tokens = (event.get("usage") or {}).get("completion_tokens", asked.tokens)
                if event["choices"]:
                    asked.text += event["choices"][0]["text"]
                    asked.times.append(time.perf_counter() - started)
        return asked

    def ask_all(self, prompts: Sequence[str | list[int]], tokens: int) -> tuple[list[Asked], float]:
        """All at once; the answers, and seconds for all of them."""

        async def work() -> list[Asked]:
            limits = httpx2.Limits(max_connections=len(prompts) + 1)
            async with httpx2.AsyncClient(limits=limits) as client:
                return list(await asyncio.gather(*(self.ask(client, prompt, tokens) for prompt in prompts)))

        started = time.perf_counter()
        answers = asyncio.run(work())
        return answers, time.perf_counter() - started

    def stats(self) -> dict[str, Any]:
        result: dict[str, Any] = httpx2.get(f"{self.url}/stats", timeout=60).json()
        return result


def wait_measured(cluster: LocalCluster, devices: Sequence[str]) -> None:
    """Until these have told their speed and their link, and are quiet from then on. Raises LinkLost."""
    deadline = time.monotonic() + _PATIENCE
    with cluster.connect() as connection:
        while time.monotonic() < deadline:
            listed = connection.stub.ListDevices(pb.ListDevicesRequest()).devices
            missing = set(devices) - {one.name for one in listed if one.profile.HasField("link")}
            if not missing:
                return
            time.sleep(0.2)
    first = min(missing)
    raise LinkLost(f"{first} has not measured itself in {_PATIENCE:.0f} s: {cluster.last_line(first)}")


@contextmanager
def served(cluster: LocalCluster, model: str, stages: str, **settings: Any) -> Iterator[Served]:
    """A model, served until the end of the context."""
    config = ServingConfig(parse_stages(stages), NAME, **settings)
    spec = pb.JobSpec(method="serve", model=model, devices=config.devices, serving=config.to_json(), wait_seconds=120)
    with cluster.connect() as connection:
        job = submit(connection, spec).id
        url = ""
        for event in connection.stub.WatchJob(pb.WatchJobRequest(id=job), timeout=300):
            if event.HasField("serving"):
                url = event.serving.url
                break
        if not url:
            raise LinkLost(f"the model is not served: {connection.stub.GetJob(pb.JobRequest(id=job)).message}")
        try:
            yield Served(connection, job, url)
        finally:
            connection.stub.CancelJob(pb.JobRequest(id=job))


def whole_answers(folder: Path, prompts: Sequence[str], tokens: int, tokenizer: Any, ends: frozenset[int]) -> list[str]:
    """What plain transformers answers, one prompt at a time, up to an end token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
        )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts
