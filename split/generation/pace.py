"""How many drafts are worth verifying: from what they have cost, and how often they were right.

With drafts that are right with probability a, k of them give (1 - a^(k+1)) / (1 - a) tokens a batch in expectation
(Leviathan et al. 2023, section 3.1). The k with the most tokens a second is taken, 0 included.
"""

from __future__ import annotations

_WEIGHT = 0.1  # of a new draft in the estimate of how many are right
_FADE = 0.97  # of what was measured, with every new batch
_OUTLIER = 4.0  # a batch of so many times what was expected counts as that: somebody died, say
_WORTH = 1.03  # drafting has to promise so much more
_FIRST_REST, _LONGEST_REST = 8, 256  # batches without drafts until some are tried again, doubled each time in vain
_TRIAL = 2  # drafts of such a try


class BatchCost:
    """Seconds of a batch as a + b x tokens, from recent ones: least squares in which old batches fade."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, tokens, tokens^2, seconds, tokens x seconds
        self._slope: float | None = None

    @property
    def known(self) -> bool:
        """Whether there were batches of different sizes."""
        return self._slope is not None

    def add(self, tokens: int, seconds: float) -> None:
        if self._sums[0] > 1:
            seconds = min(seconds, _OUTLIER * self(tokens))
        values = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._sums = [_FADE * total + value for total, value in zip(self._sums, values, strict=True)]
        count, x, xx, y, xy = self._sums
        spread = count * xx - x * x
        if spread > 0.05 * count * count:  # else all had about as many tokens: the slope stays what it was
            self._slope = max(0.0, (count * xy - x * y) / spread)

    def __call__(self, tokens: int) -> float:
        """Expected seconds; 0 before anything was measured."""
        count, x, _, y, _ = self._sums
        if not count:
            return 0.0
        return max(1e-9, y / count + (self._slope or 0.0) * (tokens - x / count))


class Mean:
    """Of what comes, the latest counting most."""

    def __init__(self, start: float, weight: float) -> None:
        self.value, self._weight = start, weight

    def add(self, value: float) -> None:
        self.value += self._weight * (value - self.value)


class Pace:
    """Of one answer."""

    def __init__(self) -> None:
        self.right = Mean(0.6, _WEIGHT)  # share of tested drafts that were right
        self._rest = _FIRST_REST
        self._until_trial = 0

    def heard(self, right: int, wrong: bool) -> None:
        """right: drafts that were; wrong: whether one more was tested and was not."""
        for _ in range(right):
            self.right.add(1.0)
        if wrong:
            self.right.add(0.0)

    def length(self, most: int, others: int, cost: BatchCost, per_draft: float) -> int:
        """Drafts for the next batch, 0 to most.

        others: further tokens in it. per_draft: seconds that whoever drafts makes it wait, a draft.
        """
        if most < 1:
            return 0
        if not cost.known:
            self._until_trial ^= 1
            return self._until_trial * min(_TRIAL, most)
        best = max(range(most + 1), key=lambda k: self._rate(k, others, cost, per_draft))
        if best and self._rate(best, others, cost, per_draft) < _WORTH * self._rate(0, others, cost, per_draft):
            best = 0
        if best:
            self._rest, self._until_trial = _FIRST_REST, 0
            return best
        self._until_trial += 1
        if self._until_trial <= self._rest:
            return 0
        self._rest, self._until_trial = min(2 * self._rest, _LONGEST_REST), 0
        return min(_TRIAL, most)

    def _rate(self, k: int, others: int, cost: BatchCost, per_draft: float) -> float:
        """Expected tokens of this answer a second."""
        a = min(self.right.value, 0.99)
        return (1 - a ** (k + 1)) / (1 - a) / max(1e-9, cost(others + 1 + k) + k * per_draft)
