"""The one definition of perplexity that every figure of the project follows."""

from __future__ import annotations

import math

PERPLEXITY = (
    "Perplexity is exp of the mean negative log likelihood (natural logarithm) per predicted token. The held-out text"
    " of each file is tokenised as it is by the model's own tokenizer and cut into non-overlapping windows of"
    " sequence_length tokens, of which the last may be shorter. In each window every token but the first is predicted"
    " from those before it in the window. Sums are taken over all files and then divided. Rows of .jsonl and .csv files"
    " are each followed by EOS; with prompt and completion columns only the tokens of the completions (and their EOS)"
    " count. With packing 'padded' a window is one document, cut off at sequence_length, instead."
)


def perplexity(nll: float, tokens: int) -> float:
    """Returns exp(nll / tokens), or infinity where that is more than a float can hold."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
