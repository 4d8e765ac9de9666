"""Devices that leave and come back, at any frame: the job of the others goes on, and every step is applied once."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.events_pb2 import DeviceJoined, Event, StepDone, TrainingStarted
from isthmus.split.codecs import FAMILIES
from isthmus.split.errors import BadRequest, BadTensor, IsthmusError, LinkLost, WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.coding import Terms
from isthmus.split.link.device import LocalLink
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.checkpoint import Checkpoint, CheckpointFolder
from isthmus.split.training.device import DeviceTrainer
from isthmus.split.training.frames import tensor_of
from isthmus.split.training.host import JobHost
from isthmus.split.training.optim import Stepper
from isthmus.split.training.patience import Patience
from tests.split.jobs import device_trainer, job_host, random_text
from tests.split.tiny_models import VOCABULARY, make_model

CONFIG = TrainingConfig.of(
    steps=6,
    batch_size=2,
    sequence_length=8,
    precision="float32",
    rank=2,
    aggregate_every=2,
    validation_fraction=0.1,
    codec="none",
    micro_batches=1,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=3, hidden=16)


class CutLink(LocalLink):
    """A link that breaks after a number of frames sent."""

    def __init__(self, host: JobHost, device: str, terms: Terms, frames: int) -> None:
        super().__init__(host, device, terms, Ledger(), timeout=60)
        self._left = frames

    def send(self, frame: Frame) -> None:
        if self._left == 0:
            self.close()
            raise LinkLost("the link was cut")
        self._left -= 1
        super().send(frame)


class LargeLink(LocalLink):
    """A link of a device that sends very large numbers, once: in the frame of this phase and step."""

    def __init__(self, host: JobHost, device: str, terms: Terms, large: tuple[Phase, int, float]) -> None:
        super().__init__(host, device, terms, Ledger(), timeout=60)
        self._large = large

    def send(self, frame: Frame) -> None:
        phase, step, value = self._large
        if (frame.phase, frame.step) == (phase, step):
            frame = replace(frame, tensor=torch.full_like(tensor_of(frame), value))
        super().send(frame)


class Job:
    """A host and its devices' trainers."""

    def __init__(
        self, folder: Path, config: TrainingConfig, names: list[str], checkpoints: CheckpointFolder | None = None
    ) -> None:
        self.trainers = {
            name: device_trainer(
                folder, config, random_text(i, 20, 8, VOCABULARY), random_text(90 + i, 3, 8, VOCABULARY)
            )
            for i, name in enumerate(names)
        }
        self.events: list[Event] = []
        self.finished = threading.Event()
        self.config = config
        last = checkpoints.last() if checkpoints else None
        self.host = job_host(folder, config, names, checkpoints=checkpoints, resume=last, tell=self._tell)
        self.errors: dict[str, IsthmusError] = {}

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        if event.HasField("finished") or event.HasField("failed"):
            self.finished.set()

    def steps(self) -> list[StepDone]:
        return [event.step for event in self.events if event.HasField("step")]

    def work(
        self,
        name: str,
        cut_after: int | None = None,
        *,
        rejoin: bool = False,
        large: tuple[Phase, int, float] | None = None,
    ) -> None:
        """Trains one device; with `cut_after` its link breaks once, and with `rejoin` it then comes back; with `large`
        it sends very large numbers once."""
        trainer: DeviceTrainer = self.trainers[name]
        if cut_after is not None:
            try:
                trainer.run(CutLink(self.host, name, trainer.terms, cut_after), cancelled=threading.Event())
                return
            except LinkLost:
                if not rejoin:
                    return
        link = LocalLink(self.host, name, trainer.terms, Ledger(), timeout=60)
        if large is not None:
            link = LargeLink(self.host, name, trainer.terms, large)
        try:
            trainer.run(link, cancelled=threading.Event())
        except IsthmusError as error:
            self.errors[name] = error
        finally:
            link.close()

    def run(self, work: dict[str, dict[str, Any]]) -> None:
        threads = [threading.Thread(target=self.work, args=(name,), kwargs=how) for name, how in work.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert self.finished.wait(10)
        self.host.close()


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("frames", range(2, 14, 3))
def test_a_device_that_leaves_for_good_does_not_stop_the_others(llama: Path, frames: int, labels: str) -> None:
    job = Job(llama, CONFIG.but(labels=labels), ["a", "b", "c"])
    job.run({"a": {}, "b": {"cut_after": frames}, "c": {}})
    assert not job.errors
    assert [step.step for step in job.steps()] == [1, 2, 3, 4, 5, 6]
    assert job.steps()[-1].devices == ["a", "c"]
    assert 6 in job.host.outcome().perplexities


@pytest.mark.parametrize("frames", range(1, 24, 2))
def test_a_device_that_comes_back_takes_part_again(llama: Path, frames: int) -> None:
    job = Job(llama, CONFIG.but(steps=30), ["a", "b"])
    job.run({"a": {}, "b": {"cut_after": frames, "rejoin": True}})
    assert not job.errors
    assert [step.step for step in job.steps()] == list(range(1, 31))
    assert job.steps()[-1].devices == ["a", "b"]
    assert all(torch.isfinite(value).all() for value in job.host.outcome().server.values())


@pytest.fixture(scope="module")
def undisturbed(llama: Path) -> Job:
    job = Job(llama, CONFIG, ["a"])
    job.run({"a": {}})
    return job


@pytest.mark.parametrize("frames", range(1, 45, 2))
def test_a_job_whose_only_device_loses_its_link_ends_with_the_very_same_adapter(
    llama: Path, undisturbed: Job, frames: int
) -> None:
    job = Job(llama, CONFIG, ["a"])
    job.run({"a": {"cut_after": frames, "rejoin": True}})
    assert not job.errors
    disturbed, expected = job.host.outcome(), undisturbed.host.outcome()
    assert disturbed.losses == expected.losses
    assert disturbed.perplexities == expected.perplexities
    assert torch.equal(disturbed.device_adapter, expected.device_adapter)
    for name, value in expected.server.items():
        assert torch.equal(disturbed.server[name], value), name


def test_a_device_that_is_connected_and_silent_does_not_stop_the_others(llama: Path) -> None:
    job = Job(llama, CONFIG, ["a", "b"])
    job.host.job.deadlines.patience = Patience(0.5)
    other = threading.Thread(target=job.work, args=("a",))
    other.start()
    link = _open(job, "b")
    assert link.receive().phase == Phase.OPEN
    with pytest.raises(LinkLost, match="b owed a frame"):
        link.receive()
    other.join(60)
    assert job.finished.wait(10)
    job.host.close()
    assert not job.errors
    assert [step.devices for step in job.steps()] == [["a"]] * 6


def test_what_a_replaced_stream_still_sends_does_not_touch_the_new_one(llama: Path, undisturbed: Job) -> None:
    job = Job(llama, CONFIG, ["a"])
    late: queue.SimpleQueue[Frame | IsthmusError] = queue.SimpleQueue()
    deliver = late.put
    job.host.join("a", Frame(Phase.OPEN, open=_opened(job)), deliver)
    first = late.get(timeout=10)
    assert isinstance(first, Frame)
    assert first.phase == Phase.OPEN
    worker = threading.Thread(target=job.work, args=("a",))
    worker.start()
    with pytest.raises(WrongState, match="opened this job again"):
        raise late.get(timeout=10)  # type: ignore[misc]
    for _ in range(50):
        job.host.submit("a", Frame(Phase.FORWARD, 0, tensor=torch.zeros(2, 8, 16)), deliver).result(10)
    job.host.leave("a", deliver)
    worker.join(60)
    assert job.finished.wait(10)
    job.host.close()
    assert not job.errors
    assert job.host.outcome().losses == undisturbed.host.outcome().losses


def _opened(job: Job, **changes: Any) -> stage_pb2.Open:
    values = job.trainers["a"].terms.adapter_values
    return stage_pb2.Open(**{"codecs": sorted(FAMILIES), "samples": 5, "adapter_values": values, **changes})


def _open(job: Job, name: str, **changes: Any) -> LocalLink:
    link = LocalLink(job.host, name, replace(job.trainers["a"].terms, samples=5), Ledger(), timeout=10)
    link.send(Frame(Phase.OPEN, open=_opened(job, **changes)))
    return link


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("stranger", {}, "has no part in this job"),
        ("a", {"codecs": ["zip"]}, "lacks codecs of this job: none"),
        ("a", {"adapter_values": 1}, "an adapter of 1 values"),
        ("a", {"samples": 0}, "0 training sequences"),
    ],
)
def test_a_device_that_does_not_fit_the_job_is_not_let_in(
    llama: Path, name: str, changes: dict[str, Any], line: str
) -> None:
    job = Job(llama, CONFIG, ["a"])
    with pytest.raises(BadRequest, match=line):
        _open(job, name, **changes).receive()
    job.run({"a": {}})  # and the job is none the worse for it
    assert not job.errors


