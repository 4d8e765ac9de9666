"""A federated method on the two skeletons: what is its own is a few lines, and it has all that every method has.

Each device has the whole model and trains LoRA on its own text; what crosses is adapters, at aggregations.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.aggregation.averager import Share
from isthmus.split.data.sequences import Sequences
from isthmus.split.errors import BadRequest, LinkLost
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.coding import Plan
from isthmus.split.link.device import Link, LocalLink
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.lora.lora import add_lora, flatten, lora_config, lora_parameters
from isthmus.split.models.source import ModelFolder
from isthmus.split.models.stage import Stage, StageSpec, build_stages
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.averages import AggregationResult, Averages
from isthmus.split.training.checkpoint import Checkpoint, CheckpointFolder, DeviceRecord
from isthmus.split.training.device import DeviceTrainer
from isthmus.split.training.device_steps import Batch, DeviceContext, DeviceSteps, Gradients
from isthmus.split.training.digests import check_holds
from isthmus.split.training.host import JobHost
from isthmus.split.training.hosted_job import HostContext
from isthmus.split.training.loss import nll
from isthmus.split.training.optim import Stepper
from isthmus.split.training.patience import Patience
from isthmus.split.training.steps import HostSteps
from tests.split.jobs import random_text
from tests.split.tiny_models import VOCABULARY, make_model

CONFIG = TrainingConfig.of(
    steps=8, batch_size=2, sequence_length=8, precision="float32", rank=2, learning_rate=1e-2, warmup_steps=0,
    aggregate_every=2, checkpoint_every=4, validation_fraction=0.1, codec="none", micro_batches=1,
)  # fmt: skip


class ToyHost(HostSteps):
    """Averages; computes nothing itself."""

    def __init__(self, config: TrainingConfig, initial: Mapping[str, Tensor], hidden_size: int) -> None:
        self.ledger, self.hidden_size, self.digest = Ledger(), hidden_size, ""
        self._averages = Averages(config, initial)

    def adapter_values(self, device: str) -> int:
        return self._averages.initial.numel()

    def adapter_shapes(self, device: str) -> tuple[tuple[int, ...], ...]:
        return self._averages.shapes

    def check_open(self, device: str, opened: stage_pb2.Open) -> None:
        check_holds(opened, self.adapter_values(device), "this job's devices have", "")

    def unfit(self, shares: Mapping[str, Share], last: Tensor | None) -> set[str]:
        return self._averages.unfit(shares, last)

    def aggregate(self, step: int, shares: Mapping[str, Share], last: Tensor | None) -> AggregationResult:
        return self._averages.aggregate(step, shares, last)

    def adapter(self, point: Checkpoint) -> dict[str, Tensor]:
        return self._averages.named(point.device_adapter)


class ToyDevice(DeviceSteps):
    """Trains the whole model's LoRA on its own text."""

    def __init__(self, context: DeviceContext, model: Stage) -> None:
        super().__init__(context)
        self._stage, self.parameters, self.model = model, lora_parameters([model]), model.model.config

    def train(self, link: Link, step: int) -> Gradients:
        batch = Batch.of(self.context, step, link.coder.plan, torch.device("cpu"))
        loss, tokens = nll(self._stage(batch.input_ids), batch.labels)
        (loss / tokens).backward()
        return Gradients(float(loss.detach()), tokens)

    def evaluate(self, link: Link, step: int, held_out: Sequences) -> tuple[float, int]:
        loss, tokens = nll(self._stage(held_out.input_ids), held_out.labels)
        return float(loss), tokens


# What follows is tests.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=2, hidden=16)


def whole_model(folder: Path) -> Stage:
    source = ModelFolder(folder)
    [model] = build_stages(source, [StageSpec(0, 2, embeds=True, head=True)])
    add_lora(model, lora_config(CONFIG, source.config), CONFIG.seed)
    return model


def text(number: int) -> Sequences:
    return random_text(number, 10 * (number + 1), 8, VOCABULARY)


