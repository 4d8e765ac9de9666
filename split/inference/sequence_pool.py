"""The sequences of a chain: which are free, and which still have the keys and values of an answer that has ended."""

from __future__ import annotations

from isthmus.split.inference.answer_state import AnswerState, in_common


class SequencePool:
    """Hands out sequences (0 to count-1). Those of ended answers are reused where a prompt begins like them."""

    def __init__(self, count: int) -> None:
        self._free = list(reversed(range(count)))
        # Oldest first: sequence -> adapter and `Row.long`, and the tokens whose keys and values all spans have.
        self._kept: dict[int, tuple[tuple[int, bool], tuple[int, ...]]] = {}

    @property
    def kept(self) -> int:
        """Number of sequences that are kept for prompts to come."""
        return len(self._kept)

    @property
    def has_room(self) -> bool:
        return bool(self._free or self._kept)

    def take(self, answer: AnswerState) -> tuple[int, int]:
        """Give an answer a sequence. Returns it, and how many of the prompt's tokens it has keys and values of.

        The kept sequence that has the most of the prompt is taken, or a free one if more than half of that sequence
        would be lost; without a free one, the sequence that was kept for the longest time.
        """
        kind = answer.request.adapter, answer.long
        prompt = answer.request.prompt
        known = {
            sequence: in_common(tokens, prompt) if kept_kind == kind else 0
            for sequence, (kept_kind, tokens) in self._kept.items()
        }
        best = max(known, key=lambda sequence: known[sequence], default=-1)
        if best < 0 or 2 * known[best] < len(self._kept[best][1]):
            if self._free:
                return self._free.pop(), 0
            best = next(iter(self._kept))
        del self._kept[best]
        # The last token of a prompt is computed again: its logits are needed. So are those of all for its logprobs.
        return best, 0 if answer.wants_prompt else min(known[best], len(prompt) - 1)

    def keep(self, answer: AnswerState) -> None:
        """Take the sequence of an ended answer back, with what is in it."""
        self._kept[answer.sequence] = (answer.request.adapter, answer.long), tuple(answer.tokens[: answer.sent])

    def release(self, sequence: int) -> None:
        """Take a sequence back that is empty."""
        self._free.append(sequence)
