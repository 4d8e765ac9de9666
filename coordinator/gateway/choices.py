"""The answers that one HTTP request asks for, from token ids to text with logprobs, all of them at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from isthmus.coordinator.gateway.models import ServedModel
from isthmus.split.errors import IsthmusError
from isthmus.split.inference.engine import Answer
from isthmus.split.inference.request import Logprob, Request
from isthmus.split.inference.text import TextStream


@dataclass(frozen=True)
class Choice:
    """One of the answers that an HTTP request asks for.

    echo: the prompt's text, which comes before the answer; None: not at all. continues: whether the answer goes on the
    prompt's text; otherwise it is a text of its own (see TextStream).
    """

    request: Request
    stop: Sequence[str]
    echo: str | None = None
    continues: bool = True


@dataclass(frozen=True)
class Scored:
    """A token whose logprobs are told. offset: the number of characters of the choice's text before it."""

    id: int
    offset: int
    logprob: Logprob | None


@dataclass(frozen=True)
class ChoiceDelta:
    """What is new of a choice. finish: `stop` or `length` in the last one."""

    text: str = ""
    tokens: tuple[Scored, ...] = ()
    finish: str | None = None


@dataclass
class Usage:
    """Numbers of tokens of a whole HTTP request; complete when its answers are."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class ChoiceSet:
    """All choices of an HTTP request: n for each prompt, those of a prompt beside each other."""

    model: ServedModel
    choices: Sequence[Choice]
    n: int
    usage: Usage = field(default_factory=Usage)

    async def run(self) -> AsyncGenerator[tuple[int, ChoiceDelta]]:
        """Generate each choice's deltas in their order, with its index. However this ends, no answer goes on
        after it.
        """
        answers: list[Answer] = []
        self.usage.prompt = sum(len(choice.request.prompt) for choice in self.choices[:: self.n])
        try:
            for choice in self.choices:
                answers.append(self.model.generator.submit(choice.request))  # noqa: PERF401 (the second may fail)
            streams = [self._deltas(*pair) for pair in zip(self.choices, answers, strict=True)]
            async with aclosing(merge(streams)) as merged:
                async for item in merged:
                    yield item
            self.usage.cached = sum(answer.timing.cached_tokens for answer in answers[:: self.n])
        finally:
            for answer in answers:
                answer.cancel()

    async def _deltas(self, choice: Choice, answer: Answer) -> AsyncIterator[ChoiceDelta]:
        request = choice.request
        text = TextStream(self.model.tokenizer, choice.stop, after=request.prompt if choice.continues else ())
        begin = 0
        if choice.echo is not None:
            begin = len(choice.echo)
            scored = await answer.prompt_logprobs() if request.prompt_logprobs else None
            yield ChoiceDelta(choice.echo, self._prompt_tokens(request, scored, begin) if scored else ())
        end = begin  # of the text that was given out
        waiting: list[Scored] = []  # tokens of which nothing was given out yet
        finish: str | None = None
        async for token in answer:
            self.usage.completion += 1
            if request.logprobs is not None:
                waiting.append(Scored(token.id, begin + text.length, token.logprob))
            new = "" if token.last == "stop" else text.push(token.id)
            if token.last:
                new += text.finish()
            end += len(new)
            finish = "stop" if text.stopped else token.last or None
            everything = finish is not None and not text.stopped
            ready = [scored for scored in waiting if everything or scored.offset < end]
            waiting = waiting[len(ready) :]
            if new or ready or finish:
                yield ChoiceDelta(new, tuple(ready), finish)
            if finish:
                answer.cancel()
                return
        if request.max_tokens:
            raise IsthmusError("the answer broke off; try again")
        yield ChoiceDelta(finish="length")

    def _prompt_tokens(self, request: Request, scored: Sequence[Logprob | None], end: int) -> tuple[Scored, ...]:
        text = TextStream(self.model.tokenizer)
        tokens = []
        for id, logprob in zip(request.prompt, scored, strict=True):
            tokens.append(Scored(id, min(text.length, end), logprob))
            text.push(id)
        return tuple(tokens)


async def merge(streams: Sequence[AsyncIterator[ChoiceDelta]]) -> AsyncGenerator[tuple[int, ChoiceDelta]]:
    """Give what any of the streams gives, as soon as it does, with its index; an error in one ends all."""
    arrived: asyncio.Queue[tuple[int, ChoiceDelta | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[ChoiceDelta]) -> None:
        try:
            async for delta in stream:
                arrived.put_nowait((index, delta))
            arrived.put_nowait((index, None))
        except Exception as error:  # noqa: BLE001 (raised again below)
            arrived.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    going = len(tasks)
    try:
        while going:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                going -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
