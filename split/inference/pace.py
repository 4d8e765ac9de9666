"""Estimates of what batches cost and of how often drafts are right, from recent ones."""

from __future__ import annotations

_WEIGHT = 0.1  # of a new draft in the estimate of how many are right
_SHARED_WEIGHT = 0.03  # the same, of all answers
_FADE = 0.97  # of what was measured, with every new batch
_OUTLIER = 4.0  # a batch of so many times what was expected counts as that: somebody died, say
_LONGEST_PAUSE = 16  # batches


class BatchCost:
    """Estimates the seconds of a batch as a + b x tokens: least squares in which old batches fade."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, tokens, tokens^2, seconds, tokens x seconds
        self._slope: float | None = None

    @property
    def known(self) -> bool:
        """Whether there were batches of different sizes, so that the slope is known."""
        return self._slope is not None

    def add(self, tokens: int, seconds: float) -> None:
        if self._sums[0] > 1:
            seconds = min(seconds, _OUTLIER * max(self(tokens), self._sums[3] / self._sums[0]))
        values = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._sums = [_FADE * total + value for total, value in zip(self._sums, values, strict=True)]
        count, x, xx, y, xy = self._sums
        spread = count * xx - x * x
        if spread > 0.05 * count * count:  # else all had about as many tokens: the slope stays what it was
            self._slope = max(0.0, (count * xy - x * y) / spread)

    def __call__(self, tokens: int) -> float:
        """Expected seconds of a batch of so many tokens; 0 before anything was measured."""
        count, x, _, y, _ = self._sums
        if not count:
            return 0.0
        return max(1e-9, y / count + (self._slope or 0.0) * (tokens - x / count))


class Mean:
    """A moving mean in which the latest value counts most."""

    def __init__(self, start: float, weight: float) -> None:
        self.value, self._weight = start, weight

    def add(self, value: float) -> None:
        self.value += self._weight * (value - self.value)


def shared_mean() -> Mean:
    """The mean, over the drafts of all answers, of whether a draft was right; a new answer begins with it."""
    return Mean(0.6, _SHARED_WEIGHT)


class Pace:
    """How often the drafts of one answer are right, and whether to pause. shared: hears of this answer, too."""

    def __init__(self, shared: Mean) -> None:
        self._shared, self._right = shared, Mean(shared.value, _WEIGHT)
        self._vain = self._pause = 0

    @property
    def right(self) -> float:
        """Share of the tested drafts that are right."""
        return min(self._right.value, 0.99)

    def expected(self, drafts: int) -> float:
        """Tokens that a batch with so many drafts gives: (1 - a^(k+1)) / (1 - a) (Leviathan et al. 2023, 3.1)."""
        return (1 - self.right ** (drafts + 1)) / (1 - self.right)

    def heard(self, right: int, wrong: bool) -> None:
        """Note how a batch's drafts did. right: number that were; wrong: whether one more was tested and was not."""
        for value in [1.0] * right + [0.0] * wrong:
            self._right.add(value)
            self._shared.add(value)

    def proposed(self, count: int) -> None:
        """Note how many drafts came when some were asked for. After none there is a pause, longer each time."""
        self._vain = 0 if count else self._vain + 1
        self._pause = 0 if count else min(2**self._vain, _LONGEST_PAUSE)

    def pauses(self) -> bool:
        """Whether the answer gets no drafts in this batch. To be asked once for each batch."""
        self._pause = max(0, self._pause - 1)
        return self._pause > 0
