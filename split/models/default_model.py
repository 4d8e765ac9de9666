"""The folder of the small model that comes with the package (made by scripts/train_default_model.py)."""

from __future__ import annotations

from pathlib import Path

DEFAULT_MODEL_FOLDER: Path = Path(__file__).parent / "default"
