"""Codecs: what turns a tensor into few bytes and back. `parse` makes one from its name."""

from split.codecs.base import Codec, CodecState
from split.codecs.grammar import FAMILIES, Family, parse

__all__ = ["FAMILIES", "Codec", "CodecState", "Family", "parse"]
