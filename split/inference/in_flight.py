"""How many batches go round in a chain at the same time: as many as it has spans, or fewer where that is faster.

Spans on machines of their own are all busy with a batch each. Where they share a machine, each batch reads the same
weights again and takes the cores from the others: then one batch with all answers is faster. Who shares what cannot be
told from names, so it is tried out.
"""

from __future__ import annotations

import math

_ROUNDS = 4  # tokens of each answer, at least, by which a number of batches is judged at a time
_SECONDS = 0.1  # the least time in which a number of batches is judged
_TURNS = 3  # of the present number and the other in a trial; each one's fastest turn counts
_BETTER = 0.93  # of the present number's seconds: what the other has to be below, to be taken
_WORSE = 1.15  # the same: above it, the other is given up at once
_ALIKE = 1.5  # factor between numbers of answers within a trial, beyond which it is given up
_FIRST_PAUSE, _LAST_PAUSE = 2.0, 120.0  # seconds between trials; they double with every one that was in vain
_NEVER = -math.inf


class InFlight:
    """Tries out how many batches of next tokens should be in flight: `value`. Call `took` after every such batch."""

    def __init__(self, most: int) -> None:
        """Begin with as many batches as there are spans, `most`."""
        self.value = self._kept = self._most = most
        self._others = self._in_turn()
        self._next, self._pause = _NEVER, _FIRST_PAUSE
        self._best: dict[int, float] = {}  # in the present trial: the fewest seconds for a token of each answer
        self._turns = 0  # of this trial
        self._answers = 0
        self._rounds, self._since, self._unsettled = 0.0, _NEVER, most  # of the present turn

    def took(self, answers: int, tokens: int, now: float) -> None:
        """Note that a batch gave so many tokens.

        answers: the number that are in the chain now. now: seconds, of any clock.
        """
        if self._most < 2:
            return
        if answers < 2 or max(answers, self._answers) > _ALIKE * min(answers, self._answers):
            self._answers = answers
            self._end_trial()
            return
        self._unsettled = max(0, self._unsettled - 1)
        if self._unsettled:
            return
        if self._since == _NEVER:
            self._since = now
            return
        self._rounds += tokens / answers
        seconds = now - self._since
        if self._rounds >= _ROUNDS and seconds >= _SECONDS:
            self._judge(seconds / self._rounds, now)
            self._begin_turn()

    def broke_off(self) -> None:
        """Drop what was being measured: a batch failed, or nobody is at work any more."""
        self._end_trial()

    def _begin_turn(self) -> None:
        """Measure the present value anew, once the batches in flight before it are done."""
        self._rounds, self._since, self._unsettled = 0.0, _NEVER, self._most

    def _end_trial(self) -> None:
        self.value, self._best, self._turns = self._kept, {}, 0
        self._begin_turn()

    def _judge(self, seconds: float, now: float) -> None:
        """Compare the present value with the other after a turn of it. seconds: for a token of each answer."""
        if not self._best and now < self._next:
            return
        other = self._others[0]
        self._turns += 1
        self._best[self.value] = min(seconds, self._best.get(self.value, math.inf))
        ratio = self._best.get(other, math.inf) / self._best[self._kept]
        if self._turns < 2 * _TURNS and (self._turns == 1 or ratio < _WORSE):
            self.value = other if self.value == self._kept else self._kept
            return
        if ratio < _BETTER:
            self._kept, self._pause = other, _FIRST_PAUSE
            self._others = self._in_turn()
        else:
            self._others.append(self._others.pop(0))
            self._pause = min(2 * self._pause, _LAST_PAUSE)
        self._end_trial()
        self._next = now + self._pause

    def _in_turn(self) -> list[int]:
        return [number for number in range(1, self._most + 1) if number != self._kept]
