"""Codecs: what turns a tensor into few bytes and back. `parse` makes one from its name."""

from isthmus.split.codecs.base import Codec
from isthmus.split.codecs.grammar import FAMILIES, Family, parse
from isthmus.split.codecs.matrices import AnyCodec, for_matrices
from isthmus.split.codecs.state import CodecState

__all__ = ["FAMILIES", "AnyCodec", "Codec", "CodecState", "Family", "for_matrices", "parse"]
