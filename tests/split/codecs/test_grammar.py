"""Names of codecs: what they stand for, and what is said to those that stand for nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.split.codecs import FAMILIES, Codec, parse
from isthmus.split.codecs.grammar import ALIASES, KINDS, Family
from isthmus.split.codecs.plain import Plain
from isthmus.split.errors import CodecError
from tests.examples import examples


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int4", "int4"),
        ("int4:block=64,hadamard", "hadamard,int4"),
        (" hadamard , int4:32 ", "hadamard,int4:block=32"),
        ("int4:stochastic:block=32", "int4:block=32:stochastic"),
        ("int4:row", "int4:row"),
        ("int2:stochastic:row", "int2:row:stochastic"),
        ("topk:0.05", "topk"),
        ("topk:share=0.10", "topk:share=0.1"),
        ("topk:1e-3:values=int8", "topk:share=0.001:values=int8"),
        ("randtopk:0.05:alpha=0.1", "randtopk"),
        ("randtopk:alpha=.25", "randtopk:alpha=0.25"),
        ("zstd,topk:0.2,ef", "ef,topk:share=0.2,zstd"),
        ("lossless", "shuffle,zstd"),
        ("zstd,shuffle", "shuffle,zstd"),
        ("powersgd:4", "powersgd"),
        ("powersgd:rank=8,ef", "ef,powersgd:rank=8"),
        ("lowrank:32", "lowrank:rank=32"),
        ("fp8:block=128", "fp8:block=128"),
        ("none", "none"),
        ("hadamard,none", "hadamard,none"),
        ("range,uniform:step=0.26:per=row,klt", "klt,uniform:step=0.26,range"),
        ("int4:block=0064", "int4"),
        ("int4,zstd:level=3", "int4,zstd:level=3"),
    ],
)
def test_the_canonical_name(text: str, name: str) -> None:
    assert parse(text).name == name
    assert parse(name) == parse(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("int5", "no part of a codec is called 'int5'; choose from ef, delta, hadamard, .*, range, lossless"),
        ("", "no part of a codec is called ''; choose from"),
        ("int4,", "no part of a codec is called ''"),
        ("int4\n", None),
        ("in\nt4", r"called 'in\\nt4'"),
        ("int4:blocks=32", "int4 has no parameter 'blocks=32'; it has block=64, row, stochastic"),
        ("hadamard:7,int4", "hadamard has no parameter '7'; it has none"),
        ("int4:32:64", "int4 has no parameter '64'"),
        ("int4:", "block of int4 is ''; choose a whole number from 4 to 65536"),
        ("int4:block=32:block=32", "block of int4 is given twice"),
        ("int4:row:row", "row of int4 is given twice"),
        ("int4:row=1", "row of int4 takes no value; write int4:row"),
        ("int4:row:block=32", "leave row or block out"),
        ("int4:block=2", "block of int4 is 2; choose 4 to 65536"),
        ("int4:block=32.5", "block of int4 is '32.5'; choose a whole number"),
        ("int4:block=1_0", "choose a whole number"),
        ("int4:block=٣٢", "choose a whole number"),
        ("int4:block=" + "9" * 150, "choose 4 to 65536"),
        ("topk:0", "share of topk is 0; choose 0.0001 to 1"),
        ("topk:nan", "share of topk is 'nan'; choose a number from"),
        ("topk:inf", "share of topk is 'inf'"),
        ("topk:1e999", "share of topk is 1e999; choose 0.0001 to 1"),
        ("topk:-1", "share of topk is -1; choose 0.0001 to 1"),
        ("topk:values=int4", "values of topk is 'int4'; choose bfloat16 or float16 or int8"),
        ("int4,int8", "int4 and int8 are each a codec's quantiser; leave one out"),
        ("lossless,int8", "int8 and shuffle are each a codec's quantiser"),
        ("int4,zstd,range", "range and zstd are each a codec's entropy"),
        ("hadamard", "hadamard needs a quantiser: add one of none, shuffle, float16"),
        ("ef,zstd", "ef, zstd needs a quantiser"),
        ("topk,range", "range codes symbols, and topk has none; choose zstd"),
        ("shuffle,range", "range codes symbols, and shuffle has none"),
        ("none,zstd", "none writes float32 as it is; for zstd choose another quantiser, such as shuffle"),
        ("ef,none", "ef is of no use: none loses nothing; leave it out"),
        ("delta,lossless", "delta is of no use: shuffle loses nothing"),
        ("lossless:3", "lossless takes no parameters: it is shuffle,zstd"),
        ("INT4", "no part of a codec is called 'INT4'"),
        ("int4," * 50, "the name of a codec has 250 characters; at most 200 are read"),
    ],
)
def test_what_is_no_codec_is_refused_with_a_line_that_says_what_to_write(text: str, line: str | None) -> None:
    if line is None:
        parse(text)
        return
    with pytest.raises(CodecError, match=line) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_a_codec_without_an_entropy_coder_packs_bits() -> None:
    assert isinstance(parse("int4").entropy, Plain)


def test_the_same_name_gives_the_same_codec() -> None:
    assert parse("hadamard,int4") is parse("hadamard,int4")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_says_what_it_is_for_what_it_costs_and_what_it_takes(family: Family) -> None:
    assert family.kind in KINDS
    assert (family.writes in ("symbols", "bytes", "nothing")) == (family.kind == "quantiser")
    assert all("\n" not in line and 5 < len(line) < 120 for line in (family.what, family.cost))
    for parameter in family.parameters:
        assert parameter.help
        assert parameter.range
        if parameter.type in (int, float):
            assert isinstance(parameter.default, int | float)
            assert parameter.low <= parameter.default <= parameter.high
    bare = family.name if family.kind == "quantiser" else f"int4,{family.name}"
    assert family.name in parse(bare).name.split(",")


def _values(family: Family) -> st.SearchStrategy[str]:
    """A part, with some of its parameters."""
    arguments = []
    for parameter in family.parameters:
        if parameter.type is bool:
            arguments.append(st.just(parameter.name))
        elif parameter.choices:
            arguments.append(st.sampled_from([f"{parameter.name}={choice}" for choice in parameter.choices]))
        elif parameter.type is int:
            numbers = st.integers(int(parameter.low), int(parameter.high))
            arguments.append(numbers.map(f"{parameter.name}={{}}".format))
        else:
            floats = st.floats(parameter.low, parameter.high)
            arguments.append(floats.map(f"{parameter.name}={{!r}}".format))
    given_ = st.tuples(*(st.none() | argument for argument in arguments))
    return given_.map(lambda some: ":".join([family.name, *(one for one in some if one is not None)]))


def _part(kind: str) -> st.SearchStrategy[str]:
    return st.sampled_from([family for family in FAMILIES.values() if family.kind == kind]).flatmap(_values)


names = st.tuples(*(_part(kind) if kind == "quantiser" else st.just("") | _part(kind) for kind in KINDS)).flatmap(
    lambda parts: st.permutations([part for part in parts if part])
)
pieces = st.sampled_from(
    [*FAMILIES, *ALIASES, ",", ":", "=", "block", "row", "64", "0.05", "-", " ", "stochastic", "é"]
)


@settings(max_examples=examples(500), deadline=None, derandomize=True)
@given(st.text(max_size=220) | names.map(",".join) | st.lists(pieces, max_size=12).map("".join))
def test_any_text_is_a_codec_with_a_lasting_name_or_is_refused(text: str) -> None:
    try:
        codec = parse(text)
    except CodecError:
        return
    assert isinstance(codec, Codec)
    again = parse(codec.name)
    assert again.name == codec.name
    assert again == codec
