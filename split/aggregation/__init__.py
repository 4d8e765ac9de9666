"""Aggregations of LoRA adapters by name: see base.py for what one is."""

from __future__ import annotations

from collections.abc import Mapping

from split.aggregation.average import Average
from split.aggregation.base import Aggregation
from split.aggregation.padding import Padding
from split.aggregation.refactor import Refactor
from split.aggregation.stacking import Stacking

REGISTRY: Mapping[str, Aggregation] = {one.name: one for one in (Average(), Padding(), Stacking(), Refactor())}