def test_another_model_than_the_coordinators_is_not_let_in(llama: Path) -> None:
    job = Job(llama, CONFIG, ["a"])
    job.host = job_host(llama, CONFIG, ["a"], digests={1: "0" * 64})
    with pytest.raises(BadRequest, match="model files differ from the coordinator's"):
        _open(job, "a", stage_digest="1" * 64).receive()
    job.host.close()


@pytest.mark.parametrize(
    ("frame", "line"),
    [
        (Frame(Phase.FORWARD, 3, tensor=torch.zeros(2, 8, 16)), "FORWARD of step 3; due from b is FORWARD of step 0"),
        (
            Frame(Phase.BACKWARD, 0, tensor=torch.zeros(2, 8, 16), values={"tokens": 1.0}),
            "BACKWARD of step 0; due from b is FORWARD of step 0",
        ),
        (Frame(Phase.AGGREGATE, 0), "AGGREGATE of step 0; due from b is FORWARD"),
        (Frame(Phase.FORWARD, 0), "FORWARD without its tensor"),
        (Frame(Phase.EVALUATE, 3, tensor=torch.zeros(2, 8, 16)), "EVALUATE after step 3, where no evaluation is due"),
        (
            Frame(Phase.REPORT, 2, values={"evaluation_nll": 1.0, "evaluation_tokens": 1.0}),
            "REPORT after step 2, where no evaluation is due",
        ),
    ],
)
def test_a_frame_that_is_not_due_ends_that_device_and_no_other(llama: Path, frame: Frame, line: str) -> None:
    job = Job(llama, CONFIG, ["a", "b"])
    other = threading.Thread(target=job.work, args=("a",))
    other.start()
    link = _open(job, "b")
    assert link.receive().phase == Phase.OPEN
    adapter = torch.zeros(job.trainers["b"].terms.adapter_values)
    link.send(replace(frame, tensor=adapter) if frame.phase == Phase.AGGREGATE else frame)
    with pytest.raises(BadRequest, match=line):
        link.receive()
    other.join(60)
    assert job.finished.wait(10)
    job.host.close()
    assert not job.errors
    assert [step.devices for step in job.steps()] == [["a"]] * 6


