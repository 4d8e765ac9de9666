"""Aggregations of LoRA adapters by name: see base.py for what one is."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.split.aggregation.average import Average
from isthmus.split.aggregation.base import Aggregation
from isthmus.split.aggregation.padding import Padding
from isthmus.split.aggregation.refactor import Refactor
from isthmus.split.aggregation.stacking import Stacking

REGISTRY: Mapping[str, Aggregation] = {one.name: one for one in (Average(), Padding(), Stacking(), Refactor())}
