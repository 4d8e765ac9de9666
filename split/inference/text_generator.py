"""Text from an engine in this process: prompts in, the text of the answers out as it comes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from isthmus.split.inference.engine import Engine
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.inference.text import TextStream
from isthmus.split.terminal import AnswerOptions, AnswerStats, hops_between


@dataclass(frozen=True)
class TextGenerator:
    """A started engine together with what its model's text is made of.

    end_tokens: ids that end an answer. adapter: number of the adapter, as in `Request`.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    end_tokens: frozenset[int]
    adapter: int = 0

    async def answer(
        self, ids: Sequence[int], options: AnswerOptions, stats: AnswerStats, *, continues: bool
    ) -> AsyncIterator[str]:
        """Generate the text that follows a prompt, piece by piece, and fill in `stats` at the end.

        ids: token ids of the prompt. continues: whether the answer is the rest of the prompt's own text.
        """
        sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
        room = self.engine.context - len(ids)
        length = min(options.max_tokens or room, max(1, room))
        request = Request(tuple(ids), length, sampling, stop_tokens=self.end_tokens, adapter=self.adapter)
        before = self.engine.stats()
        started = time.perf_counter()
        answer = self.engine.submit(request)
        text = TextStream(self.tokenizer, options.stop, after=ids if continues else ())
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
            setattr(stats, name, getattr(timing, name))
        stats.hops = hops_between(before["hops"], self.engine.stats()["hops"])