def test_a_device_that_dies_before_the_last_has_come_is_waited_for_until_told_otherwise(llama: Path) -> None:
    job = Job(llama, CONFIG, ["a", "b", "c"])
    early = _open(job, "c")
    waiting = threading.Event()
    while not any(event.HasField("joined") and event.device == "c" for event in list(job.events)):
        waiting.wait(0.01)
    early.close()
    others = [threading.Thread(target=job.work, args=(name,)) for name in ("a", "b")]
    for thread in others:
        thread.start()
    while {"a", "b"} - {event.device for event in list(job.events) if event.HasField("joined")}:
        waiting.wait(0.01)
    assert not any(event.HasField("started") for event in job.events)
    job.host.start_without({"c"})
    for thread in others:
        thread.join(60)
    assert job.finished.wait(10)
    job.host.close()
    assert not job.errors
    assert sum(event.HasField("started") for event in job.events) == 1
    assert [step.devices for step in job.steps()] == [["a", "b"]] * 6


def test_a_start_without_one_still_waits_for_the_others(llama: Path) -> None:
    job = Job(llama, CONFIG, ["a", "b", "c"])
    first = _open(job, "a")
    job.host.start_without({"b"})
    last = _open(job, "c")
    assert first.receive().phase == last.receive().phase == Phase.OPEN
    started = Event(started=TrainingStarted(step=0))
    assert job.events.index(started) > job.events.index(Event(device="c", joined=DeviceJoined(samples=5)))
    job.host.close()


