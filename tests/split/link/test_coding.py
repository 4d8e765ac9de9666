"""Both ends of a session agree on how tensors cross, and stay agreed through every frame and every change of plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import FAMILIES, parse
from isthmus.split.data.sequences import batch_indices, micro_batch_slices
from isthmus.split.errors import BadFrame, BadRequest, BadTensor, CodecError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import (
    ADAPTERS,
    ADAPTERS_CODEC,
    AUTO,
    EVALUATION,
    EVALUATION_CODEC,
    STREAMS,
    TRAINING,
    choices,
    missing_families,
    stream_of,
)
from isthmus.split.link.coding import Coder, Plan, Terms, stream_seed
from isthmus.split.resources.ledger import Ledger

BATCH, LENGTH, HIDDEN, SAMPLES = 4, 6, 32, 7  # fewer samples than two batches: each is seen again soon
CONFIG = TrainingConfig.of(steps=50, batch_size=BATCH, sequence_length=LENGTH)
STATEFUL = [
    "klt,uniform:step=0.13:per=tensor,range",
    "klt:block=16,uniform:step=0.5,zstd",
    "ef,topk:0.05",
    "ef,hadamard,int2",
    "delta,hadamard,int4",
    "delta,klt,uniform:step=0.2,range",
    "ef,powersgd:2",
    "hadamard,int4:stochastic",
    "randtopk:0.1",
]


class Ends:
    """Two ends of one session, and what crosses from one to the other."""

    def __init__(self, plan: Plan) -> None:
        self.near, self.far = Coder(Terms(CONFIG, SAMPLES), Ledger()), Coder(Terms(CONFIG, SAMPLES), Ledger())
        self.use(plan)

    def use(self, plan: Plan) -> None:
        self.near.use(plan)
        self.far.use(Plan.from_proto(plan.to_proto(), BATCH))

    def cross(self, stream: str, tensor: Tensor, step: int, micro_batch: int = 0) -> tuple[Tensor, bytes]:
        sent = self.near.encode(stream, tensor, step, micro_batch)
        message = stage_pb2.Tensor.FromString(sent.SerializeToString())
        expected = self.far.expected(stream, tuple(tensor.shape), tensor.numel())
        return self.far.decode(stream, message, expected, step, micro_batch), sent.payload


def plan_of(codec: str, micro_batches: int = 1, **changes: str) -> Plan:
    codecs = dict.fromkeys(TRAINING, codec) | changes
    return Plan(micro_batches, micro_batches, {stream: parse(name).name for stream, name in codecs.items()}, seed=3)


def hidden_states(step: int, rows: int = BATCH) -> Tensor:
    """Correlated columns of different sizes, as hidden states have, that drift from step to step."""
    generator = torch.Generator().manual_seed(step)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, HIDDEN)
    return (torch.randn(rows, LENGTH, HIDDEN, generator=generator) @ mixing.T) * (1 + step / 50)


def error(decoded: Tensor, tensor: Tensor) -> float:
    return float((decoded - tensor).square().sum() / tensor.square().sum())


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("codec", STATEFUL)
def test_both_ends_stay_the_same_over_many_frames(codec: str, micro_batches: int) -> None:
    ends, again = Ends(plan_of(codec, micro_batches)), Ends(plan_of(codec, micro_batches))
    for step in range(20):
        for micro_batch in range(micro_batches):
            tensor = hidden_states(step, ends.near.rows(micro_batch))
            for stream in TRAINING:
                decoded, payload = ends.cross(stream, tensor, step, micro_batch)
                assert decoded.shape == tensor.shape
                assert payload == again.cross(stream, tensor, step, micro_batch)[1]  # nothing is left to chance
    for stream in TRAINING:
        mine, theirs = ends.near.state_of(stream), ends.far.state_of(stream)
        assert mine is not None
        assert theirs is not None
        assert mine.count == theirs.count == 20 * micro_batches


@pytest.mark.parametrize("codec", ["delta,hadamard,int4", "ef,hadamard,int2"])
def test_a_memory_knows_a_sample_again_whatever_micro_batch_it_is_in(codec: str) -> None:
    """One tensor a sample, the same in every epoch: what comes back gets better, and it would not if samples were
    taken for one another."""
    ends = Ends(plan_of(codec, 3))
    of_sample = torch.randn(SAMPLES, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1))
    errors, kept = [], torch.zeros_like(of_sample)
    for step in range(28):  # 16 epochs
        indices = batch_indices(SAMPLES, BATCH, step, CONFIG.seed)
        for micro_batch, part in enumerate(micro_batch_slices(BATCH, 3)):
            rows = indices[part]
            decoded, _ = ends.cross("hidden_up", of_sample[rows], step, micro_batch)
            kept[rows] += decoded
            errors.append(error(decoded, of_sample[rows]))
    if codec.startswith("delta"):
        assert sum(errors[-12:]) < sum(errors[:6]) / 50
    else:  # of error feedback the mean is right
        count = 28 * BATCH // SAMPLES
        assert error(kept / count, of_sample) < errors[0] / 20


def test_where_both_streams_keep_their_codec_a_new_plan_changes_nothing_of_their_memory() -> None:
    klt = parse(STATEFUL[0]).name
    ends, undisturbed = Ends(plan_of(klt)), Ends(plan_of(klt))
    for step in range(12):
        if step == 6:
            ends.use(plan_of(klt, gradients_up="hadamard,int4", gradients_down="hadamard,int4"))
        _, payload = ends.cross("hidden_up", hidden_states(step), step)
        assert payload == undisturbed.cross("hidden_up", hidden_states(step), step)[1]


def test_a_stream_with_another_codec_begins_anew_at_both_ends() -> None:
    ends = Ends(plan_of(STATEFUL[0]))
    for step in range(4):
        ends.cross("hidden_up", hidden_states(step), step)
    before = ends.near.state_of("hidden_up")
    ends.use(plan_of("delta,hadamard,int4", 2))
    fresh = Ends(plan_of("delta,hadamard,int4", 2))
    assert ends.near.state_of("hidden_up") is not before
    for step in range(4, 8):
        for micro_batch in range(2):
            tensor = hidden_states(step, 2)
            decoded, payload = ends.cross("hidden_up", tensor, step, micro_batch)
            assert payload == fresh.cross("hidden_up", tensor, step, micro_batch)[1]
            assert error(decoded, tensor) < 0.05
    ends.use(plan_of(STATEFUL[0]))  # and back: what klt had learnt has gone
    assert ends.near.state_of("hidden_up").count == ends.far.state_of("hidden_up").count == 0


def test_a_change_of_the_micro_batches_alone_keeps_the_memory() -> None:
    ends = Ends(plan_of("delta,hadamard,int4"))
    of_sample = torch.randn(SAMPLES, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1))
    for step in range(10):
        if step == 5:
            ends.use(plan_of("delta,hadamard,int4", 2))
        indices = batch_indices(SAMPLES, BATCH, step, CONFIG.seed)
        for micro_batch, part in enumerate(micro_batch_slices(BATCH, ends.near.plan.micro_batches)):
            tensor = of_sample[indices[part]]
            decoded, _ = ends.cross("hidden_up", tensor, step, micro_batch)
            if step >= 4:
                assert error(decoded, tensor) < 1e-3  # as a change of what is known, not as new


def test_streams_and_seeds_draw_differently_and_the_same_at_both_ends() -> None:
    assert len({stream_seed(seed, stream) for seed in (0, 1) for stream in STREAMS}) == 2 * len(STREAMS)
    tensor = hidden_states(0)
    payloads = {
        Ends(replace(plan_of("hadamard,int4"), seed=seed)).cross(stream, tensor, 0)[1]
        for seed in (0, 1)
        for stream in TRAINING
    }
    assert len(payloads) == 8


def test_what_crosses_as_it_is_takes_no_codec_and_what_else_is_refused() -> None:
    ends = Ends(plan_of("none"))
    tensor = hidden_states(0)
    decoded, payload = ends.cross("hidden_up", tensor, 0)
    assert torch.equal(decoded, tensor)
    assert len(payload) == 4 * tensor.numel()
    ends.near.use(plan_of("hadamard,int8"))  # one end alone
    with pytest.raises(BadTensor, match=r"codec 'hadamard,int8.*' was not agreed on; agreed: none"):
        ends.cross("hidden_up", tensor, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_tensor_is_an_error_of_who_sends_it(bad: float) -> None:
    ends = Ends(plan_of("hadamard,int4"))
    tensor = hidden_states(0)
    tensor[1, 2, 3] = bad
    with pytest.raises(CodecError, match="NaN or infinity"):
        ends.cross("hidden_up", tensor, 0)


def test_adapters_cross_as_differences_where_their_codec_loses_something() -> None:
    coder = Coder(Terms(CONFIG, SAMPLES), Ledger())
    coder.use(Plan(codecs={"adapters_up": parse(ADAPTERS_CODEC).name, "adapters_down": parse("shuffle,zstd").name}))
    assert coder.adapters_differ("adapters_up")
    assert not coder.adapters_differ("adapters_down")
    coder.use(Plan())
    assert not coder.adapters_differ("adapters_up")


def test_the_ledger_knows_what_coding_took_and_what_it_keeps() -> None:
    ends = Ends(plan_of("delta,klt,uniform,range"))
    for step in range(3):
        ends.cross("hidden_up", hidden_states(step), step)
    (near,) = ends.near._ledger.coding.values()
    (far,) = ends.far._ledger.coding.values()
    values = 3 * BATCH * LENGTH * HIDDEN
    assert (near.encode_values, near.decode_values, far.encode_values, far.decode_values) == (values, 0, 0, values)
    assert near.encode_seconds > 0
    state = ends.near.state_of("hidden_up")
    assert state is not None
    assert ends.near._ledger.codec_memory_bytes >= state.memory_bytes >= SAMPLES // 2 * LENGTH * HIDDEN * 4


@pytest.mark.parametrize(
    ("change", "kind", "line"),
    [
        ({"micro_batches": 0, "depth": 0}, BadFrame, "a plan of 0 micro-batches, 0 under way"),
        ({"micro_batches": 2, "depth": 0}, BadFrame, "2 micro-batches, 0 under way"),
        ({"micro_batches": 2, "depth": 3}, BadFrame, "2 micro-batches, 3 under way"),
        ({"micro_batches": BATCH + 1, "depth": 1}, BadFrame, "5 micro-batches, 1 under way"),
        ({"micro_batches": 2**32 - 1, "depth": 2**32 - 1}, BadFrame, "4294967295 micro-batches"),
        ({"codecs": {"sideways": "none"}}, BadFrame, "a stream that there is not: 'sideways'"),
        ({"codecs": {"hidden_up": "zip"}}, CodecError, "no part of a codec is called 'zip'"),
        ({"codecs": {"hidden_up": ""}}, CodecError, "no part of a codec is called ''"),
        ({"codecs": {"hidden_up": "int4:block=1"}}, CodecError, "choose 4 to 65536"),
        ({"codecs": {"hidden_up": "x" * 10_000}}, CodecError, "has 10000 characters"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(change: dict, kind: type[Exception], line: str) -> None:
    message = stage_pb2.Plan(**{"micro_batches": 1, "depth": 1, **change})
    with pytest.raises(kind, match=line) as refused:
        Plan.from_proto(message, BATCH)
    assert len(str(refused.value)) < 400


def test_a_plan_survives_the_way_to_the_other_side() -> None:
    plan = plan_of("klt,uniform,range", 3, adapters_up=ADAPTERS_CODEC)
    assert Plan.from_proto(stage_pb2.Plan.FromString(plan.to_proto().SerializeToString()), BATCH) == plan
    written = stage_pb2.Plan(micro_batches=1, depth=1, codecs={"hidden_up": "int4:block=32,hadamard"})
    assert Plan.from_proto(written, BATCH).codec_of("hidden_up") == "hadamard,int4:block=32"
    assert Plan.from_proto(written, BATCH).codec_of("hidden_down") == "none"


INT8, INT4, HADAMARD = parse("int8").name, parse("int4").name, parse("hadamard,int8").name
AFTER_LOSS = {
    **dict.fromkeys(ADAPTERS, parse(ADAPTERS_CODEC).name),
    **dict.fromkeys(EVALUATION, parse(EVALUATION_CODEC).name),
}
EXACT = dict.fromkeys((*ADAPTERS, *EVALUATION), "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", {**dict.fromkeys(TRAINING, AUTO), **AFTER_LOSS}),
        ("none", {**dict.fromkeys(TRAINING, "none"), **EXACT}),
        ("lossless", {**dict.fromkeys(TRAINING, parse("shuffle,zstd").name), **EXACT}),
        ("int8", {**dict.fromkeys(TRAINING, INT8), **AFTER_LOSS}),
        (" int8 , hadamard ", {**dict.fromkeys(TRAINING, HADAMARD), **AFTER_LOSS}),
        ("int4:block=64", {**dict.fromkeys(TRAINING, INT4), **AFTER_LOSS}),  # the equals sign is the codec's
        (
            "up=int8",
            {"hidden_up": INT8, "gradients_up": INT8, "hidden_down": AUTO, "gradients_down": AUTO, **AFTER_LOSS},
        ),
        (
            "up=int8;down=int4:block=64",
            {"hidden_up": INT8, "gradients_up": INT8, "hidden_down": INT4, "gradients_down": INT4, **AFTER_LOSS},
        ),
        (
            "hidden=int8;gradients=int4;hidden_down=none",  # a later one overrides an earlier one
            {"hidden_up": INT8, "gradients_up": INT4, "hidden_down": "none", "gradients_down": INT4, **AFTER_LOSS},
        ),
        ("hidden_down=none;hidden=int8", {"hidden_up": INT8, "hidden_down": INT8}),
        (
            "int8;up=int4;",  # the first may be of all hidden states and gradients
            {"hidden_up": INT4, "gradients_up": INT4, "hidden_down": INT8, "gradients_down": INT8, **AFTER_LOSS},
        ),
        ("adapters_up=delta,int8;evaluation_up=klt,uniform", {"adapters_up": parse("delta,int8").name}),
        ("hidden=none;gradients=none", {**dict.fromkeys(TRAINING, "none"), **EXACT}),
        ("hidden=none;gradients=none;adapters=int8", {**EXACT, **dict.fromkeys(ADAPTERS, INT8)}),
        ("adapters=none", {**dict.fromkeys(TRAINING, AUTO), **AFTER_LOSS, **dict.fromkeys(ADAPTERS, "none")}),
        ("evaluation=none;adapters_up=int8", {"adapters_up": INT8, **dict.fromkeys(EVALUATION, "none")}),
        ("gradients=auto;hidden=int8", {"gradients_up": AUTO, "gradients_down": AUTO, "hidden_up": INT8}),
    ],
)
def test_what_a_user_writes_means_a_codec_for_every_stream(text: str, expected: dict[str, str]) -> None:
    chosen = choices(text)
    assert set(chosen) == set(STREAMS)
    assert {stream: chosen[stream] for stream in expected} == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "--codec is empty; write auto, none, a codec"),
        (" ; ", "--codec is empty"),
        ("zip", "no part of a codec is called 'zip'"),
        ("sideways=int8", "no KEY called 'sideways'; keys are up, down, hidden"),
        ("up=", "no part of a codec is called ''"),
        ("up=int8;int4", "'int4' has no KEY=, and is not the first; keys are up, down, hidden"),
        ("evaluation=delta,int4", "held-out samples are not remembered"),
        ("adapters=delta,int4", "adapters_down cannot have delta"),
        ("hadamard", "hadamard needs a quantiser"),
        ("up=none,zstd", "choose another quantiser"),
    ],
)
def test_what_means_nothing_is_refused_with_one_line(text: str, line: str) -> None:
    with pytest.raises(BadRequest, match=line) as refused:
        choices(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "known", "missing"),
    [
        ("none", ["none"], []),
        ("none", [], ["none"]),
        ("auto", sorted(FAMILIES), []),
        ("auto", ["none"], ["hadamard", "uniform", "zstd"]),  # of adapters and evaluation, which are not chosen
        ("auto", ["none", "hadamard", "uniform", "zstd"], []),
        ("klt,int4", ["none", "hadamard", "uniform", "zstd"], ["int4", "klt"]),
        ("up=int4;down=none;adapters=none;evaluation=none", ["none"], ["int4"]),
    ],
)
def test_a_side_is_told_which_families_it_lacks(text: str, known: list[str], missing: list[str]) -> None:
    assert missing_families(text, known) == missing


def test_every_tensor_of_a_frame_is_of_one_stream() -> None:
    phase = stage_pb2.Phase
    for labels in ("device", "server"):
        assert stream_of(phase.FORWARD, True, labels) == "hidden_up"
        assert stream_of(phase.AGGREGATE, True, labels) == "adapters_up"
        assert stream_of(phase.AGGREGATE, False, labels) == "adapters_down"
        assert stream_of(phase.EVALUATE, True, labels) == "evaluation_up"
        assert stream_of(phase.OPEN, False, labels) == ""
    assert stream_of(phase.FORWARD, False, "device") == "hidden_down"
    assert stream_of(phase.FORWARD, False, "server") == "gradients_down"
    assert stream_of(phase.BACKWARD, True, "device") == "gradients_up"
    assert stream_of(phase.BACKWARD, False, "device") == "gradients_down"
    assert stream_of(phase.EVALUATE, False, "device") == "evaluation_down"
