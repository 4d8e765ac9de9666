"""An engine that is started, with its tokenizer: text in, and the text of the answer as it comes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from isthmus.split.inference.engine import Engine
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.inference.text import TextStream
from isthmus.split.terminal import Asking, Stat, hops_between


@dataclass(frozen=True)
class TextEngine:
    """An engine that is started, and what its model's text is made of."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]  # tokens that end an answer
    adapter: int = 0  # as in Request

    async def answer(self, ids: Sequence[int], asking: Asking, stat: Stat, *, continues: bool) -> AsyncIterator[str]:
        """The answer's text as it comes; then `stat` is filled in. continues: the answer goes on the prompt's text."""
        sampling = Sampling(asking.temperature, asking.top_p, asking.top_k, asking.seed)
        room = self.engine.context - len(ids)
        length = min(asking.max_tokens or room, max(1, room))
        request = Request(tuple(ids), length, sampling, stop_tokens=self.ends, adapter=self.adapter)
        before = self.engine.stats()
        started = time.perf_counter()
        answer = self.engine.submit(request)
        text = TextStream(self.tokenizer, asking.stop, after=ids if continues else ())
        try:
            async for token in answer:
                yield text.push(token.id)
                if text.stopped:
                    break
            yield text.finish()
        finally:
            answer.cancel()
        timing = answer.timing
        timing.total = timing.total or time.perf_counter() - started  # a stop text came before the answer's own end
        for name in ("first_token", "total", "tokens", "prompt_tokens", "rounds", "drafted", "accepted", "exited"):
            setattr(stat, name, getattr(timing, name))
        stat.hops = hops_between(before["hops"], self.engine.stats()["hops"])