def test_a_frame_before_the_session_is_agreed_is_refused(llama: Path) -> None:
    job = Job(llama, CONFIG, ["a", "b"])
    link = _open(job, "b")  # waits for a
    link.send(Frame(Phase.FORWARD, 0, tensor=torch.zeros(2, 8, 16)))
    with pytest.raises(BadRequest, match="before the session was agreed"):
        link.receive()
    job.host.close()


@pytest.mark.parametrize(
    ("labels", "phase", "step", "value"),
    [
        ("device", Phase.FORWARD, 2, 3e38),
        ("device", Phase.BACKWARD, 2, 3e38),
        ("device", Phase.BACKWARD, 3, 1e25),
        ("device", Phase.AGGREGATE, 1, 1e30),
        ("device", Phase.AGGREGATE, 1, float("nan")),
        ("device", Phase.EVALUATE, 4, float("nan")),
        ("server", Phase.FORWARD, 2, 3e38),
        ("server", Phase.EVALUATE, 4, float("nan")),
    ],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_numbers_that_overflow_end_the_device_that_sent_them_and_no_other(
    llama: Path, labels: str, phase: Phase, step: int, value: float, micro_batches: int
) -> None:
    config = CONFIG.but(labels=labels, evaluate_every=2, micro_batches=micro_batches)
    job = Job(llama, config, ["a", "b", "c"])
    job.run({"a": {}, "b": {"large": (phase, step, value)}, "c": {}})
    assert job.errors.keys() == {"b"}
    assert isinstance(job.errors["b"], BadTensor), job.errors
    assert [data.step for data in job.steps()] == [1, 2, 3, 4, 5, 6]
    assert job.steps()[-1].devices == ["a", "c"]
    outcome = job.host.outcome()
    assert 6 in outcome.perplexities
    assert all(value.abs().max() < 10 for value in [*outcome.server.values(), outcome.device_adapter])


@pytest.mark.parametrize("labels", ["device", "server"])
def test_a_step_without_the_device_that_was_refused_is_that_of_the_others(llama: Path, labels: str) -> None:
    config = CONFIG.but(labels=labels, validation_fraction=0.0)
    alone, refused = Job(llama, config, ["a", "b"]), Job(llama, config, ["a", "b"])
    alone.run({"a": {}, "b": {"cut_after": 1}})
    refused.run({"a": {}, "b": {"large": (Phase.FORWARD, 0, 3e38)}})
    assert refused.errors.keys() == {"b"}
    expected, outcome = alone.host.outcome(), refused.host.outcome()
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, values in expected.server.items():
        assert torch.allclose(outcome.server[name], values, atol=1e-6), name


def test_numbers_that_overflow_are_in_no_checkpoint_and_the_job_can_be_resumed(llama: Path, tmp_path: Path) -> None:
    config, folder = CONFIG.but(checkpoint_every=2), CheckpointFolder(tmp_path)
    job = Job(llama, config, ["a", "b"], folder)
    job.run({"a": {}, "b": {"large": (Phase.AGGREGATE, 3, 1e30)}})
    assert isinstance(job.errors["b"], BadTensor)
    point = folder.last()
    assert point is not None
    assert point.step == 6
    assert all(value.abs().max() < 10 for value in point.tensors().values())
    longer = Job(llama, config.but(steps=8), ["a", "b"], folder)
    longer.run({"a": {}, "b": {}})
    assert not longer.errors
    assert [data.step for data in longer.steps()] == [7, 8]


def test_a_stage_that_has_diverged_for_all_devices_ends_the_job_with_one_line(llama: Path, tmp_path: Path) -> None:
    config, folder = CONFIG.but(checkpoint_every=2), CheckpointFolder(tmp_path)
    job = Job(llama, config, ["a", "b"], folder)
    large = {"large": (Phase.BACKWARD, 3, 3e38)}
    job.run({"a": large, "b": large})
    [line] = [event.failed.message for event in job.events if event.HasField("failed")]
    assert "not finite for any device: if training has diverged, lower learning_rate" in line
    point = folder.last()
    assert point is not None
    assert point.step == 2


@pytest.mark.parametrize("where", ["server", "optimizer", "device_adapter", "merged", "losses"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved(tmp_path: Path, where: str, value: float) -> None:
    folder = CheckpointFolder(tmp_path)
    good = Checkpoint(2, {"x": torch.ones(2)}, {}, torch.ones(2), [1.0])
    folder.save(good)
    bad = {"device_adapter": torch.tensor([1.0, value]), "losses": [1.0, value]}
    contents = bad.get(where, {"x": torch.tensor([value])})
    with pytest.raises(WrongState, match="not finite after step 4"):
        folder.save(replace(good, step=4, **{where: contents}))
    kept = folder.last()
    assert kept is not None
    assert kept.step == 2


def test_a_gradient_that_is_not_finite_is_not_applied() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, float("inf")])
    stepper = Stepper({"x": parameter}, CONFIG)
    with pytest.raises(WrongState, match="step 1 is not finite, and was not applied"):
        stepper.step(1, stepper.gradient_norm_squared())
    assert torch.equal(parameter.detach(), torch.ones(2))


class QuietLink(LocalLink):
    """A link of a device that stays connected and says nothing more, from this phase of this step or a later one on."""

    def __init__(self, job: Job, device: str, phase: Phase, step: int) -> None:
        super().__init__(job.host, device, job.trainers[device].terms, Ledger(), timeout=60)
        self._phase, self._step, self._quiet = phase, step, False

    def send(self, frame: Frame) -> None:
        self._quiet = self._quiet or (frame.phase == self._phase and frame.step >= self._step)
        if not self._quiet:
            super().send(frame)


@pytest.mark.parametrize("phase", [Phase.EVALUATE, Phase.REPORT, Phase.CLOSE])
@pytest.mark.parametrize("patience", [Patience(0.5), Patience(60.0, closing=0.5)])
@pytest.mark.parametrize("others", [["a"], []])
def test_a_device_that_never_closes_does_not_keep_a_job_that_is_done(
    llama: Path, phase: Phase, patience: Patience, others: list[str]
) -> None:
    job = Job(llama, CONFIG, [*others, "b"])
    job.host.job.deadlines.patience = replace(patience)
    threads = [threading.Thread(target=job.work, args=(name,)) for name in others]
    for thread in threads:
        thread.start()
    with pytest.raises(LinkLost, match="b has not closed the job"):
        job.trainers["b"].run(QuietLink(job, "b", phase, 6), cancelled=threading.Event())
    for thread in threads:
        thread.join(60)
    assert job.finished.wait(10)
    job.host.close()
    assert not job.errors
    assert job.events[-1].HasField("finished")
    outcome = job.host.outcome()
    assert outcome.resources.keys() == ({*others, "b"} if phase == Phase.CLOSE else set(others))
    assert (6 in outcome.perplexities) == (bool(others) or phase == Phase.CLOSE)
    assert any("its last report is missing" in event.log.message for event in job.events)


def test_a_device_that_is_silent_again_and_again_is_waited_for_less_each_time(llama: Path) -> None:
    job = Job(llama, CONFIG.but(steps=100), ["a", "b"])
    job.host.job.deadlines.patience = Patience(1.0)
    other = threading.Thread(target=job.work, args=("a",))
    other.start()
    patience = []
    for _ in range(3):
        with pytest.raises(LinkLost) as ended:
            job.trainers["b"].run(QuietLink(job, "b", Phase.FORWARD, 0), cancelled=threading.Event())
        assert "b owed a frame" in str(ended.value)
        patience.append(job.host.job.deadlines.patience.of("b"))
    assert patience == [0.5, 0.25, 0.125]
    other.join(60)
    assert job.finished.wait(10)
    job.host.close()
    assert not job.errors
    assert job.steps()[-1].step == 100
