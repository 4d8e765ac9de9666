"""A cut that moves in the middle of a job: its blocks and their adapters move along, and training goes on as it was."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, from_plain
from isthmus.split.link.device import LocalLink
from isthmus.split.link.profile import LinkProfile
from isthmus.split.plan.costs import Costs
from isthmus.split.plan.cut_mover import CutMover, MeasuredDevice
from isthmus.split.plan.shapes import Capabilities, ShapeChoice, choose_shapes
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.checkpoint import CheckpointFolder
from tests.split.jobs import device_trainer, job_host, random_text, split_run, unsplit_run
from tests.split.tiny_models import VOCABULARY, make_model
from tests.split.training.test_heterogeneous import SGD
from tests.split.training.test_host import CutLink
from tests.split.training.test_splitlora import CONFIG, _assert_same, _texts

AUTO = SGD.but(cuts="auto")
START = {"d0": Shape(1, 4), "d1": Shape(2, 4)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=4)


class Scripted(CutMover):
    """Moves what it is told to, by the number of the aggregation."""

    def __init__(self, moves: Mapping[int, Mapping[str, int]]) -> None:
        self.moves, self.number = moves, 0

    def look(
        self, shapes: Mapping[str, Shape], seen: Mapping[str, MeasuredDevice], stage_seconds: float
    ) -> dict[str, ShapeChoice]:
        self.number += 1
        return {
            device: ShapeChoice(dataclasses.replace(shapes[device], cut=cut), 1.0, 1.0, 2.0**30)
            for device, cut in self.moves.get(self.number, {}).items()
        }


MOVES = {3: {"d0": 3}, 6: {"d1": 1}, 10: {"d0": 1, "d1": 3}, 15: {"d0": 2}}


@pytest.mark.parametrize("labels", ["device", "server"])
def test_with_sgd_a_job_whose_cuts_move_is_still_training_on_the_joined_batch(llama: Path, labels: str) -> None:
    config = AUTO.but(labels=labels)
    losses, adapter = unsplit_run(llama, config, _texts(2))
    run = split_run(llama, config, _texts(2), shapes=START, mover=Scripted(MOVES))
    moved = [(event.shape.cut, event.device) for event in run.events if event.HasField("shape")]
    assert moved == [(3, "d0"), (1, "d1"), (1, "d0"), (3, "d1"), (2, "d0")]
    assert run.outcome.losses == pytest.approx(losses, rel=1e-5)
    _assert_same(run.adapter, adapter, 1e-5)


@pytest.mark.parametrize(
    ("aggregation", "codec"),
    [
        ("average", "none"),
        ("svd", "int8"),
        ("stacking", "none"),
        pytest.param("average", "int8", marks=pytest.mark.exhaustive),
        pytest.param("svd", "none", marks=pytest.mark.exhaustive),
        pytest.param("stacking", "int8", marks=pytest.mark.exhaustive),
    ],
)
def test_with_adamw_the_loss_curve_does_not_jump_where_a_cut_moves(llama: Path, aggregation: str, codec: str) -> None:
    """The same samples at every step, with moves and without."""
    ranks = "" if aggregation == "average" else "d0=4,d1=2"
    config = CONFIG.but(cuts="auto", ranks=ranks, aggregation=aggregation, steps=40, aggregate_every=2, codec=codec)
    shapes = START if not ranks else {"d0": Shape(1, 4), "d1": Shape(2, 2)}
    still = split_run(llama, config, _texts(2), shapes=shapes, mover=Scripted({}))
    moved = split_run(llama, config, _texts(2), shapes=shapes, mover=Scripted(MOVES))
    assert sum(event.HasField("shape") for event in moved.events) == 5
    apart = [abs(one - other) for one, other in zip(moved.outcome.losses, still.outcome.losses, strict=True)]
    usual = max(abs(one - other) for one, other in zip(still.outcome.losses, still.outcome.losses[1:], strict=False))
    assert max(apart) < 0.5 * usual
    for number in MOVES:  # the first loss after a move: nothing was trained in between
        assert apart[2 * number] <= apart[2 * number - 1] + 0.1 * usual


def test_a_job_that_is_resumed_after_a_move_has_the_cuts_that_it_had(llama: Path, tmp_path: Path) -> None:
    config = AUTO.but(checkpoint_every=10, aggregate_every=2)
    kept = tmp_path / "whole"
    whole = split_run(llama, config, _texts(2), checkpoints=kept, shapes=START, mover=Scripted({2: {"d0": 3, "d1": 1}}))
    for folder in kept.glob("*/step-00000020"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    last = CheckpointFolder(kept / "server").last()
    assert last is not None
    shapes = from_plain(last.shapes)
    assert shapes == {"d0": Shape(3, 4), "d1": Shape(1, 4)}
    resumed = split_run(llama, config, _texts(2), checkpoints=kept, resume=True, shapes=shapes, mover=Scripted({}))
    assert resumed.outcome.losses == pytest.approx(whole.outcome.losses, rel=1e-6)
    _assert_same(resumed.adapter, whole.adapter, 1e-6)


@pytest.mark.parametrize("frames", range(8, 16))
def test_a_device_whose_link_breaks_at_a_move_ends_with_the_very_same_adapter(llama: Path, frames: int) -> None:
    """Whether it has heard of its new cut or not."""
    ends = [_alone(llama, None), _alone(llama, frames)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


@functools.cache
def _alone(folder: Path, cut_after: int | None) -> dict[str, torch.Tensor]:
    config = AUTO.but(steps=8, aggregate_every=2)
    shape, finished = Shape(1, 4), threading.Event()

    def tell(event: Event) -> None:
        if event.HasField("finished") or event.HasField("failed"):
            finished.set()

    mover = Scripted({1: {"a": 3}, 2: {"a": 2}})
    host = job_host(folder, config, ["a"], shapes={"a": shape}, mover=mover, tell=tell)
    trainer = device_trainer(folder, config, random_text(0, 20, 16, VOCABULARY), shape=shape, moves=True)
    if cut_after is not None:
        with pytest.raises(Exception, match="the link was cut"):
            trainer.run(CutLink(host, "a", trainer.terms, cut_after), cancelled=threading.Event())
    trainer.run(LocalLink(host, "a", trainer.terms, Ledger()), cancelled=threading.Event())
    assert finished.wait(60)
    host.close()
    return host.outcome().adapter or {}


MODEL = LlamaConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip
COSTS = Costs(MODEL, TrainingConfig.of(cuts="c=2,auto", codec="none", batch_size=8, sequence_length=128))
LINK = LinkProfile(0.001, 1e8, 1e8)


def _seen(shapes: Mapping[str, Shape], flops: Mapping[str, float]) -> dict[str, MeasuredDevice]:
    return {
        name: MeasuredDevice(COSTS.device_work(shape.cut, shape.rank) / flops[name], LINK)
        for name, shape in shapes.items()
    }


def test_a_cut_moves_only_after_the_device_has_been_slow_for_several_rounds() -> None:
    mover = CutMover(COSTS)
    usual = {"a": 2e10, "b": 2e10, "c": 2e10}
    able = {name: Capabilities(flops, link=LINK) for name, flops in usual.items()}
    shapes = {name: choice.shape for name, choice in choose_shapes(COSTS, able, Capabilities(2e10)).items()}
    even, slow = _seen(shapes, usual), _seen(shapes, {**usual, "a": 2e9})
    stage = COSTS.server_work(shape.cut for shape in shapes.values()) / 2e10
    looks = [mover.look(shapes, seen, stage) for seen in (slow, slow, even, slow, slow)]
    assert looks == [{}] * 5  # it never lasted
    moved = mover.look(shapes, slow, stage)
    assert moved.keys() <= {"a", "b"}  # the cut of c is fixed
    assert moved["a"].shape.cut < shapes["a"].cut
    assert moved["a"].shape.rank == 8
    after = {**shapes, **{name: choice.shape for name, choice in moved.items()}}
    seen = _seen(after, {**usual, "a": 2e9})
    stage = COSTS.server_work(shape.cut for shape in after.values()) / 2e10
    assert [mover.look(after, seen, stage) for _ in range(6)] == [{}] * 6  # and stays where it is


def test_a_device_that_is_fast_again_gets_its_blocks_back() -> None:
    mover = CutMover(COSTS)
    shapes = {"a": Shape(1, 8), "c": Shape(2, 8)}
    seen = _seen(shapes, {"a": 1e11, "c": 1e11})
    stage = COSTS.server_work(shape.cut for shape in shapes.values()) / 5e9
    looks = [mover.look(shapes, seen, stage) for _ in range(3)]
    assert looks[:2] == [{}, {}]
    assert looks[2]["a"].shape.cut > 1


def test_a_device_without_work_of_its_own_does_not_keep_the_cuts_of_others_from_moving() -> None:
    """One that has only the embedding: its labels, and so its head, are at the server."""
    mover = CutMover(dataclasses.replace(COSTS, training=COSTS.training.but(cuts="c=0,auto", labels="server")))
    shapes = {"a": Shape(1, 8), "c": Shape(0, 8)}
    seen = {"a": MeasuredDevice(mover.costs.device_work(1, 8) / 1e11, LINK), "c": MeasuredDevice(0.001, LINK)}
    stage = mover.costs.server_work(shape.cut for shape in shapes.values()) / 5e9
    looks = [mover.look(shapes, seen, stage) for _ in range(3)]
    assert looks[:2] == [{}, {}]
    assert looks[2].keys() == {"a"}
    assert looks[2]["a"].shape.cut > 1


def test_nothing_moves_without_measurements() -> None:
    mover = CutMover(COSTS)
    shapes = {"a": Shape(5, 8)}
    assert [mover.look(shapes, {"a": MeasuredDevice(0.0, LINK)}, 1.0) for _ in range(5)] == [{}] * 5
    assert [mover.look(shapes, {"a": MeasuredDevice(100.0, LINK)}, 0.0) for _ in range(5)] == [{}] * 5
