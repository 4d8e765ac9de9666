"""Drafts over a link: how many tokens a device that is the user gets for each time it asks the rest of the chain.

The default model; the device has embedding, head and the first half of the blocks, the coordinator the other half. Real
text that the model has not been trained on is continued, one answer at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from benchmarks.early_exit import ANSWER, prompts_of
from benchmarks.serving import served
from isthmus.client.generate import Found, find, start
from isthmus.client.identity import Identity
from isthmus.coordinator.emulation.local_cluster import LocalCluster
from isthmus.split.data.stdlib_text import PRIVATE_MODULES, private_text
from isthmus.split.errors import NotEnrolled
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.models.source import open_model
from isthmus.split.runtime.choose import RuntimeChoice

DRAFTS = ("none", "lookup", "early")
TEMPERATURES = (0.0, 0.8)
_PASSAGES = 6


def measure(
    cluster: LocalCluster, device: str, choice: RuntimeChoice, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """By temperature and draft, for each round: tokens a second after the first, and tokens for each round trip."""
    source = open_model("default")
    layers = source.config.num_hidden_layers
    prompts = prompts_of(private_text(PRIVATE_MODULES), source, _PASSAGES)
    figures: dict[str, list[dict[str, float]]] = {}
    with served(cluster, "default", f"{device}:0-{layers // 2},cloud:{layers // 2}-{layers}"):
        identity = Identity.open(cluster.folder / device)
        if identity is None:
            raise NotEnrolled(f"device {device} has no identity in {cluster.folder}")
        found = find(identity)
        for _ in range(rounds):
            for temperature in TEMPERATURES:
                for draft in DRAFTS:
                    one = asyncio.run(_answers(identity, found, choice, draft, prompts, temperature))
                    figures.setdefault(f"temperature {temperature:g}, {draft}", []).append(one)
    return figures


async def _answers(
    identity: Identity,
    found: Found,
    choice: RuntimeChoice,
    draft: str,
    prompts: Sequence[tuple[int, ...]],
    temperature: float,
) -> dict[str, float]:
    seconds, tokens, rounds = 0.0, 0, 0
    async with start(identity, found, choice, draft=draft) as asked:
        for seed, prompt in enumerate([prompts[0], *prompts]):
            answer = asked.engine.submit(Request(prompt, ANSWER, Sampling(temperature, seed=seed)))
            async for _ in answer:
                pass
            if seed:  # the first answer warms up
                seconds += answer.timing.total - answer.timing.first_token
                tokens += answer.timing.tokens - 1
                rounds += answer.timing.rounds
    return {"decode": tokens / seconds, "tokens_per_round_trip": tokens / rounds}
