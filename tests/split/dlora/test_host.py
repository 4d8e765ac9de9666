"""Devices that go away in the midst of an exchange, and frames that are not due: every step counts once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.dlora.backbone import _in_one_thread
from isthmus.split.errors import BadFrame, BadRequest, BadTensor, IsthmusError, LinkLost
from isthmus.split.job.config import TrainingConfig
from isthmus.split.link.device import LocalLink
from isthmus.split.link.frames import INPUT_GRADIENT, Frame, Phase
from isthmus.split.methods.local import train_locally
from isthmus.split.models.source import ModelFolder
from isthmus.split.training.checkpoint import CheckpointFolder, DeviceRecord
from isthmus.split.training.device import DeviceTrainer
from isthmus.split.training.host import JobHost
from isthmus.split.training.patience import Patience
from tests.split.dlora.jobs import CONFIG, assert_same, dlora_run, text
from tests.split.jobs import device_trainer, job_host
from tests.split.tiny_models import make_model

SMALL = CONFIG.but(steps=4, batch_size=2, rank=2, micro_batches=2, target_modules=("q_proj", "v_proj", "down_proj"),
    optimizer="sgd", learning_rate=0.5, schedule="constant", checkpoint_every=2, validation_fraction=0.1,
)  # fmt: skip

ENDING = SMALL.but(
    steps=30, cut_layer=0, killed="drop", bytes_per_step=1, kill_warmup=3, kill_anneal=0, kill_interval=1
)  # no module is left after three steps


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=3, hidden=16)


class Job:
    """A host, and devices with text of their own."""

    def __init__(self, folder: Path, config: TrainingConfig, devices: int = 1, records: Path | None = None) -> None:
        self.folder, self.config, self.records = folder, config, records
        self.events: list[Event] = []
        self.finished = threading.Event()
        kept = CheckpointFolder(records / "server") if records else None
        last = kept.last() if kept else None
        names = [f"d{number}" for number in range(devices)]
        self.host = job_host(folder, config, names, checkpoints=kept, resume=last, tell=self._tell)

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        if event.HasField("finished") or event.HasField("failed"):
            self.finished.set()

    def trainer(self, number: int = 0) -> DeviceTrainer:
        record = DeviceRecord(self.records / f"d{number}") if self.records else None
        return device_trainer(self.folder, self.config, text(number, 20), text(9, 3), record=record)

    def link(self, trainer: DeviceTrainer, number: int = 0, frames: int = -1) -> LocalLink:
        return CutLink(self.host, f"d{number}", trainer, frames)

    def told(self, kind: str) -> list[Any]:
        """The messages of a kind."""
        return [getattr(event, kind) for event in self.events if event.HasField(kind)]


class CutLink(LocalLink):
    """A link that breaks after a number of frames sent, the last of which gets lost; -1: it does not."""

    def __init__(self, host: JobHost, device: str, trainer: DeviceTrainer, frames: int) -> None:
        super().__init__(host, device, trainer.terms, trainer.ledger, timeout=60)
        self._left = frames

    def send(self, frame: Frame) -> None:
        if self._left == 0:
            self.close()
            raise LinkLost("the link was cut")
        self._left -= 1
        super().send(frame)


def run(trainer: DeviceTrainer, link: LocalLink) -> None:
    try:
        trainer.run(link, cancelled=threading.Event())
    finally:
        link.close()


def undisturbed(folder: Path, config: TrainingConfig, devices: int = 1) -> tuple[dict[str, Any], list[float]]:
    run, losses = dlora_run(folder, config, [text(number, 20) for number in range(devices)])
    return run.adapters, losses["d0"]


def test_a_link_that_breaks_at_any_frame_costs_no_step_and_counts_none_twice(llama: Path) -> None:
    adapters, losses = undisturbed(llama, SMALL)
    whole = Job(llama, SMALL)
    counted = whole.trainer()
    run(counted, link := whole.link(counted, frames=10**6))
    whole.host.close()
    frames = 10**6 - link._left
    assert frames > 60
    for cut in range(1, frames, 5):
        job = Job(llama, SMALL)
        trainer = job.trainer()
        with pytest.raises(LinkLost):
            run(trainer, job.link(trainer, frames=cut))
        run(trainer, job.link(trainer))
        assert job.finished.wait(60)
        job.host.close()
        assert_same(trainer.adapter(), adapters["d0"])
        steps = job.told("step")
        assert [data.device_step for data in steps] == [1, 2, 3, 4], cut
        assert [data.loss for data in steps] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("cut", [30, 60, 75])
def test_a_device_that_is_restarted_goes_on_from_its_record(llama: Path, tmp_path: Path, cut: int) -> None:
    adapters, _ = undisturbed(llama, SMALL)
    job = Job(llama, SMALL, records=tmp_path)
    first = job.trainer()
    with pytest.raises(LinkLost):
        run(first, job.link(first, frames=cut))
    again = job.trainer()
    assert again.step == first.step // 2 * 2
    run(again, job.link(again))
    assert job.finished.wait(60)
    job.host.close()
    assert_same(again.adapter(), adapters["d0"])
    assert job.told("step")[-1].device_step == SMALL.steps


def test_decisions_are_made_once_for_each_step_whatever_breaks(llama: Path, tmp_path: Path) -> None:
    """With links that break, and a device that is restarted, the same modules die and come back as without."""
    changes = {"steps": 24, "active_fraction": 0.5, "kill_warmup": 2, "kill_anneal": 2, "kill_interval": 1}
    config = SMALL.but(killed="drop", checkpoint_every=3, **changes)  # type: ignore[arg-type]
    quiet = Job(llama, config)
    trainer = quiet.trainer()
    run(trainer, quiet.link(trainer))
    assert quiet.finished.wait(60)
    quiet.host.close()
    decided = [(data.step, data.active) for data in quiet.told("modules")]
    assert len(decided) > 2
    job = Job(llama, config, records=tmp_path)
    disturbed = job.trainer()
    for cut in (45, 30, 61, 17):
        with pytest.raises(LinkLost):
            run(disturbed, job.link(disturbed, frames=cut))
    disturbed = job.trainer()
    run(disturbed, job.link(disturbed))
    assert job.finished.wait(60)
    job.host.close()
    assert any(not float(value.abs().max()) for name, value in trainer.adapter().items() if "lora_B" in name)  # dropped
    assert_same(job.trainer().adapter(), trainer.adapter())  # and after a restart, from the record
    assert {data.step: data.active for data in job.told("modules")}.items() <= dict(decided).items()
    assert_same(disturbed.adapter(), trainer.adapter())


def test_a_step_on_the_disk_that_nobody_has_heard_of_counts_after_a_restart(llama: Path, tmp_path: Path) -> None:
    """The device dies between its record of a step and the STEP that tells of it."""
    _, losses = undisturbed(llama, SMALL)
    job = Job(llama, SMALL, records=tmp_path)

    class Dies(CutLink):
        def send(self, frame: Frame) -> None:
            if frame.phase == Phase.STEP and frame.step == 1:
                self.close()
                raise LinkLost("the device died")
            super().send(frame)

    first = job.trainer()
    with pytest.raises(LinkLost):
        run(first, Dies(job.host, "d0", first, -1))
    again = job.trainer()
    assert again.step == 2
    run(again, job.link(again))
    assert job.finished.wait(60)
    job.host.close()
    steps = job.told("step")
    assert [data.device_step for data in steps] == [1, 2, 3, 4]
    assert [data.loss for data in steps] == pytest.approx(losses, rel=1e-5)


def test_a_job_that_is_resumed_after_the_coordinators_death_is_the_undisturbed_one(llama: Path, tmp_path: Path) -> None:
    adapters, _ = undisturbed(llama, SMALL, 2)
    job = Job(llama, SMALL, 2, tmp_path)
    done, halfway = job.trainer(0), job.trainer(1)
    run(done, job.link(done, 0))
    with pytest.raises(LinkLost):
        run(halfway, job.link(halfway, 1, frames=50))
    job.host.close()
    resumed = Job(llama, SMALL, 2, tmp_path)
    for number in (0, 1):
        trainer = resumed.trainer(number)
        run(trainer, resumed.link(trainer, number))
        assert_same(trainer.adapter(), adapters[f"d{number}"])
    assert resumed.finished.wait(60)
    resumed.host.close()
    assert {data.devices[0] for data in resumed.told("step")} == {"d1"}  # the other had nothing left to do


@pytest.mark.parametrize("cut", [10, 45, 70, 81])
def test_with_averages_a_device_that_comes_back_goes_on_from_the_last_one(
    llama: Path, tmp_path: Path, cut: int
) -> None:
    config = SMALL.but(aggregate=True, aggregate_every=2)
    expected = train_locally(ModelFolder(llama), config, [(text(n, 20), text(9, 3)) for n in (0, 1)])
    job = Job(llama, config, 2, tmp_path)
    trainers = [job.trainer(0), job.trainer(1)]
    other = threading.Thread(target=run, args=(trainers[1], job.link(trainers[1], 1)))
    other.start()
    with pytest.raises(LinkLost):
        run(trainers[0], job.link(trainers[0], 0, frames=cut))
    run(trainers[0], job.link(trainers[0], 0))
    other.join(60)
    assert job.finished.wait(60)
    job.host.close()
    assert_same(trainers[0].adapter(), trainers[1].adapter(), 0)
    points = [data.step for data in job.told("checkpoint")]
    assert points == [2, 4]
    assert expected.outcome.device_adapter is not None
    assert job.host.outcome().device_adapter is not None
    assert torch.isfinite(job.host.outcome().device_adapter).all()


def test_where_one_thread_runs_all_backward_passes_they_do_not_wait_for_each_other_in_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: here a lock in the thread's place, which a backward pass of the backbone has to its end."""
    adapters, _ = undisturbed(llama, SMALL, 2)
    whole, engine = torch.Tensor.backward, threading.Lock()

    def backward(self: torch.Tensor, *arguments: Any, **settings: Any) -> None:
        if not threading.current_thread().name.startswith("pass-"):
            return whole(self, *arguments, **settings)
        assert engine.acquire(timeout=5), "a pass that has the turn waits for the thread"
        try:
            return whole(self, *arguments, **settings)
        finally:
            engine.release()

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr("isthmus.split.dlora.backbone._in_one_thread", lambda device: True)
    run, _ = dlora_run(llama, SMALL, [text(number, 20) for number in range(2)])
    for name, adapter in adapters.items():
        assert_same(run.adapters[name], adapter)


