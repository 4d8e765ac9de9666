"""Hosts the server's stage for several devices: who takes part in which step, and when a step is complete.

One thread owns everything here; `join`, `submit` and `leave` only put work into its inbox, so there is nothing to lock.
A step's phase runs when every participant's frame for it is there. A device that goes away is no longer waited for; one
that comes (again) takes part from the next aggregation on, when all devices have the same adapter. When nobody is left,
the stage goes back to the last aggregation: the devices' part of the steps since then has gone with them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protos.v1 import stage_pb2
from split.checkpoint import Checkpoint, CheckpointFolder
from split.config import TrainingConfig
from split.errors import BadFrame, BadRequest, IsthmusError, LinkLost, WrongState
from split.evaluate import nll
from split.link import Frame, Phase
from split.members import Deliver, Member
from split.perplexity import perplexity
from split.train import ServerTrainer, tensor_of

Tell = Callable[[str, str, dict[str, Any]], None]  # kind, device, data

PATIENCE = 300.0  # seconds that a connected device may owe a frame before the others go on without it


@dataclass(frozen=True)
class Outcome:
    """What a finished job leaves: the server's adapter, the devices' averaged one (flat), and each device's report."""

    server: dict[str, Tensor]
    device_adapter: Tensor
    losses: list[float]
    perplexities: dict[int, float]
    resources: dict[str, dict[str, float]]


