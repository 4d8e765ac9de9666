"""Requests to the engine, and what comes back, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus.split.errors import IsthmusError


@dataclass(frozen=True)
class Sampling:
    """How a next token is chosen from the model's probabilities.

    temperature: 0 always takes the likeliest token, whatever the rest says. top_k: number of the likeliest tokens to
    draw from; 0: all. top_p: draw from the fewest likeliest tokens that have this share of the probability; 1: all.
    Filters are applied after the temperature, top_k first. seed: equal seeds draw the same tokens, whatever else is
    generated at the same time; None: a seed that nobody knows.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of the engine.

    prompt: token ids, at least one. max_tokens: of the answer; 0 for the prompt's logprobs alone. logprobs: how many of
    the likeliest tokens to tell at each position beside the chosen one; None: no logprobs. prompt_logprobs: whether to
    tell the logprobs of the prompt's tokens, too. stop_tokens: ids that end the answer and belong to it (EOS). adapter:
    0 for the base model, i for the i-th adapter that is served with it.

    client: name by which waiting requests take turns. alone: whether nobody asked for other answers together with this
    one; while such a request waits it may be refused in another client's favour.
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
    """Natural logarithms of a token's probability under the model as it is: temperature 1, no filter.

    top: ids and log probabilities of the likeliest tokens.
    """

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
    """Figures of one answer. Times are in seconds since the request came in."""

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
    """The queue is full. retry_after: seconds after which it is worth trying again."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