def test_autograd_has_one_thread_for_an_accelerator_and_none_for_the_cpu() -> None:
    assert _in_one_thread(torch.device("cuda"))
    assert not _in_one_thread(torch.device("cpu"))


def test_a_device_that_goes_away_is_not_waited_for(llama: Path) -> None:
    job = Job(llama, SMALL, 2)
    gone, stays = job.trainer(0), job.trainer(1)
    with pytest.raises(LinkLost):
        run(gone, job.link(gone, 0, frames=20))
    run(stays, job.link(stays, 1))
    assert not job.finished.is_set()  # the other may come back
    job.host.start_without({"d0"})
    assert job.finished.wait(60)
    job.host.close()


def test_a_job_in_which_no_module_is_left_ends_with_a_line(llama: Path) -> None:
    """The device's own blocks exchange nothing, so their modules would go on: here it has none."""
    job = Job(llama, ENDING)
    trainer = job.trainer()
    run(trainer, job.link(trainer))
    assert job.finished.wait(60)
    job.host.close()
    assert [data.device_step for data in job.told("step")] == [1, 2, 3]
    assert [data.message for data in job.told("log")][-1] == (
        "d0: after step 3 no module is left that trains: its training has ended"
    )
    assert job.told("modules")[-1].step == 3  # where the picture of what was trained ends
    assert job.told("modules")[-1].active == []
    assert [data.step for data in job.told("evaluation")] == [0, 30]
    assert trainer.step == 3


