"""Devices that differ in cut and rank: still the training of the joined batch, and still plain peft at the end."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import FAMILIES
from isthmus.split.errors import BadRequest, BadTensor, WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, fixed_shapes
from isthmus.split.link.device import LocalLink
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.lora.lora import lora_config, lora_parameters, save_adapter
from isthmus.split.models.source import ModelFolder
from isthmus.split.plan.parts import device_stages
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.loss import nll
from tests.split.jobs import device_trainer, job_host, random_text, split_run, unsplit_run
from tests.split.tiny_models import VOCABULARY, make_model
from tests.split.training.test_host import Job
from tests.split.training.test_splitlora import CONFIG, _assert_same, _texts, _trained

SGD = CONFIG.but(optimizer="sgd", learning_rate=0.5, weight_decay=0.0, max_gradient_norm=0.0, aggregate_every=1)
MIXED = CONFIG.but(cuts="d0=3,d1=1,2", ranks="d0=4,d1=2,1", optimizer="sgd", learning_rate=0.5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=4)


def logits_of(folder: Path, config: TrainingConfig, adapter: dict[str, Tensor], out: Path) -> Tensor:
    """Of the exported adapter in plain transformers and peft."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_adapter(out, adapter, lora_config(config, base.config), str(folder))
    model = PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        return model(input_ids=random_text(77, 4, 16, VOCABULARY).input_ids).logits


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("cuts", ["d0=3,d1=1,2", "d0=2,d1=0,2", "d0=0,d1=1,3"])
def test_different_cuts_with_sgd_and_aggregation_every_step_equal_training_on_the_joined_batch(
    llama: Path, labels: str, cuts: str
) -> None:
    config = SGD.but(labels=labels, cuts=cuts)
    losses, adapter = unsplit_run(llama, config, _texts(3))
    run = split_run(llama, config, _texts(3))
    assert _trained(adapter)
    assert run.outcome.losses == pytest.approx(losses, rel=1e-5)
    _assert_same(run.adapter, adapter, 1e-5)


def test_different_cuts_with_micro_batches_and_clipping_train_like_whole_batches(llama: Path) -> None:
    config = CONFIG.but(cuts="d0=3,d1=1,2", aggregate_every=2)
    whole = split_run(llama, config, _texts(3))
    cut = split_run(llama, config.but(micro_batches=2), _texts(3))
    assert cut.outcome.losses == pytest.approx(whole.outcome.losses, rel=1e-5)
    _assert_same(cut.adapter, whole.adapter, 1e-5)


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize(("cut", "rank"), [(1, 2), (3, 4)])
def test_one_device_with_a_cut_and_rank_of_its_own_is_plain_peft(llama: Path, labels: str, cut: int, rank: int) -> None:
    """With the job's rank for its own the result is that of unsplit peft; the server's blocks keep the job's."""
    config = CONFIG.but(labels=labels, cuts=f"d0={cut},1", ranks=f"d0={rank},4")
    run = split_run(llama, config, _texts(1))
    if rank == 4:
        losses, adapter = unsplit_run(llama, config, _texts(1))
        assert run.outcome.losses == pytest.approx(losses, rel=1e-5)
        _assert_same(run.adapter, adapter, 1e-5)
    else:
        assert run.outcome.losses[-1] < run.outcome.losses[0]


