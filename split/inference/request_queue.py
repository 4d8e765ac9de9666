"""Requests that wait for a sequence of the chain, in the order in which they get one."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from isthmus.split.inference.answer_state import AnswerState


class RequestQueue:
    """A fair queue: clients take turns, one with many requests like one with few; each one's own stay in their order.

    The number of a client's last admission is remembered while the client has a request here or at work.
    """

    def __init__(self) -> None:
        self._waiting: deque[AnswerState] = deque()
        self._turns: dict[str, float] = {}  # by client
        self._admitted = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[AnswerState]:
        return iter(self._waiting)

    def push(self, answer: AnswerState) -> None:
        """Append a request. A new client's turn comes after those that wait and before who had a turn just now."""
        self._turns.setdefault(answer.request.client, self._admitted - 0.5)
        self._waiting.append(answer)

    def pop(self, at_work: Iterable[AnswerState]) -> AnswerState:
        """Take the next request out. at_work: the requests that have a sequence already."""
        answer = min(self._waiting, key=lambda one: self._turns.get(one.request.client, 0))  # the first of equals
        self._waiting.remove(answer)
        if not answer.cancelled:
            self._admitted += 1
            self._turns[answer.request.client] = self._admitted
        self._forget_turns([*at_work, answer])
        return answer

    def drop_cancelled(self) -> None:
        """End the requests that were given up while they waited."""
        for answer in [one for one in self._waiting if one.cancelled]:
            self._waiting.remove(answer)
            answer.end()

    def refuse_one(self, at_work: Iterable[AnswerState]) -> AnswerState:
        """Take the request out that a full queue has no room for.

        It is the newest, unless another client has more requests waiting than the newest's client: then it is the
        latest request that stands alone (`Request.alone`) of the client that has the most.
        """
        counts = Counter(answer.request.client for answer in self._waiting)
        newest = self._waiting[-1]
        most = counts[newest.request.client]
        fuller = [one for one in self._waiting if one.request.alone and counts[one.request.client] > most]
        refused = max(reversed(fuller), key=lambda one: counts[one.request.client], default=newest)
        self._waiting.remove(refused)
        self._forget_turns(at_work)
        return refused

    def _forget_turns(self, at_work: Iterable[AnswerState]) -> None:
        """Forget the turns of clients that have no request any more, neither at work nor waiting."""
        here = {answer.request.client for answer in (*at_work, *self._waiting)}
        self._turns = {client: turn for client, turn in self._turns.items() if client in here}
