"""How a stage computes for decoding: torch (the reference), ONNX Runtime (on processors)."""

from isthmus.split.runtime.base import BadPosition, Row, Runtime

__all__ = ["BadPosition", "Row", "Runtime"]