@pytest.mark.parametrize("aggregation", ["padding", "stacking", "svd"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_aggregation_trains_devices_of_all_ranks_and_exports_what_they_compute(
    tmp_path: Path, architecture: str, aggregation: str
) -> None:
    folder = make_model(tmp_path / "model", architecture, layers=4)
    config = MIXED.but(aggregation=aggregation, ranks="d0=4,d1=2,d2=0", learning_rate=0.3)
    config = config.but(validation_fraction=0.1)
    held_out = [random_text(50 + i, 6, 16, VOCABULARY) for i in range(3)]
    run = split_run(folder, config, _texts(3), held_out)
    assert run.outcome.losses[-1] < run.outcome.losses[0]
    errors = [event.aggregation.aggregation_error for event in run.events if event.HasField("aggregation")]
    assert len(errors) == 4
    assert (max(errors) < 1e-5) == (aggregation == "stacking")
    assert all(event.aggregation.method == aggregation for event in run.events if event.HasField("aggregation"))
    logits_of(folder, config, run.adapter, tmp_path / "adapter")  # loads


def test_what_stacking_exports_has_ranks_by_module_and_computes_what_the_split_computed(
    llama: Path, tmp_path: Path
) -> None:
    held_out = [random_text(50 + i, 6, 16, VOCABULARY) for i in range(2)]
    config = MIXED.but(aggregation="stacking", validation_fraction=0.1)
    run = split_run(llama, config, _texts(2), held_out)
    ranks = {name: value.shape[0] for name, value in run.adapter.items() if name.endswith("lora_A.weight")}
    assert ranks["model.layers.0.self_attn.q_proj.lora_A.weight"] == 4 * (4 + 2)  # rounds of all ranks there are
    assert ranks["model.layers.1.self_attn.q_proj.lora_A.weight"] == 4 * (4 + 4)  # the server's copy stands for d1
    assert ranks["model.layers.3.self_attn.q_proj.lora_A.weight"] == 4
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    save_adapter(tmp_path / "adapter", run.adapter, lora_config(config, base.config), str(llama))
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        sums = [nll(model(input_ids=text.input_ids).logits, text.labels) for text in held_out]
    plain = torch.tensor(sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums)).exp()
    assert run.outcome.perplexities[20] == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "codec"),
    [
        ("average", "none"),
        ("padding", "int8"),
        ("stacking", "none"),
        ("svd", "int8"),
        pytest.param("average", "int8", marks=pytest.mark.exhaustive),
        pytest.param("padding", "none", marks=pytest.mark.exhaustive),
        pytest.param("stacking", "int8", marks=pytest.mark.exhaustive),
        pytest.param("svd", "none", marks=pytest.mark.exhaustive),
    ],
)
def test_a_resumed_job_of_different_devices_ends_where_an_uninterrupted_one_does(
    llama: Path, tmp_path: Path, aggregation: str, codec: str
) -> None:
    ranks = "" if aggregation == "average" else "d0=4,1"
    config = CONFIG.but(cuts="d0=3,1", ranks=ranks, aggregation=aggregation, checkpoint_every=10, codec=codec)
    kept = tmp_path / "whole"
    whole = split_run(llama, config, _texts(2), checkpoints=kept)
    for folder in kept.glob("*/step-00000020"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = split_run(llama, config, _texts(2), checkpoints=kept, resume=True)
    assert [event.step.step for event in resumed.events if event.HasField("step")] == list(range(11, 21))
    assert resumed.outcome.losses == pytest.approx(whole.outcome.losses, rel=1e-6 if codec == "none" else 0.02)
    _assert_same(resumed.adapter, whole.adapter, 1e-6 if codec == "none" else 0.1)


@pytest.mark.parametrize(("before", "then"), [("", "d0=4,d1=2"), ("d0=4,d1=2", "")])
def test_a_checkpoint_of_devices_that_were_alike_is_none_for_those_that_differ(
    llama: Path, tmp_path: Path, before: str, then: str
) -> None:
    config = CONFIG.but(steps=5, checkpoint_every=5)
    split_run(llama, config.but(ranks=before), _texts(2), checkpoints=tmp_path)
    with pytest.raises(WrongState, match="resume the job with those that it had"):
        split_run(llama, config.but(ranks=then), _texts(2), checkpoints=tmp_path, resume=True)


class Devices(Job):
    """As in test_host, of devices that differ."""

    def __init__(self, folder: Path, config: TrainingConfig, names: list[str]) -> None:
        shapes = fixed_shapes(config, names)
        self.trainers = {}
        for i, name in enumerate(names):
            train, held_out = random_text(i, 20, 16, VOCABULARY), random_text(90 + i, 3, 16, VOCABULARY)
            self.trainers[name] = device_trainer(folder, config, train, held_out, shapes[name])
        self.events = []
        self.finished = threading.Event()
        self.config = config
        self.host = job_host(folder, config, names, shapes=shapes, tell=self._tell)
        self.errors = {}


LEAVING = CONFIG.but(steps=12, cuts="a=3,b=1,c=2", ranks="a=4,b=0,c=2", aggregate_every=2, validation_fraction=0.1,
    learning_rate=1e-3, warmup_steps=0,
)  # fmt: skip


@pytest.mark.parametrize("aggregation", ["padding", "stacking", "svd"])
@pytest.mark.parametrize("leaves", ["a", "b"])
@pytest.mark.parametrize("frames", [4, 9])
def test_devices_of_any_shape_leave_and_come_back(llama: Path, leaves: str, frames: int, aggregation: str) -> None:
    job = Devices(llama, LEAVING.but(aggregation=aggregation), ["a", "b", "c"])
    job.run({name: {"cut_after": frames, "rejoin": True} if name == leaves else {} for name in "abc"})
    assert not job.errors
    assert [step.step for step in job.steps()] == list(range(1, 13))
    assert 12 in job.host.outcome().perplexities
    assert all(torch.isfinite(value).all() for value in job.host.outcome().adapter.values())


@pytest.mark.parametrize("aggregation", ["average", "stacking", "svd"])
@pytest.mark.parametrize("frames", range(5, 40, 8))
def test_the_only_device_with_a_shape_of_its_own_loses_its_link_and_ends_with_the_same_adapter(
    llama: Path, aggregation: str, frames: int
) -> None:
    config = LEAVING.but(cuts="a=3,1", ranks="" if aggregation == "average" else "a=2,4")
    config = config.but(aggregation=aggregation)
    undisturbed, disturbed = (Devices(llama, config, ["a"]) for _ in range(2))
    undisturbed.run({"a": {}})
    disturbed.run({"a": {"cut_after": frames, "rejoin": True}})
    assert disturbed.host.outcome().losses == undisturbed.host.outcome().losses
    ends, expected = (one.host.outcome().adapter for one in (disturbed, undisturbed))
    assert ends.keys() == expected.keys()
    assert all(torch.equal(ends[name], value) for name, value in expected.items())


def test_a_device_with_an_adapter_of_another_shape_is_not_let_in(llama: Path) -> None:
    job = Devices(llama, LEAVING, ["a", "b", "c"])
    link = LocalLink(job.host, "c", job.trainers["a"].terms, Ledger(), timeout=10)
    values = sum(value.numel() for value in job.trainers["a"].parameters.values())
    opened = stage_pb2.Open(codecs=sorted(FAMILIES), samples=5, adapter_values=values)
    link.send(Frame(Phase.OPEN, open=opened))
    with pytest.raises(BadRequest, match=f"an adapter of {values} values; c has "):
        link.receive()
    job.host.close()


def test_adapters_of_a_lower_rank_begin_as_the_first_rows_of_those_of_a_higher_one(llama: Path) -> None:
    source, config = ModelFolder(llama), CONFIG.but(rank=8)
    high, low = (lora_parameters(device_stages(source, config, Shape(2, rank), "cpu")) for rank in (8, 3))
    for name, value in low.items():
        assert torch.equal(value, high[name][:3] if "lora_A" in name else high[name][:, :3])


@pytest.mark.parametrize("aggregation", ["padding", "stacking", "svd"])
@pytest.mark.parametrize("value", [1e30, 1e12])
def test_an_adapter_whose_products_overflow_is_merged_with_no_other(
    llama: Path, aggregation: str, value: float
) -> None:
    job = Devices(llama, LEAVING.but(aggregation=aggregation), ["a", "b", "c"])
    job.run({"a": {}, "b": {}, "c": {"large": (Phase.AGGREGATE, 3, value)}})
    assert job.errors.keys() == {"c"}
    assert isinstance(job.errors["c"], BadTensor)
    assert [step.step for step in job.steps()] == list(range(1, 13))
    merged = job.host.outcome().adapter
    assert merged is not None
    assert all(value.abs().max() < 10 for value in merged.values())