def test_an_early_end_that_a_broken_link_has_lost_is_told_again_and_is_on_the_disk_before(
    llama: Path, tmp_path: Path
) -> None:
    class Dies(CutLink):
        """With the early end, or with a frame after it."""

        def send(self, frame: Frame) -> None:
            if frame.phase == self.phase and frame.step >= 3:  # type: ignore[attr-defined]
                self.close()
                raise LinkLost("the link was cut")
            super().send(frame)

    _, losses = undisturbed(llama, ENDING.but(validation_fraction=0))
    for phase in (Phase.STEP, Phase.EVALUATE, Phase.CLOSE):
        for restarts in (False, True):
            job = Job(llama, ENDING, records=tmp_path / f"{phase}{restarts}")
            trainer = job.trainer()
            link = Dies(job.host, "d0", trainer, -1)
            link.phase = phase  # type: ignore[attr-defined]
            with pytest.raises(LinkLost):
                run(trainer, link)
            again = job.trainer() if restarts else trainer
            assert again.step == 3
            run(again, job.link(again))
            assert job.finished.wait(60)
            job.host.close()
            assert [data.loss for data in job.told("step")] == pytest.approx(losses, rel=1e-5)
            assert ["no module is left" in data.message for data in job.told("log")].count(True) == 1
            assert job.told("evaluation")[-1].step == 30