class StageHost:
    """tell(kind, device, data) is called in the host's thread, with kind one of: joined, left, started, step,
    evaluation, checkpoint, log, finished, failed."""

    def __init__(
        self,
        trainer: ServerTrainer,
        config: TrainingConfig,
        devices: set[str],
        *,
        adapter_values: int,
        stage_digest: str = "",
        checkpoints: CheckpointFolder | None = None,
        resume: Checkpoint | None = None,
        patience: float = PATIENCE,
        tell: Tell = lambda kind, device, data: None,
    ) -> None:
        self.trainer, self.config, self.tell = trainer, config, tell
        self._devices = frozenset(devices)  # that may take part
        self._awaited = set(devices)  # that the first step waits for
        self._adapter_values, self._stage_digest = adapter_values, stage_digest
        self._checkpoints, self._patience = checkpoints, patience
        self._members: dict[str, Member] = {}
        self._groups: dict[tuple[int, stage_pb2.Phase], dict[str, Frame]] = {}
        self._evaluations: dict[int, dict[str, tuple[float, int]]] = {}
        self._resources: dict[str, dict[str, float]] = {}
        self._perplexities: dict[int, float] = {}
        self._losses: list[float] = []
        self.step = 0
        self._started = self._finished = False
        if resume:
            self._go_back_to(resume)
        self._point = resume or self._snapshot(None)  # the last aggregation, or the start
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stage-host", daemon=True)
        self._thread.start()

    # ---- called from any thread ----

    def join(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """A device's OPEN. Its answer comes when it is admitted. A device that joins again replaces itself."""
        return self._post(device, deliver, lambda: self._join(device, frame, deliver))

    def submit(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """The next frame of a device's stream. One that is not due is refused with BadFrame, to that device alone.

        The future is done when the frame has been taken: who reads a network waits for it before reading on.
        """
        return self._post(device, deliver, lambda: self._submit(device, frame, deliver))

    def leave(self, device: str, deliver: Deliver) -> None:
        """A device's stream has ended. Nothing happens if the device has joined again by another one since."""
        self._inbox.put(lambda: self._leave(device, deliver))

    def start_without(self, missing: set[str]) -> None:
        """Stops waiting for devices that have not come. They may still come."""
        self._inbox.put(lambda: self._start_without(missing))

    def close(self) -> None:
        """Ends the thread once what was submitted is done."""
        self._inbox.put(None)
        self._thread.join()

    def outcome(self) -> Outcome:
        """After `finished`."""
        server = {name: value.detach().cpu() for name, value in self.trainer.stepper.parameters.items()}
        average = self._point.device_adapter
        if average is None:  # no device trains anything, or the job had no step
            average = torch.zeros(self._adapter_values)
        return Outcome(server, average, self._losses, self._perplexities, self._resources)

    # ---- in the host's thread ----

    def _run(self) -> None:
        torch.get_num_threads()  # takes up the process's setting: a Ray worker's new threads compute with one
        while True:
            try:
                work = self._inbox.get(timeout=1.0)
            except queue.Empty:
                work = self._drop_silent
            if work is None:
                return
            try:
                work()
            except IsthmusError as error:
                self._fail(error)
            except Exception as error:  # a bug or no memory: every device is told, nobody waits for ever
                self._fail(IsthmusError(f"the stage failed: {type(error).__name__}: {error}"))
                raise

    def _post(self, device: str, deliver: Deliver, work: Callable[[], None]) -> Future[None]:
        taken: Future[None] = Future()

        def guarded() -> None:
            try:
                work()
            except BadRequest as error:
                deliver(error)
                self._leave(device, deliver)
            finally:
                if taken.set_running_or_notify_cancel():  # not, if the stream has ended meanwhile
                    taken.set_result(None)

        self._inbox.put(guarded)
        return taken

    def _join(self, device: str, frame: Frame, deliver: Deliver) -> None:
        opened = frame.open
        problem = self._problem_with(device, opened)
        if problem or opened is None:
            raise BadFrame(problem or "OPEN without its contents")
        if self._finished:
            deliver(Frame(Phase.CLOSE, self.step))  # nothing is left to do
            return
        earlier = self._members.get(device)
        if earlier is not None:
            earlier.deliver(WrongState(f"{device} has opened this job again from another run"))
            self._leave(device, earlier.deliver)
        self._members[device] = Member(deliver, samples=opened.samples)
        self.tell("joined", device, {"samples": opened.samples, "last_step": opened.last_step})
        if not self._participants:
            self._admit()

    def _problem_with(self, device: str, opened: stage_pb2.Open | None) -> str:
        if device not in self._devices:
            return f"device {device} has no part in this job"
        if opened is None or "none" not in opened.codecs:
            return "no codec in common: this coordinator has none"
        if opened.adapter_values != self._adapter_values:
            return f"an adapter of {opened.adapter_values} values; this job's devices have {self._adapter_values}"
        if self._stage_digest and opened.stage_digest != self._stage_digest:
            return "the device's model files differ from the coordinator's: their digests are not the same"
        if not 0 < opened.samples < 2**40:
            return f"{opened.samples} training sequences; at least one is needed"
        return ""

    def _admit(self) -> None:
        """Lets devices in: all together at the start; later at an aggregation, or at once when none is at work."""
        if not self._started:
            if not self._awaited <= self._members.keys():
                return
            self._started = True
            self.tell("started", "", {"step": self.step})
        for _, member in sorted(self._members.items()):
            if member.admitted:
                continue
            member.admit(self.step)
            agreement = stage_pb2.Agreement(
                start_step=self.step,
                codec="none",
                batch_size=self.config.batch_size,
                sequence_length=self.config.sequence_length,
                hidden_size=self.trainer.stage.model.config.hidden_size,
                adapter_values=self._adapter_values,
            )
            member.answer(Frame(Phase.OPEN, agreement=agreement, tensor=self._point.device_adapter))

    def _start_without(self, missing: set[str]) -> None:
        if not self._started:
            self._awaited -= missing - self._members.keys()
            self._admit()

    @property
    def _participants(self) -> list[str]:
        return sorted(device for device, member in self._members.items() if member.admitted)

    def _submit(self, device: str, frame: Frame, deliver: Deliver) -> None:
        member = self._members.get(device)
        if member is None or member.deliver is not deliver:
            return  # what a stream that was replaced or refused had sent before it ended
        if not member.admitted:
            raise BadFrame(f"{Phase.Name(frame.phase)} before the session was agreed")
        if frame.phase == Phase.EVALUATE:
            member.check_evaluates(frame, self.config)
            member.answer(self._evaluated(frame))
        elif frame.phase == Phase.REPORT:
            self._report(device, member, frame)
        elif frame.phase == Phase.CLOSE:
            member.answer(Frame(Phase.CLOSE, frame.step))
            self._leave(device, deliver, closed=True)
        else:
            member.take(device, frame, self.config)
            self._groups.setdefault((frame.step, frame.phase), {})[device] = frame
            self._run_complete_groups()

    def _run_complete_groups(self) -> None:
        """Runs what every participant has sent. In order: a device is never more than one phase ahead."""
        for key in sorted(self._groups):
            group = self._groups[key]
            participants = self._participants
            if not participants or not set(participants) <= group.keys():
                return
            del self._groups[key]
            frames = {device: group[device] for device in participants}
            step, phase = key
            if phase == Phase.FORWARD:
                self._forward(step, frames)
            elif phase == Phase.BACKWARD:
                self._backward(step, frames)
            elif phase == Phase.STEP:
                self._apply(step, frames)
            else:
                self._aggregate(step, frames)

    def _forward(self, step: int, frames: Mapping[str, Frame]) -> None:
        batches = {device: tensor_of(frame) for device, frame in frames.items()}
        if self.config.labels == "device":
            for device, output in self.trainer.forward(batches).items():
                self._members[device].answer(Frame(Phase.FORWARD, step, tensor=output.float()))
            return
        labels = {device: frame.labels for device, frame in frames.items() if frame.labels is not None}
        gradients, sums = self.trainer.forward_backward(batches, labels)
        for device, gradient in gradients.items():
            loss, tokens = sums[device]
            self._answer_gradient(device, Phase.FORWARD, step, gradient, {"nll": loss, "tokens": float(tokens)})

    def _backward(self, step: int, frames: Mapping[str, Frame]) -> None:
        gradients = {device: (tensor_of(frame), int(frame.values["tokens"])) for device, frame in frames.items()}
        for device, gradient in self.trainer.backward(gradients).items():
            self._answer_gradient(device, Phase.BACKWARD, step, gradient, {})

    def _answer_gradient(
        self, device: str, phase: stage_pb2.Phase, step: int, gradient: Tensor, values: dict[str, float]
    ) -> None:
        values = {**values, "norm_squared": self.trainer.norm_squared}
        tensor = gradient.float() if self._adapter_values else None  # nobody to use it where a device trains nothing
        self._members[device].answer(Frame(phase, step, tensor=tensor, values=values))

    def _apply(self, step: int, frames: Mapping[str, Frame]) -> None:
        norms = {name: (frame.values["norm_squared"], int(frame.values["tokens"])) for name, frame in frames.items()}
        self.trainer.step(step, norms)
        self.step = step + 1
        tokens = sum(tokens for _, tokens in norms.values())
        loss = sum(frame.values["nll"] for frame in frames.values()) / max(tokens, 1)
        self._losses.append(loss)
        self.tell("step", "", {"step": self.step, "loss": loss, "tokens": tokens, "devices": sorted(frames)})

    def _aggregate(self, step: int, frames: Mapping[str, Frame]) -> None:
        """The devices' adapters, averaged by their numbers of training sequences, on disk before anyone has it."""
        total = sum(self._members[device].samples for device in frames)
        average = torch.zeros(self._adapter_values)
        for device, frame in frames.items():
            average += tensor_of(frame) * (self._members[device].samples / total)
        self._point = self._snapshot(average)
        if self.config.checkpoints_after(self.step) and self._checkpoints:
            self._checkpoints.save(self._point)
            self.tell("checkpoint", "", {"step": self.step})
        for device in frames:
            self._members[device].answer(Frame(Phase.AGGREGATE, step, tensor=average))
        self._admit()

    def _snapshot(self, average: Tensor | None) -> Checkpoint:
        stepper = self.trainer.stepper
        server = {name: value.detach().to("cpu", copy=True) for name, value in stepper.parameters.items()}
        return Checkpoint(self.step, server, stepper.state(), average, list(self._losses), self._stage_digest)

    def _go_back_to(self, point: Checkpoint) -> None:
        """Raises WrongState for a checkpoint of another model or of other options."""
        if point.stage_digest != self._stage_digest:
            raise WrongState("the model's files have changed since the checkpoint was written: put the old ones back")
        self.trainer.restore(point.server, point.optimizer)
        self.step, self._losses = point.step, list(point.losses)

    def _evaluated(self, frame: Frame) -> Frame:
        outputs = self.trainer.evaluate(tensor_of(frame))
        if frame.labels is None:
            return Frame(Phase.EVALUATE, frame.step, tensor=outputs.float())
        loss, tokens = nll(outputs, frame.labels.to(outputs.device))
        return Frame(Phase.EVALUATE, frame.step, values={"nll": float(loss), "tokens": float(tokens)})

    def _report(self, device: str, member: Member, frame: Frame) -> None:
        if "evaluation_tokens" not in frame.values:
            self._resources[device] = dict(frame.values)
            return
        member.check_evaluates(frame, self.config)
        sums = self._evaluations.setdefault(frame.step, {})
        sums[device] = (frame.values.get("evaluation_nll", 0.0), int(frame.values["evaluation_tokens"]))
        self._complete_evaluations(set(self._participants))

    def _complete_evaluations(self, awaited: set[str]) -> None:
        """Adds up the evaluations that no awaited device lacks."""
        for step, sums in sorted(self._evaluations.items()):
            total = sum(loss for loss, _ in sums.values())
            tokens = sum(count for _, count in sums.values())
            if step in self._perplexities or not awaited <= sums.keys() or not tokens:
                continue
            self._perplexities[step] = perplexity(total, tokens)
            each = {device: perplexity(loss, count) for device, (loss, count) in sums.items() if count}
            data = {"step": step, "perplexity": self._perplexities[step], "tokens": tokens, "devices": each}
            self.tell("evaluation", "", data)

    def _leave(self, device: str, deliver: Deliver, *, closed: bool = False) -> None:
        member = self._members.get(device)
        if member is None or member.deliver is not deliver:
            return
        del self._members[device]
        self.tell("left", device, {"step": self.step, "done": closed})
        for group in self._groups.values():
            group.pop(device, None)
        if self._participants:
            self._run_complete_groups()
            self._complete_evaluations(set(self._participants))
            return
        self._groups.clear()
        self.trainer.drop()
        at_end = self._point.step == self.config.steps
        if at_end:
            self._complete_evaluations(set())  # of the devices that could still report theirs
        evaluated = self.config.steps in self._perplexities or not self.config.evaluates_after(self.config.steps)
        if at_end and (closed or evaluated):
            self._finished = True
            self.tell("finished", "", {"step": self.step})
            return
        if self.step != self._point.step:
            message = (
                f"no device is left: back from step {self.step} to the last aggregation, of step {self._point.step}"
            )
            self._go_back_to(self._point)
            self.tell("log", "", {"message": message})
        if self._started and self._members:
            self._admit()

    def _drop_silent(self) -> None:
        """Goes on without a device that is connected but has owed a frame for too long."""
        if not self._groups:
            return
        group = self._groups[min(self._groups)]
        now = time.monotonic()
        for device in self._participants:
            member = self._members[device]
            if device not in group and now - member.answered > self._patience:
                member.deliver(
                    LinkLost(f"{device} owed a frame for {self._patience:.0f} s; the others went on without it")
                )
                self._leave(device, member.deliver)

    def _fail(self, error: IsthmusError) -> None:
        for member in self._members.values():
            member.deliver(error)
        self._members.clear()
        self.tell("failed", "", {"message": str(error)})
