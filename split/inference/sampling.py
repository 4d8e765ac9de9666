"""Sampling: from logits to the next token."""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import torch
from torch import Tensor

from isthmus.split.errors import BadRequest
from isthmus.split.inference.request import Logprob, Sampling


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    """Raises BadRequest for settings that cannot be sampled with. vocabulary: number of tokens."""
    if not 0 <= sampling.temperature <= 100:
        raise BadRequest(f"temperature {sampling.temperature}: choose 0 to 100")
    if not 0 < sampling.top_p <= 1:
        raise BadRequest(f"top_p {sampling.top_p}: choose more than 0, at most 1")
    if not 0 <= sampling.top_k <= vocabulary:
        raise BadRequest(f"top_k {sampling.top_k}: choose 0 (all) to {vocabulary}")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Compute the probabilities from which the next token is drawn, (vocabulary,) float64.

    logits: (vocabulary,). The temperature has to be above 0. top_k keeps the k likeliest tokens, top_p the fewest
    likeliest that have at least that share of what is left.
    """
    scaled = (logits.double() - logits.max()) / sampling.temperature  # the difference first: any temperature will do
    if sampling.top_k:
        least = scaled.topk(min(sampling.top_k, len(scaled))).values[-1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    chances = scaled.softmax(0)
    if sampling.top_p < 1:
        ordered, order = chances.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        chances = chances.index_fill(0, order[before >= sampling.top_p], 0.0)
        chances = chances / chances.sum()
    return chances


class Chooser:
    """Chooses the tokens of one answer.

    A draw follows from seed and place alone, so it does not matter what else is computed at the same time, nor whether
    a token is computed again. It is a race: token i arrives after E_i / p_i, with E exponentially distributed, and the
    first is taken; so each token is taken with its probability. Two models that draw with the same E choose the same
    token with a probability of at least (1 - d) / (1 + d), d their total variation distance, without knowing of each
    other (Daliri, Musco and Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding",
    arXiv 2408.07978).
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._seed = secrets.randbits(63) if sampling.seed is None else sampling.seed

    def __call__(self, logits: Tensor, place: int) -> int:
        """Choose a token. logits: (vocabulary,). place: how many tokens of the answer came before."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        chances = probabilities(logits, self._sampling)
        return int((chances / self._arrivals(place, len(chances))).argmax())

    def _arrivals(self, place: int, count: int) -> Tensor:
        """The numbers E of this place, (count,) float64, all above 0."""
        digest = hashlib.blake2b(f"{self._seed}/{place}".encode(), digest_size=16).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
        return torch.from_numpy(random.standard_exponential(count)).clamp_min_(1e-300)


def logprob_of(logits: Tensor, token: int, alternatives: int) -> Logprob:
    """Compute a token's log probability. logits: (vocabulary,). alternatives: how many of the likeliest to name."""
    scores = logits.float().log_softmax(0)
    top = scores.topk(min(alternatives, len(scores))) if alternatives else None
    likeliest = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Logprob(float(scores[token]), likeliest)
