"""A step's batch in micro-batches, several of them under way: the same training, however it is cut."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.split.data.sequences import Sequences, batch_indices
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import choices
from isthmus.split.link.coding import Plan, Terms
from isthmus.split.link.device import LocalLink
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.lora.lora import add_lora, lora_config, lora_parameters
from isthmus.split.models.source import ModelFolder
from isthmus.split.models.stage import build_stages, cut_in_two, cut_u_shaped
from isthmus.split.plan.choose import DeviceView, Planner
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.host import JobHost
from isthmus.split.training.loss import nll
from tests.split.jobs import Run, device_trainer, job_host, random_text, split_run, unsplit_run
from tests.split.tiny_models import VOCABULARY, make_model

LENGTH = 8
CONFIG = TrainingConfig.of(
    steps=3,
    batch_size=8,
    sequence_length=LENGTH,
    optimizer="sgd",
    learning_rate=0.5,
    schedule="constant",
    precision="float32",
    rank=2,
    aggregate_every=2,
    validation_fraction=0.0,
    codec="none",
    micro_batches=1,
    max_gradient_norm=0.5,
)
COUNTS = [1, 2, 3, 4, 8]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=3, hidden=16)


def texts(count: int) -> list[Sequences]:
    return [random_text(i, 20 + i, LENGTH, VOCABULARY) for i in range(count)]


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """`depth` of every plan, whatever the planner would choose; the micro-batches are the configuration's."""
    chosen = {"depth": 1}

    def plans(
        planner: Planner,
        views: Mapping[str, DeviceView],
        stage_seconds: Mapping[str, float],
        micro_batches: int | None = None,
    ) -> tuple[dict[str, Plan], list[str]]:
        config = planner.config
        plan = Plan(config.link.micro_batches, chosen["depth"], choices(config.link.codec), config.seed)
        return dict.fromkeys(views, plan), []

    monkeypatch.setattr(Planner, "plans", plans)
    return chosen


_whole: dict[tuple[object, ...], Run] = {}


def whole(folder: Path, config: TrainingConfig, devices: int) -> Run:
    """The run whose batches are not cut; made once."""
    key = (folder, config, devices)
    if key not in _whole:
        _whole[key] = split_run(folder, config.but(micro_batches=1), texts(devices))
    return _whole[key]


