"""When the first span is sure of a token, so that the others need not be asked before the next one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.split.errors import BadRequest

MARGIN, ENTROPY = "margin", "entropy"


@dataclass(frozen=True)
class ExitRule:
    """A rule that says when the first blocks are sure enough of a token.

    by margin: the likeliest token's probability less the second's is at least `threshold` (CALM's softmax response:
    Schuster et al. 2022, section 3.5). by entropy: the entropy of the probabilities, in nats, is at most `threshold`.
    """

    threshold: float
    by: str = MARGIN

    def __post_init__(self) -> None:
        if self.by not in (MARGIN, ENTROPY):
            raise BadRequest(f"exit by {self.by!r}: choose {MARGIN} or {ENTROPY}")
        if not 0 <= self.threshold <= (1 if self.by == MARGIN else 100):
            raise BadRequest(f"exit threshold {self.threshold}: choose 0 to 1, or for entropy 0 or more nats")

    def sure(self, logits: Tensor) -> list[bool]:
        """Say for each token whether it is sure. logits: (tokens, vocabulary), of the head after the first span."""
        scores = logits.double().log_softmax(-1)
        if self.by == ENTROPY:
            sure = torch.special.entr(scores.exp()).sum(-1) <= self.threshold
        else:
            best = scores.topk(min(2, scores.shape[-1])).values.exp()
            sure = best[:, 0] - best[:, 1:].sum(-1) >= self.threshold
        found: list[bool] = sure.tolist()
        return found


def parse_exit(text: str) -> ExitRule | None:
    """Read `0.9` or `entropy:0.5`; None for the empty text, no early exit. Raises BadRequest."""
    if not text:
        return None
    by, _, number = text.rpartition(":")
    try:
        return ExitRule(float(number), by or MARGIN)
    except ValueError:
        raise BadRequest(f"--exit-threshold {text!r}: write a number, or entropy:NUMBER") from None
