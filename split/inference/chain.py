"""The blocks of a model as a chain of spans, each computed by one of its holders, which may die at any token.

A span keeps what it was given for every sequence. A holder that takes over, or one whose cache does not reach far
enough, is sent all of a sequence at once, as one prefill, together with the tokens that were due.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from isthmus.split.errors import IsthmusError, LinkLost
from isthmus.split.runtime.base import BadPosition, Row, Runtime

_PATIENCE = 60.0  # seconds that a span waits for a holder
_REMEMBERED = 1000  # recoveries, and batches of a holder
_AGAIN = 20  # times that one batch is tried: each needs a death


@dataclass
class Cost:
    """What a holder's batches have cost so far, in seconds and bytes."""

    batches: int = 0
    tokens: int = 0
    seconds: float = 0.0  # from handing in to the answer
    computing: float = 0.0  # of these, the stage's own
    coding: float = 0.0  # of these, encoding and decoding at this end
    sent: int = 0
    received: int = 0
    attended: int = 0  # pairs of a token and one that it attends to, itself included
    beyond: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """Seconds of recent batches beyond the stage's own computing."""

    def add(self, tokens: int, seconds: float, computing: float) -> None:
        """Add a batch. seconds: from handing it in to its answer; computing: those in which the stage computed."""
        self.batches += 1
        self.tokens += tokens
        self.seconds += seconds
        self.computing += computing
        self.beyond.append(seconds - computing)

    def attend(self, rows: Sequence[Row]) -> None:
        """Counts the attention of a batch that was computed."""
        self.attended += sum(row.count * row.position + row.count * (row.count + 1) // 2 for row in rows)

    def figures(self) -> dict[str, float]:
        """The sums, and the median of `beyond` in milliseconds."""
        sums = {name: value for name, value in vars(self).items() if name != "beyond"}
        return {**sums, "median_ms_beyond_computing": 1000 * median(self.beyond) if self.beyond else 0.0}


class Holder(Protocol):
    """A place that has the blocks of a span: a runtime in this process, a device, or an actor."""

    name: str
    cost: Cost

    @property
    def gone(self) -> bool:
        """Whether the holder has left, or is about to: nothing new should go there."""

    async def compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        """Compute as `Runtime.compute` does. Raises LinkLost if the holder is gone, BadPosition if it lacks what came
        before.
        """

    def forget(self, sequences: Iterable[int]) -> None: ...

    def end(self, error: IsthmusError) -> None:
        """Tell the holder, with the reason, that it is not wanted any more."""


class LocalHolder:
    """A runtime in this process, which computes in a thread so that the event loop goes on."""

    def __init__(self, name: str, runtime: Runtime) -> None:
        self.gone = False
        self.name, self.cost = name, Cost()
        self._runtime = runtime
        self._turn = asyncio.Lock()
        self._forgotten: list[int] = []  # before the next batch, which is computed in another thread

    async def compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        start = time.perf_counter()
        async with self._turn:
            began = time.perf_counter()
            forgotten, self._forgotten = self._forgotten, []
            output = await asyncio.to_thread(self._work, forgotten, rows, hidden)
            ended = time.perf_counter()
        self.cost.add(len(hidden), ended - start, ended - began)
        return output

    def forget(self, sequences: Iterable[int]) -> None:
        self._forgotten += sequences

    def end(self, error: IsthmusError) -> None:
        self.gone = True

    def _work(self, forgotten: list[int], rows: Sequence[Row], hidden: Tensor) -> Tensor:
        self._runtime.forget(forgotten)
        return self._runtime.compute(rows, hidden)


@dataclass(frozen=True)
class Takeover:
    """A sequence that another holder took over, or the same holder anew."""

    span: str
    lost: str  # the holder before
    holder: str
    sequence: int
    tokens: int  # number of tokens that were sent again
    seconds: float  # from the failure to the answer


class Span:
    """Blocks first to last-1, and whoever holds them. All calls are made in one event loop."""

    def __init__(
        self,
        first: int,
        last: int,
        hidden_size: int,
        *,
        chunk: int = 512,
        patience: float = _PATIENCE,
        tell: Callable[[Takeover], None] = lambda _: None,
    ) -> None:
        """Make a span without holders.

        hidden_size: values of a token's hidden state. chunk: the most tokens that are sent again in one batch.
        patience: seconds that a batch waits for a holder. tell: hears of every recovery; the last ones are in
        `recoveries`.
        """
        self.first, self.last = first, last
        self.recoveries: deque[Takeover] = deque(maxlen=_REMEMBERED)
        self._tell = tell
        self._hidden_size, self._chunk, self._patience = hidden_size, chunk, patience
        self._holders: list[Holder] = []
        self._ranks: dict[Holder, int] = {}
        self._at_work: Holder | None = None
        self._empty_since: float | None = None  # when a holder was first missed
        self._news = asyncio.Condition()
        self._journal: dict[int, _Journal] = {}
        self._built: dict[int, Holder] = {}  # by sequence: who has its keys and values

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def holders(self) -> list[Holder]:
        """The holders in order: the first is the next to compute or does so now, the others stand by."""
        return list(self._holders)

    @property
    def waiting(self) -> float:
        """Seconds of the last batch in which the holder did not compute."""
        beyond = self._at_work.cost.beyond if self._at_work is not None else ()
        return beyond[-1] if beyond else 0.0

    async def add(self, holder: Holder, rank: int = 0) -> None:
        """Add a holder. rank: of those that stand by, the lowest takes over first; who computes goes on computing."""
        async with self._news:
            self._ranks[holder] = rank
            standby = sorted([*self._holders, holder], key=lambda one: (one is not self._at_work, self._ranks[one]))
            self._holders = standby
            self._empty_since = None
            self._news.notify_all()

    def remove(self, holder: Holder) -> None:
        """Take a holder out that has left."""
        if holder in self._holders:
            self._holders.remove(holder)
            del self._ranks[holder]

    async def complete(self) -> None:
        """Return when there is a holder."""
        async with self._news:
            await self._news.wait_for(lambda: self._holders)

    async def compute(self, rows: Sequence[Row], hidden: Tensor, *, blame: bool = True) -> Tensor:
        """Compute as `Runtime.compute` does, whatever dies meanwhile. Raises LinkLost if no holder comes in time.

        rows, hidden: as there, (tokens, hidden). blame: whether an error may be the holder's fault, so that another one
        is tried if there is one; False for a batch of somebody who could mean harm and would cost the span its holders.
        """
        for row, part in zip(rows, hidden.split([row.count for row in rows]), strict=True):
            self._journal.setdefault(row.sequence, _Journal(self._hidden_size)).put(row.position, part)
        failed: float | None = None
        lost = ""
        doubtful: set[Holder] = set()
        for _ in range(_AGAIN):
            holder = await self._holder()
            behind = [row for row in rows if row.position and self._built.get(row.sequence) is not holder]
            started = time.perf_counter() if failed is None else failed
            try:
                for row in behind:
                    await self._rebuild(holder, row)
                output = await holder.compute(rows, hidden)
                holder.cost.attend(rows)
            except IsthmusError as error:
                failed, lost = started, holder.name
                if isinstance(error, BadPosition) and holder not in doubtful:  # it may just have forgotten
                    doubtful.add(holder)
                    for row in rows:
                        self._built.pop(row.sequence, None)
                    continue
                alone = doubtful - {holder} or len(self._holders) < 2
                if not isinstance(error, LinkLost) and (alone or not blame):
                    raise  # nobody could compute this
                doubtful.add(holder)
                self.remove(holder)
                holder.end(error)
                continue
            for row in behind:
                before = self._built.get(row.sequence)
                name = lost or ("" if before is None else before.name)
                seconds = time.perf_counter() - started
                recovery = Takeover(str(self), name, holder.name, row.sequence, row.position, seconds)
                self.recoveries.append(recovery)
                self._tell(recovery)
            for row in rows:
                self._built[row.sequence] = holder
            return output
        raise LinkLost(
            f"blocks {self} were lost {_AGAIN} times while one batch was computed: look at the devices' logs"
        )

    def forget(self, sequences: Iterable[int]) -> None:
        for sequence in sequences:
            self._journal.pop(sequence, None)
            holder = self._built.pop(sequence, None)
            if holder is not None and not holder.gone:
                holder.forget([sequence])

    async def _holder(self) -> Holder:
        for holder in [one for one in self._holders if one.gone]:
            self.remove(holder)
        if not self._holders:
            now = time.monotonic()
            self._empty_since = now if self._empty_since is None else self._empty_since
            try:
                async with asyncio.timeout(self._empty_since + self._patience - now), self._news:
                    await self._news.wait_for(lambda: self._holders)
            except TimeoutError:
                raise LinkLost(f"nobody holds blocks {self}, and nobody came for {self._patience:.0f} s") from None
        self._at_work = self._holders[0]
        return self._at_work

    async def _rebuild(self, holder: Holder, row: Row) -> None:
        """Send a holder what came before a row's position, in as few batches as may be."""
        journal = self._journal[row.sequence]
        for start in range(0, row.position, self._chunk):
            end = min(start + self._chunk, row.position)
            again = replace(row, position=start, count=end - start)
            await holder.compute([again], journal.get(start, end))
            holder.cost.attend([again])


class _Journal:
    """The hidden states, (tokens, hidden), that one sequence has been given."""

    def __init__(self, hidden_size: int) -> None:
        self._values = torch.empty(64, hidden_size)

    def put(self, position: int, hidden: Tensor) -> None:
        end = position + len(hidden)
        if end > len(self._values):
            grown = torch.empty(max(end, 2 * len(self._values)), self._values.shape[1])
            grown[:position] = self._values[:position]
            self._values = grown
        self._values[position:end] = hidden

    def get(self, start: int, end: int) -> Tensor:
        return self._values[start:end]
