"""All methods by name: the one place that knows which exist. A new method is one line here."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.split.dlora.method import Dlora
from isthmus.split.job.config import DLORA, SPLITLORA, TrainingConfig
from isthmus.split.training.method import Method
from isthmus.split.training.splitlora import SplitLora

METHODS: Mapping[str, Method] = {SPLITLORA: SplitLora(), DLORA: Dlora()}


def method_of(config: TrainingConfig) -> Method:
    """A job's method, whose name was checked when the configuration was made."""
    return METHODS[config.method]
