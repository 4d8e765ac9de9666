"""Questions whose answers come in the order in which they were asked."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from isthmus.split.errors import BadFrame

Place = TypeVar("Place")
Asked = TypeVar("Asked")


class Turns(Generic[Place, Asked]):
    """A queue of the questions that are due.

    Place: what an answer names its question by.
    Asked: what is known of the question.
    """

    def __init__(self) -> None:
        self._due: deque[tuple[Place, Asked]] = deque()

    def __len__(self) -> int:
        return len(self._due)

    def ask(self, place: Place, asked: Asked) -> None:
        self._due.append((place, asked))

    def next(self, place: Place) -> Asked:
        """The first question, if it has this place; it stays due. Raises BadFrame if it has not, or there is none."""
        if not self._due:
            raise BadFrame("answers nothing")
        if self._due[0][0] != place:
            raise BadFrame(f"is out of turn: that of {self._due[0][0]} was due")
        return self._due[0][1]

    def done(self) -> Asked:
        """Removes and returns the first question, which has been answered."""
        return self._due.popleft()[1]
