"""What a caller of the engine asks for, and what it gets, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus.split.errors import IsthmusError


@dataclass(frozen=True)
class Sampling:
    """How a next token is chosen. temperature 0: always the likeliest, the rest does not matter.

    top_k 0 and top_p 1: all tokens. Filters are applied after the temperature, top_k first. seed: draws are the same
    again, whatever else is generated at the same time; None: one that nobody knows.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """prompt: token ids, at least one. logprobs: how many of the likeliest tokens to tell at each position beside the
    chosen one (None: no logprobs at all). prompt_logprobs: tell them of the prompt's tokens, too.

    max_tokens may be 0 for the prompt's logprobs alone. stop_tokens: end the answer, and belong to it (EOS).
    adapter: 0 for the base model, i for the i-th adapter that is served with it.
    client: those that wait take turns by it. alone: nobody asked for other answers together with this one, so while it
    waits it may be refused in another client's favour.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    stop_tokens: frozenset[int] = frozenset()
    adapter: int = 0
    client: str = ""
    alone: bool = True


@dataclass(frozen=True)
class Logprob:
    """Natural logarithms of probabilities under the model as it is (temperature 1, no filter). top: the likeliest."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Token:
    """A token of the answer. last: `stop` (a stop token) or `length`, with the answer's last token; else empty."""

    id: int
    logprob: Logprob | None = None
    last: str = ""


@dataclass
class Timing:
    """Seconds since the request came in; figures of one answer."""

    first_token: float = 0.0
    total: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, whose keys and values were there from an earlier request
    tokens: int = 0
    rounds: int = 0  # batches through the whole chain for tokens of the answer
    drafted: int = 0  # tokens that were guessed and verified
    accepted: int = 0  # of these, right
    exited: int = 0  # tokens of which the first span was sure
    hops: dict[str, dict[str, float]] = field(default_factory=dict)


class Busy(IsthmusError):
    """The queue is full; retry_after: seconds after which it is worth trying again."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
