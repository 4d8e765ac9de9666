"""How many examples Hypothesis tries."""

from __future__ import annotations

from hypothesis import settings

EVERYTHING = "everything"  # the profile of `make test-all`


def examples(number: int) -> int:
    """All of them in `make test-all`, and a quarter on every change."""
    return number if settings.get_current_profile_name() == EVERYTHING else max(5, number // 4)
