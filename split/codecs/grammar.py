"""Names of codecs: `part,part,...`, a part being NAME or NAME:ARGUMENT:ARGUMENT...

An argument is KEY=VALUE, a flag (`int4:stochastic`), or, in the first place, the value of the part's first parameter
(`topk:0.05`). The order of the parts does not matter: each is of one kind, and the kinds run in one order (base.py). So
`int4:block=32,hadamard` and `hadamard,int4:32` are the same codec, whose canonical name is `hadamard,int4:block=32`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from isthmus.split.codecs.base import Codec
from isthmus.split.codecs.entropy import Range, Zstd
from isthmus.split.codecs.floats import BFloat16, Float16, Fp8, Raw, Shuffle
from isthmus.split.codecs.integers import Integer
from isthmus.split.codecs.klt import Klt
from isthmus.split.codecs.lowrank import LowRank, PowerSgd
from isthmus.split.codecs.memory import Delta, ErrorFeedback
from isthmus.split.codecs.plain import PLAIN
from isthmus.split.codecs.rotation import Hadamard
from isthmus.split.codecs.sparse import VALUES, RandTopK, TopK
from isthmus.split.codecs.uniform import Uniform
from isthmus.split.errors import CodecError

KINDS = ("memory", "transform", "quantiser", "entropy")
ALIASES = {"lossless": "shuffle,zstd"}
_LONGEST = 200
_NUMBER = {int: re.compile(r"-?[0-9]+"), float: re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?")}

Value = int | float | str | bool


@dataclass(frozen=True)
class Parameter:
    """A parameter of a part.

    Numbers go from `low` to `high`, both included; words are one of `choices`; a bool is a flag.
    """

    name: str
    default: Value
    help: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()

    @property
    def type(self) -> type[Value]:
        return type(self.default)

    @property
    def range(self) -> str:
        """Say, for people, which values can be given."""
        if self.type is bool:
            return "given or not"
        return " or ".join(self.choices) if self.choices else f"{self.low:.10g} to {self.high:.10g}"

    def read(self, text: str, part: str) -> Value:
        if self.choices:
            if text not in self.choices:
                raise CodecError(f"{self.name} of {part} is {text!r}; choose {self.range}")
            return text
        if self.type is bool:
            raise CodecError(f"{self.name} of {part} takes no value; write {part}:{self.name}")
        if not _NUMBER[self.type].fullmatch(text):
            kind = "a whole number" if self.type is int else "a number"
            raise CodecError(f"{self.name} of {part} is {text!r}; choose {kind} from {self.range}")
        value = self.type(text)
        assert isinstance(value, int | float)
        if not self.low <= value <= self.high:
            raise CodecError(f"{self.name} of {part} is {text}; choose {self.range}")
        return value


@dataclass(frozen=True)
class Family:
    """The parts of one name.

    make: takes every parameter by its name.
    writes: what a quantiser hands to the entropy coder: symbols, bytes or nothing.
    biased: of a quantiser, whether the mean of what is decoded is not the value; as text, when.
    """

    name: str
    kind: str
    make: Callable[..., Any]
    what: str
    cost: str
    parameters: tuple[Parameter, ...] = ()
    biased: bool | str = False
    writes: str = ""


def _integer(bits: int, cost: str) -> Family:
    def make(block: int, row: bool, stochastic: bool) -> Integer:
        if row and block != 64:
            raise CodecError(f"int{bits} has one scale a row or one for each {block} values; leave row or block out")
        return Integer(bits, block, row, stochastic)

    parameters = (
        Parameter("block", 64, "values that share a scale", 4, 65536),
        Parameter("row", False, "one scale a row instead"),
        Parameter("stochastic", False, "round at random, so that the mean is right"),
    )
    what = "signed integers with one scale a block"
    return Family(f"int{bits}", "quantiser", make, what, cost, parameters, "unless stochastic", "symbols")


_BLOCK = Parameter("block", 64, "values that share a scale", 4, 65536)
_SHARE = Parameter("share", 0.05, "of a row's values that are sent", 0.0001, 1)
_VALUES = Parameter("values", "bfloat16", "how they are sent", choices=tuple(VALUES))
_LIMIT = "MiB that may be kept"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "ef",
            "memory",
            ErrorFeedback,
            "adds what was lost of a sample's last tensor to its next (error feedback)",
            "a tensor kept for each sample at the sender",
            (Parameter("limit", ErrorFeedback.limit, _LIMIT, 1, 1_048_576),),
        ),
        Family(
            "delta",
            "memory",
            Delta,
            "codes the change since the sample was last seen",
            "a tensor kept for each sample at both ends; nothing is gained in the first epoch",
            (Parameter("limit", Delta.limit, _LIMIT, 1, 1_048_576),),
        ),
        Family(
            "hadamard",
            "transform",
            Hadamard,
            "a random rotation that spreads outliers over their block",
            "under 1 ms a MB; a width without a block of 16 is filled up",
        ),
        Family(
            "klt",
            "transform",
            Klt,
            "the rotation in which tensors of this stream are uncorrelated, learnt as they pass",
            "width * block bytes when it is sent; two matrices of that many float32 kept",
            (Parameter("block", Klt.block, "columns that are rotated together, at most", 1, 4096),),
        ),
        Family(
            "none",
            "quantiser",
            Raw,
            "float32 bit for bit",
            "32 bits a value",
            writes="nothing",
        ),
        Family(
            "shuffle",
            "quantiser",
            Shuffle,
            "float32 bit for bit, its bytes sorted for an entropy coder",
            "32 bits a value; with zstd about 27",
            writes="bytes",
        ),
        Family(
            "float16",
            "quantiser",
            Float16,
            "float16 with one power of two a tensor: 11 digits",
            "16 bits a value",
            biased=True,
            writes="bytes",
        ),
        Family(
            "bfloat16",
            "quantiser",
            BFloat16,
            "bfloat16: 8 digits, the range of float32",
            "16 bits a value",
            biased=True,
            writes="bytes",
        ),
        Family(
            "fp8",
            "quantiser",
            Fp8,
            "8-bit floats (e4m3) with one scale a block: 4 digits, good for values of very different sizes",
            "8.25 bits a value",
            (_BLOCK,),
            biased=True,
            writes="bytes",
        ),
        _integer(8, "8.25 bits a value"),
        _integer(4, "4.25 bits a value"),
        _integer(3, "3.25 bits a value"),
        _integer(2, "2.25 bits a value; coarse"),
        Family(
            "uniform",
            "quantiser",
            Uniform,
            "whole multiples of a step that follows the RMS; meant with klt or hadamard, and range",
            "set by step; with range about 5 bits a value of a Gaussian at 0.13, 2 at 1",
            (
                Parameter("step", Uniform.step, "in RMS", 0.001, 16),
                Parameter("per", Uniform.per, "what the RMS is of", choices=("row", "tensor")),
                Parameter("deadzone", Uniform.deadzone, "of a step, by which rounding goes towards 0", 0, 0.49),
                Parameter("stochastic", Uniform.stochastic, "round up or down by chance, so that the mean is right"),
            ),
            biased="unless stochastic",
            writes="symbols",
        ),
        Family(
            "topk",
            "quantiser",
            TopK,
            "the largest values of each row; meant with ef",
            "1.2 bits a value at share 0.05",
            (_SHARE, _VALUES),
            biased=True,
            writes="bytes",
        ),
        Family(
            "randtopk",
            "quantiser",
            RandTopK,
            "the largest values of each row and a few random others",
            "1.2 bits a value at share 0.05; 4 ms a MB",
            (
                _SHARE,
                Parameter("alpha", RandTopK.alpha, "of the places that go to others", 0, 1),
                _VALUES,
            ),
            biased=True,
            writes="bytes",
        ),
        Family(
            "powersgd",
            "quantiser",
            PowerSgd,
            "two thin factors, going on from the last tensor's; for gradients, with ef",
            "16 * rank * (rows + width) bits",
            (Parameter("rank", PowerSgd.rank, "columns of a factor", 1, 4096),),
            biased=True,
            writes="bytes",
        ),
        Family(
            "lowrank",
            "quantiser",
            LowRank,
            "nearly the best two thin factors of each tensor",
            "16 * rank * (rows + width) bits; slow at high ranks",
            (Parameter("rank", LowRank.rank, "columns of a factor", 1, 4096),),
            biased=True,
            writes="bytes",
        ),
        Family(
            "zstd",
            "entropy",
            Zstd,
            "Zstandard: fast, for symbols and bytes",
            "some ms a MB",
            (Parameter("level", Zstd.level, "effort", 1, 19),),
        ),
        Family(
            "range",
            "entropy",
            Range,
            "a range coder that fits the symbols' distribution: the fewest bits",
            "some ten ms a MB",
        ),
    )
}


@lru_cache(maxsize=1024)
def parse(text: str) -> Codec:
    """The codec of that name. Raises CodecError with one line that says what to write instead."""
    if len(text) > _LONGEST:
        raise CodecError(f"the name of a codec has {len(text)} characters; at most {_LONGEST} are read")
    made: dict[str, Any] = {}
    families: dict[str, Family] = {}
    for part in ",".join(ALIASES.get(part.strip(), part) for part in text.split(",")).split(","):
        family, value = _part(part.strip())
        if family.kind in families:
            pair = sorted((families[family.kind].name, family.name))
            raise CodecError(f"{pair[0]} and {pair[1]} are each a codec's {family.kind}; leave one out")
        families[family.kind], made[family.kind] = family, value
    _check(families, made)
    return Codec(
        name=",".join(made[kind].name for kind in KINDS if kind in made),
        quantiser=made["quantiser"],
        entropy=made.get("entropy", PLAIN),
        transform=made.get("transform"),
        memory=made.get("memory"),
    )


def _part(text: str) -> tuple[Family, Any]:
    name, *arguments = text.split(":")
    if name in ALIASES:
        raise CodecError(f"{name} takes no parameters: it is {ALIASES[name]}; give them to these")
    if name not in FAMILIES:
        raise CodecError(f"no part of a codec is called {name!r}; choose from {', '.join([*FAMILIES, *ALIASES])}")
    family = FAMILIES[name]
    by_name = {parameter.name: parameter for parameter in family.parameters}
    given: dict[str, Value] = {}
    for place, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if equals and key in by_name:
            read = by_name[key].read(value, name)
        elif argument in by_name and by_name[argument].type is bool:
            key, read = argument, True
        elif not equals and place == 0 and by_name and next(iter(by_name)) != argument:
            key = next(iter(by_name))
            read = by_name[key].read(argument, name)
        else:
            raise CodecError(f"{name} has no parameter {argument!r}; {_parameters(family)}")
        if key in given:
            raise CodecError(f"{key} of {name} is given twice")
        given[key] = read
    defaults = {parameter.name: parameter.default for parameter in family.parameters}
    return family, family.make(**(defaults | given))


def _parameters(family: Family) -> str:
    """Say, for people, what can be written after the name."""
    if not family.parameters:
        return "it has none"
    flags = (one.name if one.type is bool else f"{one.name}={one.default}" for one in family.parameters)
    return f"it has {', '.join(flags)}"


def _check(families: dict[str, Family], made: dict[str, Any]) -> None:
    """That the parts go together."""
    if "quantiser" not in families:
        names = ", ".join(name for name, family in FAMILIES.items() if family.kind == "quantiser")
        raise CodecError(f"{', '.join(one.name for one in families.values())} needs a quantiser: add one of {names}")
    quantiser = families["quantiser"]
    if "memory" in families and made["quantiser"].exact:
        raise CodecError(f"{families['memory'].name} is of no use: {quantiser.name} loses nothing; leave it out")
    if "entropy" not in families:
        return
    entropy = families["entropy"]
    if quantiser.writes == "nothing":
        raise CodecError(f"none writes float32 as it is; for {entropy.name} choose another quantiser, such as shuffle")
    if quantiser.writes == "bytes" and not made["entropy"].codes_bytes:
        raise CodecError(f"{entropy.name} codes symbols, and {quantiser.name} has none; choose zstd")