class CutLink(LocalLink):
    """A link that breaks, or falls silent, at the first frame of a phase from a step on."""

    def __init__(self, job: Job, name: str, place: tuple[Phase, int] | None, *, silent: bool = False) -> None:
        super().__init__(job.host, name, job.trainers[name].terms, Ledger(), timeout=60)
        self._place, self._silent, self._ended = place, silent, False

    def send(self, frame: Frame) -> None:
        if self._place is not None and frame.phase == self._place[0] and frame.step >= self._place[1]:
            self._ended = True
            if not self._silent:
                self.close()
                raise LinkLost("the link was cut")
        if not self._ended:
            super().send(frame)


class Job:
    """A host and devices a, b, ... of the toy method. folder: for what lasts."""

    def __init__(
        self, model: Path, names: Sequence[str], folder: Path | None = None, config: TrainingConfig = CONFIG
    ) -> None:
        self.told: list[Event] = []
        self.finished = threading.Event()
        self.trainers: dict[str, DeviceTrainer] = {}
        for number, name in enumerate(names):
            context = DeviceContext(config, text(number), random_text(90 + number, 3, 8, VOCABULARY), Ledger())
            record = DeviceRecord(folder / name) if folder else None
            self.trainers[name] = DeviceTrainer(context, ToyDevice(context, whole_model(model)), record=record)
        initial = {name: value.detach().clone() for name, value in lora_parameters([whole_model(model)]).items()}
        kept = CheckpointFolder(folder / "server") if folder else None
        last = kept.last() if kept else None
        told = HostContext(config, names, checkpoints=kept, resume=last, patience=Patience(1.0), tell=self._tell)
        self.host = JobHost(ToyHost(config, initial, 16), told)

    def _tell(self, event: Event) -> None:
        self.told.append(event)
        if event.HasField("finished") or event.HasField("failed"):
            self.finished.set()

    def of(self, kind: str) -> list[Any]:
        """The messages of a kind."""
        return [getattr(event, kind) for event in self.told if event.HasField(kind)]

    def work(self, name: str, *links: LocalLink) -> None:
        """Trains a device, over one link after the other."""
        for link in links:
            try:
                self.trainers[name].run(link, cancelled=threading.Event())
            except LinkLost:
                continue

    def run(self, links: Mapping[str, Sequence[LocalLink]]) -> None:
        threads = [threading.Thread(target=self.work, args=(name, *each)) for name, each in links.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert self.finished.wait(20)
        self.host.close()
        assert not self.of("failed")

    def link(self, name: str, place: tuple[Phase, int] | None = None, **options: Any) -> CutLink:
        return CutLink(self, name, place, **options)


def averaged_by_hand(folder: Path, numbers: Sequence[int], steps: int) -> Tensor:
    """Federated averaging with nothing of the project's but the optimiser's step."""
    models = {number: whole_model(folder) for number in numbers}
    steppers = {number: Stepper(lora_parameters([model]), CONFIG) for number, model in models.items()}
    for step in range(steps):
        for number, model in models.items():
            context = DeviceContext(CONFIG, text(number), None, Ledger())
            batch = Batch.of(context, step, Plan(), torch.device("cpu"))
            loss, tokens = nll(model(batch.input_ids), batch.labels)
            (loss / tokens).backward()
            steppers[number].step(step, steppers[number].gradient_norm_squared())
        if (step + 1) % CONFIG.devices.aggregate_every == 0:
            total = sum(len(text(number)) for number in numbers)
            flat = {number: flatten(lora_parameters([model])) for number, model in models.items()}
            average = sum((value * (len(text(number)) / total) for number, value in flat.items()), torch.tensor(0.0))
            for model in models.values():
                torch.nn.utils.vector_to_parameters(average.clone(), list(lora_parameters([model]).values()))
    return average


def test_it_is_federated_averaging_and_reports_what_every_method_does(llama: Path) -> None:
    job = Job(llama, ["a", "b"])
    job.run({name: [job.link(name)] for name in "ab"})
    outcome = job.host.outcome()
    assert outcome.device_adapter is not None
    assert torch.allclose(outcome.device_adapter, averaged_by_hand(llama, [0, 1], 8), atol=1e-6)
    assert outcome.adapter is not None
    assert torch.equal(flatten(outcome.adapter), outcome.device_adapter)
    assert [data.step for data in job.of("aggregation")] == [2, 4, 6, 8]
    assert [data.device_step for data in job.of("step") if data.devices == ["b"]] == list(range(1, 9))
    assert sorted(outcome.perplexities) == [0, 8]
    assert outcome.perplexities[8] != outcome.perplexities[0]
    assert all(outcome.resources[name]["flops"] >= 0 for name in "ab")


@pytest.mark.parametrize("place", [(Phase.STEP, 3), (Phase.AGGREGATE, 3), (Phase.REPORT, 8), (Phase.CLOSE, 8)])
def test_a_device_that_dies_and_comes_back_goes_on_from_the_last_average(llama: Path, place: tuple[Phase, int]) -> None:
    """The others either wait no longer than for the rest of its steps, or go on without it; steps count once."""
    job = Job(llama, ["a"])
    job.run({"a": [job.link("a", place), job.link("a")]})
    adapter = job.host.outcome().device_adapter
    assert adapter is not None
    assert torch.allclose(adapter, averaged_by_hand(llama, [0], 8), atol=1e-6)
    assert 8 in job.host.outcome().perplexities


def test_a_device_that_dies_for_good_does_not_stop_the_others(llama: Path) -> None:
    job = Job(llama, ["a", "b", "c"])
    job.run({"a": [job.link("a")], "b": [job.link("b", (Phase.STEP, 4))], "c": [job.link("c")]})
    assert job.of("aggregation")[-1].step == 8
    assert job.host.outcome().resources.keys() == {"a", "c"}
    assert 8 in job.host.outcome().perplexities


def test_a_device_that_falls_silent_does_not_stop_the_others(llama: Path) -> None:
    job = Job(llama, ["a", "b"])
    job.run({"a": [job.link("a")], "b": [job.link("b", (Phase.AGGREGATE, 3), silent=True)]})
    assert job.of("aggregation")[-1].step == 8
    assert job.host.outcome().resources.keys() == {"a"}


def test_a_job_that_is_resumed_from_its_checkpoint_is_the_undisturbed_one(llama: Path, tmp_path: Path) -> None:
    first = Job(llama, ["a", "b"], tmp_path)
    threads = [threading.Thread(target=first.work, args=(n, first.link(n, (Phase.STEP, 5)))) for n in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    first.host.close()
    assert [data.step for data in first.of("checkpoint")] == [4]
    resumed = Job(llama, ["a", "b"], tmp_path)  # everybody has been restarted
    resumed.run({name: [resumed.link(name)] for name in "ab"})
    assert [data.step for data in resumed.of("started")] == [4]
    adapter = resumed.host.outcome().device_adapter
    assert adapter is not None
    assert torch.allclose(adapter, averaged_by_hand(llama, [0, 1], 8), atol=1e-6)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Phase.FORWARD, 0, tensor=torch.zeros(2, 8, 16)),
        Frame(Phase.STEP, 1, values={"nll": 1.0, "tokens": 1.0, "norm_squared": 1.0}),
        Frame(Phase.CLOSE, 8),
    ],
)
def test_a_frame_that_is_not_due_ends_that_device_alone(llama: Path, frame: Frame) -> None:
    job = Job(llama, ["a", "b"])
    other = threading.Thread(target=job.work, args=("a", job.link("a")))
    other.start()
    link = job.link("b")
    values = sum(value.numel() for value in job.trainers["b"].parameters.values())
    link.send(Frame(Phase.OPEN, open=stage_pb2.Open(codecs=["none"], samples=5, adapter_values=values)))
    assert link.receive().phase == Phase.OPEN
    link.send(frame)
    with pytest.raises(BadRequest, match="is not due from b"):
        link.receive()
    other.join(60)
    assert job.finished.wait(20)
    job.host.close()
    assert not job.of("failed")
