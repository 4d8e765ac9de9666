"""One request at work: what is known of it, and what is due next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from torch import Tensor

from isthmus.split.errors import IsthmusError
from isthmus.split.inference.pace import Pace, shared_mean
from isthmus.split.inference.request import Logprob, Request, Timing, Token
from isthmus.split.inference.sampling import Chooser, logprob_of


class AnswerState:
    """What the engine knows of one request, and what is due next. To whoever asked it is an `Answer`."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.drafts: list[int] = []  # guesses at what follows, which are verified with the next batch
        self.sequence = -1
        self.goal = len(request.prompt)  # tokens that are read before the next one is chosen
        self.long = False  # as in Row
        self.fed = 0  # tokens whose keys and values are in the first span
        self.sent = 0  # of these, in the other spans, too
        self.owed: list[Tensor] = []  # what the first span made of the others, each (tokens, hidden)
        self.choose = Chooser(request.sampling)
        self.pace = Pace(shared_mean())
        self.timing = Timing(prompt_tokens=len(request.prompt))
        self.cancelled = False
        self._came = time.perf_counter()
        self._out: asyncio.Queue[Token | IsthmusError | None] = asyncio.Queue()
        self._prompt_logprobs: list[Logprob | None] = [None]
        self._prompt_known: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._all()

    async def prompt_logprobs(self) -> list[Logprob | None]:
        await asyncio.shield(self._prompt_known)
        return self._prompt_logprobs

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def prefilling(self) -> bool:
        return self.fed < self.goal

    @property
    def wants_prompt(self) -> bool:
        return self.request.prompt_logprobs and not self._prompt_known.done()

    @property
    def place(self) -> int:
        """Number of the answer's tokens so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Number of tokens that the answer may still have."""
        return self.request.max_tokens - self.place

    def prefilled(self, count: int, logits: Tensor) -> bool:
        """Take in the logits of the next `count` tokens of the prompt. Returns whether the request has ended.

        logits: (tokens, vocabulary), after each of these tokens if the prompt's logprobs are wanted, else after the
        last one.
        """
        self.fed += count
        self.sent = self.fed
        if self.wants_prompt:
            self._hear_prompt(logits)
        if self.prefilling:
            return False
        if self.wants_prompt:
            self._prompt_known.set_result(None)
        return self.request.max_tokens == 0 or self.decoded(logits[-1:])

    def decoded(self, logits: Tensor) -> bool:
        """Choose the next tokens, of which at least one comes. Returns whether the answer has ended.

        logits: (1 + drafts, vocabulary), after the token that was due and after each draft. Tokens are chosen as if
        there were no drafts, up to the first that the drafts did not foresee: drafts change how soon a token comes, and
        never which.
        """
        drafts, self.drafts = self.drafts, []
        right = 0
        for right, row in enumerate(logits):
            token = self._next(row)
            if token.last:
                break
            if right == len(drafts) or drafts[right] != token.id:
                break
        if drafts:
            self.timing.drafted += len(drafts)
            self.timing.accepted += right
            self.pace.heard(right, right < len(drafts) and not token.last)
        self.fed = len(self.tokens) - 1
        return bool(token.last)

    def read_again(self) -> None:
        """Forget all that was computed: the text has become long, and its keys are rotated by other frequencies."""
        self.goal, self.long = len(self.tokens), True
        self.fed = self.sent = 0
        self.owed.clear()

    def caught_up(self) -> None:
        """Note that all fed tokens have gone through all spans."""
        self.sent = self.fed
        self.owed.clear()

    def end(self, error: IsthmusError | None = None) -> None:
        """End the answer for whoever reads it, with an error if there is one."""
        self.timing.total = time.perf_counter() - self._came
        if not self._prompt_known.done():
            if error is None:
                self._prompt_known.set_result(None)
            else:
                self._prompt_known.set_exception(error)
                self._prompt_known.exception()  # it may be that nobody asks
        self._out.put_nowait(error)

    def _hear_prompt(self, logits: Tensor) -> None:
        first = self.fed - len(logits)
        for place, row in enumerate(logits, start=first + 1):
            if place < len(self.request.prompt):
                self._prompt_logprobs.append(logprob_of(row, self.request.prompt[place], self.request.logprobs or 0))

    def _next(self, logits: Tensor) -> Token:
        place = self.place
        id = self.choose(logits, place)
        self.tokens.append(id)
        if not place:
            self.timing.first_token = time.perf_counter() - self._came
        self.timing.tokens = place + 1
        last = "stop" if id in self.request.stop_tokens else ""
        if not last and place + 1 == self.request.max_tokens:
            last = "length"
        asked = self.request.logprobs
        token = Token(id, None if asked is None else logprob_of(logits, id, asked), last)
        self._out.put_nowait(token)
        return token

    async def _all(self) -> AsyncIterator[Token]:
        while (token := await self._out.get()) is not None:
            if isinstance(token, IsthmusError):
                raise token
            yield token


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two sequences have in common at their beginning.

    The count is found by halving, since long texts are compared at every token.
    """
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if list(one[same:middle]) == list(other[same:middle]):
            same = middle
        else:
            most = middle - 1
    return same