Change = Callable[[Frame], Frame]
FRAMES: dict[str, tuple[Phase, Change]] = {
    "another site": (Phase.FORWARD, lambda f: dataclasses.replace(f, site=f.site + 1) if f.site else f),
    "a site that there is not": (Phase.FORWARD, lambda f: dataclasses.replace(f, site=99) if f.site else f),
    "a row too few": (
        Phase.FORWARD,
        lambda f: dataclasses.replace(f, tensor=f.tensor[1:]) if f.site and f.tensor is not None else f,
    ),
    "gradients in the place of outputs": (
        Phase.FORWARD,
        lambda f: dataclasses.replace(f, phase=Phase.BACKWARD) if f.site else f,
    ),
    "a micro-batch that is not under way": (
        Phase.FORWARD,
        lambda f: dataclasses.replace(f, micro_batch=f.micro_batch + 1) if f.site else f,
    ),
    "no set of modules": (Phase.FORWARD, lambda f: f if f.site else dataclasses.replace(f, trained=b"")),
    "modules that train and are not applied": (
        Phase.FORWARD,
        lambda f: f if f.site else dataclasses.replace(f, applied=bytes(len(f.applied))),
    ),
    "modules of the device's own blocks": (
        Phase.FORWARD,
        lambda f: f if f.site else dataclasses.replace(f, applied=f.trained),
    ),
    "a step too early": (Phase.STEP, lambda f: dataclasses.replace(f, step=f.step + 1)),
    "values to merge": (
        Phase.STEP,
        lambda f: dataclasses.replace(
            f, phase=Phase.MERGE, step=f.step + 1, tensor=torch.zeros(64), trained=b"\x40\x00"
        ),
    ),
}


@pytest.mark.parametrize("what", FRAMES)
def test_a_frame_that_is_not_due_ends_that_device_alone(llama: Path, what: str) -> None:
    phase, change = FRAMES[what]

    class Bad(CutLink):
        def send(self, frame: Frame) -> None:
            super().send(change(frame) if frame.phase == phase else frame)

    job = Job(llama, SMALL.but(micro_batches=1), 2)
    bad, good = job.trainer(0), job.trainer(1)
    with pytest.raises(BadRequest):
        run(bad, Bad(job.host, "d0", bad, -1))
    run(good, job.link(good, 1))
    job.host.start_without({"d0"})
    assert job.finished.wait(60)
    job.host.close()