def assert_same(run: Run, expected: Run, tolerance: float) -> None:
    assert run.outcome.losses == pytest.approx(expected.outcome.losses, rel=tolerance)
    assert run.adapter.keys() == expected.adapter.keys()
    for name, value in expected.adapter.items():
        torch.testing.assert_close(
            run.adapter[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize(
    ("count", "depths"),
    [
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 5, 8)),
        *(pytest.param(count, tuple(range(1, count + 1)), marks=pytest.mark.exhaustive) for count in (1, 4, 8)),
    ],
)
def test_training_is_the_same_in_any_number_of_micro_batches_at_any_depth(
    llama: Path, deep: dict[str, int], count: int, depths: tuple[int, ...], labels: str, devices: int
) -> None:
    config = CONFIG.but(labels=labels)
    deep["depth"] = 1
    expected = whole(llama, config, devices)
    for depth in depths:
        deep["depth"] = depth
        run = split_run(llama, config.but(micro_batches=count), texts(devices))
        assert_same(run, expected, 1e-6)


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("labels", ["device", "server"])
def test_one_steps_gradient_is_that_of_the_whole_batch(
    llama: Path, deep: dict[str, int], labels: str, devices: int
) -> None:
    """Plain gradient descent with a rate of 1 shows it: the adapter moves by it."""
    config = CONFIG.but(steps=1, learning_rate=1.0, max_gradient_norm=0.0, labels=labels)
    expected = whole(llama, config, devices)
    start = whole(llama, config.but(learning_rate=1e-30), devices)
    gradient = {name: start.adapter[name] - value for name, value in expected.adapter.items()}
    assert max(value.abs().max() for value in gradient.values()) > 1e-3
    for count in COUNTS[1:]:
        deep["depth"] = count
        run = split_run(llama, config.but(micro_batches=count), texts(devices))
        for name, value in gradient.items():
            torch.testing.assert_close(start.adapter[name] - run.adapter[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize(("count", "depth"), [(2, 2), (3, 2), (8, 1), (8, 5)])
def test_it_is_that_of_plain_peft_on_the_unsplit_model(
    llama: Path, deep: dict[str, int], count: int, depth: int, labels: str
) -> None:
    deep["depth"] = depth
    config = CONFIG.but(steps=6, labels=labels, micro_batches=count)
    run = split_run(llama, config, texts(1))
    losses, adapter = unsplit_run(llama, config, texts(1))
    assert run.outcome.losses == pytest.approx(losses, rel=1e-5)
    for name, value in adapter.items():
        torch.testing.assert_close(run.adapter[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", ["device", "server"])
def test_batches_with_few_predicted_tokens_are_weighted_as_a_whole(
    llama: Path, deep: dict[str, int], labels: str
) -> None:
    """Rows have from none to all of their tokens predicted, so micro-batches weigh very differently."""
    config = CONFIG.but(labels=labels)
    uneven = []
    for text in texts(3):
        wanted = torch.arange(LENGTH) < (torch.arange(len(text)) % (LENGTH + 1)).unsqueeze(1)
        uneven.append(Sequences(text.input_ids, torch.where(wanted, text.labels, -100)))
    expected = split_run(llama, config, uneven)
    for count in COUNTS[1:]:
        deep["depth"] = count
        assert_same(split_run(llama, config.but(micro_batches=count), uneven), expected, 2e-6)


class Recording(LocalLink):
    """Keeps what the device sends and gets: (what, phase, step, micro-batch)."""

    def __init__(self, host: JobHost, terms: Terms) -> None:
        super().__init__(host, "a", terms, Ledger(), timeout=60)
        self.frames: list[tuple[str, str, int, int]] = []

    def send(self, frame: Frame) -> None:
        self.frames.append(("sent", Phase.Name(frame.phase), frame.step, frame.micro_batch))
        super().send(frame)

    def receive(self) -> Frame:
        frame = super().receive()
        self.frames.append(("got", Phase.Name(frame.phase), frame.step, frame.micro_batch))
        return frame


def recorded(folder: Path, config: TrainingConfig) -> list[tuple[str, str, int, int]]:
    """What one device sends and gets in a whole job."""
    trainer = device_trainer(folder, config, texts(1)[0])
    host = job_host(folder, config, ["a"])
    link = Recording(host, trainer.terms)
    trainer.run(link, cancelled=threading.Event())
    host.close()
    return link.frames


def most_under_way(frames: list[tuple[str, str, int, int]], labels: str) -> int:
    """Micro-batches of one step that have been sent and whose gradient has not come."""
    gradient = "FORWARD" if labels == "server" else "BACKWARD"
    under_way, most = Counter[int](), 0
    for what, phase, step, _ in frames:
        if (what, phase) == ("sent", "FORWARD"):
            under_way[step] += 1
        elif (what, phase) == ("got", gradient):
            under_way[step] -= 1
        most = max([most, *under_way.values()])
    assert not any(under_way.values())
    return most


@pytest.mark.parametrize("overlap", ["exact", "stale"])
@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (3, 2), (4, 1), (4, 4), (8, 3)])
def test_as_many_are_under_way_as_planned_and_never_more(
    llama: Path, deep: dict[str, int], count: int, depth: int, labels: str, overlap: str
) -> None:
    deep["depth"] = depth
    config = CONFIG.but(micro_batches=count, labels=labels, overlap=overlap)
    frames = recorded(llama, config)
    assert most_under_way(frames, labels) == depth
    for what, phase in (("sent", "FORWARD"), ("got", "FORWARD")):
        order = [(step, number) for w, p, step, number in frames if (w, p) == (what, phase)]
        assert order == [(step, number) for step in range(config.steps) for number in range(count)]


# ---- overlap stale: a device's next forward begins before its last gradients have come ----

STALE = CONFIG.but(
    steps=9,
    aggregate_every=4,
    overlap="stale",
    optimizer="adamw",
    learning_rate=0.02,
    max_gradient_norm=0.0,
)


def delayed(folder: Path, config: TrainingConfig, text: Sequences) -> tuple[list[float], dict[str, Tensor]]:
    """One device whose front computes with the parameters of one step before; all else is up to date. After an
    aggregation the front is up to date too."""
    source = ModelFolder(folder)
    cut = (cut_u_shaped if config.devices.labels == "device" else cut_in_two)(source.config, config.devices.cut_layer)
    front, *rest = build_stages(source, list(cut))
    for stage in (front, rest[0]):
        add_lora(stage, lora_config(config, source.config), config.seed)
    sides = {side: lora_parameters([stage]) for side, stage in (("front", front), ("stage", rest[0]))}
    optimizers = [
        torch.optim.AdamW(side.values(), weight_decay=config.optimizer.weight_decay) for side in sides.values()
    ]
    losses = []
    computing = copy.deepcopy(front)
    for step in range(config.steps):
        rows = batch_indices(len(text), config.batch_size, step, config.seed)
        outputs = computing(text.input_ids[rows])
        for stage in rest:
            outputs = stage(outputs)
        total, tokens = nll(outputs, text.labels[rows])
        (total / tokens).backward()
        losses.append(float(total.detach()) / tokens)
        for parameter, stale in zip(sides["front"].values(), lora_parameters([computing]).values(), strict=True):
            parameter.grad = stale.grad
        before = copy.deepcopy(front)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            optimizer.step()
            optimizer.zero_grad()
        computing = copy.deepcopy(front) if config.aggregates_after(step + 1) else before
        for parameter in computing.parameters():
            parameter.grad = None
    return losses, {name: value.detach() for side in sides.values() for name, value in side.items()}


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (4, 4), (4, 2)])
def test_stale_is_a_delay_of_one_step_on_the_device_and_nothing_else(
    llama: Path, deep: dict[str, int], count: int, depth: int, labels: str
) -> None:
    deep["depth"] = depth
    config = STALE.but(micro_batches=count, labels=labels)
    run = split_run(llama, config, texts(1))
    losses, adapter = delayed(llama, config, texts(1)[0])
    assert run.outcome.losses == pytest.approx(losses, rel=1e-5)
    assert run.adapter.keys() == adapter.keys()
    for name, value in adapter.items():
        torch.testing.assert_close(run.adapter[name], value, rtol=1e-4, atol=1e-5)
    exact = split_run(llama, config.but(overlap="exact"), texts(1))
    assert exact.outcome.losses != pytest.approx(losses, rel=1e-4)  # the delay shows


@pytest.mark.parametrize("labels", ["device", "server"])
def test_a_stale_run_of_several_devices_comes_out_the_same_every_time(
    llama: Path, deep: dict[str, int], labels: str
) -> None:
    deep["depth"] = 3
    config = STALE.but(micro_batches=3, labels=labels, max_gradient_norm=0.5)
    first, *others = [split_run(llama, config, texts(3)) for _ in range(3)]
    for other in others:
        assert other.outcome.losses == first.outcome.losses
        for name, value in first.adapter.items():
            assert torch.equal(other.adapter[name], value)


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (4, 2)])
def test_a_stale_device_goes_one_step_ahead_and_never_past_an_aggregation(
    llama: Path, deep: dict[str, int], count: int, depth: int, labels: str
) -> None:
    deep["depth"] = depth
    config = STALE.but(micro_batches=count, labels=labels)
    place = {frame: number for number, frame in enumerate(recorded(llama, config))}
    for step in range(config.steps - 1):
        following, applied = place["sent", "FORWARD", step + 1, 0], place["sent", "STEP", step, 0]
        if config.aggregates_after(step + 1):
            assert following > place["got", "AGGREGATE", step, 0] > applied
        else:
            assert following < applied
        if step + 2 < config.steps:
            assert place["sent", "FORWARD", step + 2, 0] > applied