LARGE: dict[str, tuple[dict[str, Any], Phase, bool, float]] = {  # options, the frame's phase, whether of a site, value
    "outputs of modules": ({}, Phase.FORWARD, True, 3e38),
    "hidden states": ({}, Phase.FORWARD, False, float("inf")),
    "gradients": ({}, Phase.BACKWARD, False, 3e38),
    "gradients of modules": ({}, Phase.BACKWARD, True, 3e38),
    "held-out text": ({}, Phase.EVALUATE, True, 3e38),
    "an adapter": ({"aggregate": True, "aggregate_every": 2}, Phase.AGGREGATE, False, 1e30),
    "modules that are merged": (
        {"killed": "merge", "active_fraction": 0.5, "kill_warmup": 1, "kill_anneal": 0, "kill_interval": 1},
        Phase.MERGE, False, 1e30,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LARGE)
def test_numbers_that_overflow_end_the_device_that_sent_them_alone(llama: Path, tmp_path: Path, what: str) -> None:
    options, phase, of_site, value = LARGE[what]

    class Large(CutLink):
        def send(self, frame: Frame) -> None:
            if frame.phase == phase and bool(frame.site) == of_site and frame.tensor is not None:
                frame = dataclasses.replace(frame, tensor=torch.full_like(frame.tensor, value))
            super().send(frame)

    job = Job(llama, SMALL.but(**options), 2, tmp_path)
    large, good = job.trainer(0), job.trainer(1)
    other = threading.Thread(target=run, args=(good, job.link(good, 1)))
    other.start()
    with pytest.raises(BadTensor, match="if training has diverged"):
        run(large, Large(job.host, "d0", large, -1))
    other.join(60)
    job.host.start_without({"d0"})
    assert job.finished.wait(60)
    job.host.close()
    assert not job.told("failed")
    assert max(data.device_step for data in job.told("step") if data.devices == ["d1"]) == SMALL.steps
    assert all(value.abs().max() < 10 for value in good.adapter().values())
    if job.config.dlora.aggregate:
        point = CheckpointFolder(tmp_path / "server").last()
        assert point is not None
        assert point.device_adapter is not None
        assert float(point.device_adapter.abs().max()) < 10


def test_a_device_refuses_what_it_has_not_asked_for(llama: Path) -> None:
    """A coordinator that sends something else than the protocol says is not answered."""
    job = Job(llama, SMALL.but(micro_batches=1))
    trainer = job.trainer()
    changes: list[Change] = [
        lambda f: dataclasses.replace(f, site=77),
        lambda f: dataclasses.replace(f, step=f.step + 1),
        lambda f: dataclasses.replace(f, tensor=None),
        lambda f: dataclasses.replace(f, phase=Phase.BACKWARD, values={INPUT_GRADIENT: 1.0}),
    ]
    for change in changes:

        class Odd(CutLink):
            def receive(self) -> Frame:
                answer = super().receive()
                return self.change(answer) if answer.site else answer  # type: ignore[attr-defined,no-any-return]

        link = Odd(job.host, "d0", trainer, -1)
        link.change = change  # type: ignore[attr-defined]
        with pytest.raises((BadRequest, BadFrame)):
            run(trainer, link)
    job.host.close()


def test_an_error_of_the_blocks_is_told_to_the_device(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(llama, SMALL)
    trainer = job.trainer()

    def full(*_: object, **__: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(job.host.steps.backbone, "forward", full)
    with pytest.raises(IsthmusError, match="the stage failed: MemoryError"):
        run(trainer, job.link(trainer))
    job.host.close()


class QuietLink(CutLink):
    """A link of a device that stays connected and says nothing more, from this phase of this step or a later one on."""

    def __init__(self, job: Job, trainer: DeviceTrainer, number: int, phase: Phase, step: int) -> None:
        super().__init__(job.host, f"d{number}", trainer, -1)
        self._phase, self._step, self._quiet = phase, step, False

    def send(self, frame: Frame) -> None:
        self._quiet = self._quiet or (frame.phase == self._phase and frame.step >= self._step)
        if not self._quiet:
            super().send(frame)


@pytest.mark.parametrize("phase", [Phase.EVALUATE, Phase.REPORT, Phase.CLOSE])
@pytest.mark.parametrize("patience", [Patience(1.0), Patience(60.0, closing=0.5)])
@pytest.mark.parametrize("aggregate", [False, True])
def test_a_device_that_never_closes_does_not_keep_a_job_that_is_done(
    llama: Path, phase: Phase, patience: Patience, aggregate: bool
) -> None:
    options: dict[str, Any] = {"aggregate": True, "aggregate_every": 2} if aggregate else {}
    job = Job(llama, SMALL.but(**options), 2)
    job.host.job.deadlines.patience = dataclasses.replace(patience)
    quiet, good = job.trainer(0), job.trainer(1)
    other = threading.Thread(target=run, args=(good, job.link(good, 1)))
    other.start()
    with pytest.raises(LinkLost, match="d0 has not closed the job"):
        run(quiet, QuietLink(job, quiet, 0, phase, SMALL.steps))
    other.join(60)
    assert job.finished.wait(60)
    job.host.close()
    assert not job.told("failed")
    assert job.host.outcome().resources.keys() == ({"d0", "d1"} if phase == Phase.CLOSE else {"d1"})
    assert any("its last report is missing" in data.message for data in job.told("log"))


def test_a_silent_device_holds_up_the_average_of_the_others_for_less_each_time(llama: Path) -> None:
    job = Job(llama, SMALL.but(steps=40, aggregate=True, aggregate_every=2, checkpoint_every=40), 2)
    job.host.job.deadlines.patience = Patience(2.0)
    quiet, good = job.trainer(0), job.trainer(1)
    other = threading.Thread(target=run, args=(good, job.link(good, 1)))
    other.start()
    patience = []
    for _ in range(2):
        with pytest.raises(LinkLost, match="d0 owed a frame"):
            run(quiet, QuietLink(job, quiet, 0, Phase.AGGREGATE, 0))
        patience.append(job.host.job.deadlines.patience.of("d0"))
    assert patience == [1.0, 0.5]
    other.join(60)
    job.host.start_without({"d0"})
    assert job.finished.wait(60)
    job.host.close()
    assert job.told("step")[-1].device_step == 40


def test_a_device_that_is_silent_again_and_again_is_left_out_when_the_others_are_done(llama: Path) -> None:
    job = Job(llama, SMALL, 2)
    job.host.job.deadlines.patience = Patience(1.0)
    quiet, good = job.trainer(0), job.trainer(1)
    run(good, job.link(good, 1))
    for _ in range(4):
        assert not job.finished.is_set()
        with pytest.raises(LinkLost, match="d0 owed a frame"):
            run(quiet, QuietLink(job, quiet, 0, Phase.FORWARD, 1))
    assert job.finished.wait(10)
    job.host.close()
    assert any("silent again and again" in data.message for data in job.told("log"))
