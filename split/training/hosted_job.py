"""A job at its stage, whatever its method: who takes part in which step, and when something is complete.

A joint phase runs when the frames of all devices at work are there. A device that goes away is no longer waited for.
One that comes, or comes again, takes part from the next aggregation on, when all devices have the same adapter; where
devices have steps of their own, it goes on from the last aggregation at once. When none is left of devices that step
together, the job goes back to the last aggregation, because their part of the steps since then has gone with them.

The method (steps.py) says what a step, an aggregation and a checkpoint consist of. All of this is called in one thread
(host.py).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.events_pb2 import (
    Aggregated,
    DeviceJoined,
    DeviceLeft,
    Event,
    JobFailed,
    JobFinished,
    TrainingStarted,
)
from isthmus.split.aggregation.averager import Share
from isthmus.split.codecs.finite import DIVERGED
from isthmus.split.errors import BadFrame, BadTensor, IsthmusError, LinkLost, WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.events import Tell, log_line, tell_nobody
from isthmus.split.link.coding import Plan
from isthmus.split.link.frames import ENDS, Frame, Phase
from isthmus.split.link.stage import Deliver
from isthmus.split.training.barrier import Barrier
from isthmus.split.training.checkpoint import Checkpoint, CheckpointFolder
from isthmus.split.training.deadlines import Deadlines
from isthmus.split.training.evaluations import Evaluations
from isthmus.split.training.frames import tensor_of
from isthmus.split.training.membership import JoinedDevice, Membership, check_open
from isthmus.split.training.patience import Patience
from isthmus.split.training.plans import Plans
from isthmus.split.training.progress import JobProgress
from isthmus.split.training.recovery import Recovery
from isthmus.split.training.steps import HostSteps


@dataclass(frozen=True)
class HostContext:
    """A job as its host gets it.

    devices: the devices that may take part.
    checkpoints: where to keep checkpoints; None to keep none.
    resume: the checkpoint to go on from; None to start anew.
    tell: is called in the host's thread, with each event.
    """

    config: TrainingConfig
    devices: Collection[str]
    checkpoints: CheckpointFolder | None = None
    resume: Checkpoint | None = None
    patience: Patience = field(default_factory=Patience)
    tell: Tell = tell_nobody


@dataclass(frozen=True)
class Outcome:
    """What a finished job leaves.

    adapter: by names in the whole model; None where each device keeps its own.
    server: the stage's part of the adapter, by name.
    device_adapter: the devices' average, flat; None where there is none.
    losses: mean loss of each step, in nats.
    perplexities: by step.
    resources: what each device reported of its resources.
    """

    adapter: dict[str, Tensor] | None
    server: dict[str, Tensor]
    device_adapter: Tensor | None
    losses: list[float]
    perplexities: dict[int, float]
    resources: dict[str, dict[str, float]]


class HostedJob:
    """A job and its devices. The steps answer devices through `answer` and `refuse`, and watchers through `tell`."""

    def __init__(self, steps: HostSteps, context: HostContext) -> None:
        self.steps, self.config, self.tell = steps, context.config, context.tell
        self.members = Membership(context.devices)
        self._together = Phase.STEP in steps.joint
        self.plans = Plans(context.config, steps.hidden_size, context.tell, together=self._together)
        self.progress = JobProgress(context.devices, context.tell)
        self.evaluations = Evaluations(context.tell)
        self.resources: dict[str, dict[str, float]] = {}
        self.deadlines = Deadlines(context.patience)
        self._barrier = Barrier()
        self._recovery = Recovery(steps, self.progress, context.config, context.checkpoints, context.tell)
        self._finished = False
        steps.job = self
        self._recovery.begin(context.resume)

    @property
    def point(self) -> Checkpoint:
        """The last aggregation, or the start."""
        return self._recovery.point

    # ---- what devices do ----

    def join(self, name: str, frame: Frame, deliver: Deliver) -> None:
        """Takes a device's OPEN. Raises BadFrame for a device that cannot take part."""
        opened = check_open(name, frame.open, self.members.devices, self.config)
        self.steps.check_open(name, opened)
        if self._finished or (opened.last_step == self.config.steps and name in self.members.done):
            deliver(Frame(Phase.CLOSE, self.config.steps))  # nothing is left to do
            return
        earlier = self.members.joined.get(name)
        if earlier is not None:
            earlier.deliver(WrongState(f"{name} has opened this job again from another run"))
            self.leave(name, earlier.deliver)
        measured = frame.measured or stage_pb2.Measured()
        self.members.joined[name] = JoinedDevice(name, deliver, opened, measured, step=int(opened.last_step))
        joined = DeviceJoined(samples=opened.samples, last_step=opened.last_step)
        self.tell(Event(device=name, joined=joined))
        if not self._together or not self.members.at_work:
            self._admit()

    def submit(self, name: str, frame: Frame, deliver: Deliver) -> None:
        """Takes a later frame. Raises BadFrame for one that is not due."""
        device = self.members.of_stream(name, deliver)
        if device is None:
            return  # a stream that was replaced or refused had sent this before it ended
        if not device.admitted:
            raise BadFrame(f"{Phase.Name(frame.phase)} before the session was agreed")
        device.heard = time.monotonic()
        if device.averaging:
            due = f"nothing until AGGREGATE of step {device.step - 1} is answered"
            raise BadFrame(f"{Phase.Name(frame.phase)} of step {frame.step}; due from {name} is {due}")
        if frame.phase == Phase.REPORT and "evaluation_tokens" not in frame.values:
            self.resources[name] = dict(frame.values)
            return
        self.steps.check(device, frame)
        if frame.phase == Phase.REPORT:
            tokens = int(frame.values["evaluation_tokens"])
            self.evaluations.add(frame.step, name, frame.values.get("evaluation_nll", 0.0), tokens)
            self._complete_evaluations()
        elif frame.phase == Phase.CLOSE:
            device.answer(Frame(Phase.CLOSE, frame.step))
            self.leave(name, deliver, done=True)
        elif frame.phase in self.steps.joint:
            device.step += frame.phase == Phase.STEP
            device.averaging = frame.phase == Phase.AGGREGATE
            self._barrier.put(name, frame)
            self._run_complete()
        elif frame.phase == Phase.STEP:
            self._stepped(device, frame)
        else:
            self.steps.take(device, frame)

    def leave(self, name: str, deliver: Deliver, *, done: bool = False) -> None:
        """Notes that a device's stream has ended.

        done: whether the device has closed the job, or was given up after its last step.
        """
        device = self.members.of_stream(name, deliver)
        if device is None:
            return
        del self.members.joined[name]
        if done:
            self.members.done.add(name)
        step = self.progress.step if self._together else device.step
        self.tell(Event(device=name, left=DeviceLeft(step=step, done=name in self.members.done)))
        self.steps.left(device)
        self._barrier.drop(name)
        if self.members.at_work:
            self._run_complete()
            self._complete_evaluations()
        else:
            self._nobody_is_left(done)

    def start_without(self, missing: Collection[str]) -> None:
        """Stops waiting for devices that have not come. They may still come."""
        if self.members.started and not self.steps.keeps_own:
            return
        self.members.awaited -= set(missing) - self.members.joined.keys()
        if self.members.joined:
            self._admit()
        self._complete_evaluations()
        if self.steps.keeps_own:
            self._finish_if_done(done=False)

    # ---- what the steps and the host's thread ask for ----

    def answer(self, name: str, frame: Frame) -> None:
        device = self.members.joined[name]
        device.answer(frame)
        self.steps.answered(device, frame)

    def refuse(self, devices: Collection[str], of: Collection[str], what: str) -> None:
        """Goes on without the devices whose share gives no finite numbers, as if they had left.

        devices: the devices to refuse.
        of: all devices that had a share.
        what: the subject of the error's sentence.

        Raises WrongState, which ends the job, if there are several devices and all are to be refused: then the stage
        has diverged.
        """
        if len(of) > 1 and len(devices) == len(of):
            raise WrongState(f"{what} are not finite for any device: {DIVERGED}; --resume goes on from a checkpoint")
        for name in sorted(devices):
            error = BadTensor(f"{name}: {what} give values that float32 does not hold: {DIVERGED}")
            self.put_out(self.members.joined.get(name), error)

    def put_out(self, device: JoinedDevice | None, error: IsthmusError, *, done: bool = False) -> None:
        """Ends a device's stream with an error."""
        if device is not None and self.members.joined.get(device.name) is device:
            device.deliver(error)
            self.leave(device.name, device.deliver, done=done)

    def owes_adapter(self, device: JoinedDevice) -> bool:
        """Whether an aggregation lies between a device and its next step."""
        return self.config.aggregates_after(device.step) and device.step > self.point.step

    def look(self) -> None:
        """Goes on without devices that have owed a frame for too long. It is called about once a second."""
        for device in list(self.members.joined.values()):
            if self.members.joined.get(device.name) is not device or not device.admitted:
                continue  # gone meanwhile, or not yet admitted
            seconds, waits = self.steps.owed_by(device), self._barrier.has(device.name)
            over = device.step == self.config.steps and not self.owes_adapter(device)
            last = self.steps.keeps_own and self.members.others_are_done(device.name)
            waited_for = last or device.name in self._barrier.missing(self.members.at_work)
            late = self.deadlines.late(device, seconds, waits=waits, waited_for=waited_for, over=over)
            if not late:
                continue
            self.deadlines.patience.was_silent(device.name)
            if over:
                self.tell(log_line(f"{late}: its last report is missing", device.name))
            elif last and self.deadlines.patience.is_least(device.name):
                message = f"{device.name} was silent again and again: the job ends without it"
                self.tell(log_line(message, device.name))
                self.members.awaited.discard(device.name)
            self.put_out(device, LinkLost(late), done=over)

    def fail(self, error: IsthmusError) -> None:
        """Ends the job for everybody."""
        for device in self.members.joined.values():
            device.deliver(error)
            self.steps.left(device)
        self.members.joined.clear()
        self.tell(Event(failed=JobFailed(message=str(error))))

    # ---- parts of it ----

    def _admit(self) -> None:
        """Admits devices; where adapters are averaged, the first ones all together."""
        if not self.members.started:
            if self.config.averages and not self.members.all_here:
                return
            self.members.started = True
            self.tell(Event(started=TrainingStarted(step=self.point.step)))
        waiting = self.members.waiting
        for name, plan in self._plans_for(waiting).items():
            device = waiting[name]
            if self.config.averages:
                device.step = self.point.step
            device.admitted, device.plan = True, plan
            answer = self.steps.begin(device)
            agreement = stage_pb2.Agreement(
                start_step=device.step,
                batch_size=self.config.batch_size,
                sequence_length=self.config.text.sequence_length,
                hidden_size=self.steps.hidden_size,
                adapter_values=self.steps.adapter_values(name),
            )
            self.answer(name, replace(answer, agreement=agreement, plan=plan))

    def _plans_for(self, devices: Mapping[str, JoinedDevice]) -> dict[str, Plan]:
        others = [self.members.joined[name] for name in self.members.at_work if name not in devices]
        return self.plans.make(devices, others, self.steps.stage_seconds()) if devices else {}

    def _stepped(self, device: JoinedDevice, frame: Frame) -> None:
        """Notes that a device has done a step of its own, or that it does no further one."""
        ends = bool(frame.values.get(ENDS))
        first = self.progress.by_device[device.name] < self.config.steps  # else it is told again, over another link
        device.step = self.config.steps if ends else frame.step + 1
        if ends:
            self.progress.by_device[device.name] = self.config.steps
        if first or not ends:
            self.steps.stepped(device, frame)
        if not ends:
            self.deadlines.patience.kept_pace(device.name)
            self.progress.alone(device.name, frame)

    def _run_complete(self) -> None:
        """Runs each phase for which all devices at work have sent their frames."""
        while (complete := self._barrier.take_complete(self.members.at_work)) is not None:
            place, frames = complete
            if place.phase == Phase.AGGREGATE:
                self._aggregate(place.step, frames)
                continue
            self.steps.run(place, frames)
            if place.phase == Phase.STEP:
                for name in frames:
                    self.deadlines.patience.kept_pace(name)
                self.progress.together(place.step, frames)

    def _aggregate(self, step: int, frames: Mapping[str, Frame]) -> None:
        """Makes one adapter of the devices' adapters, which is on disk before anyone has it."""
        shares = {name: Share(tensor_of(frame), self.members.joined[name].samples) for name, frame in frames.items()}
        unfit = self.steps.unfit(shares, self.point.device_adapter)
        self.refuse(unfit, frames, f"the adapter's values after step {step + 1}")
        devices = {name: self.members.joined[name] for name in frames if name not in unfit}
        if not devices:
            return
        for name, device in devices.items():
            device.measured = frames[name].measured or device.measured
        try:
            made = self.steps.aggregate(step, {name: shares[name] for name in devices}, self.point.device_adapter)
        except BadTensor as error:  # no single device has caused it
            raise WrongState(f"the average of the adapters after step {step + 1} cannot be sent: {error}") from None
        told = Aggregated(step=step + 1, method=made.method, aggregation_error=made.error)
        self.tell(Event(aggregation=told))
        answers = {**made.answers, **self.steps.after_aggregation(step, devices)}
        self._recovery.keep(step + 1, made.average)
        plans: Mapping[str, Plan] = {}
        if self.point.step < self.config.steps and self.plans.is_due(self.members.joined.values()):
            plans = self._plans_for(devices)
        self.plans.aggregated()
        for name in devices:
            self.answer(name, replace(answers[name], plan=plans.get(name)))
        self._admit()

    def _complete_evaluations(self) -> None:
        self.evaluations.complete(self.members.awaited if self.steps.keeps_own else self.members.at_work)

    def _nobody_is_left(self, done: bool) -> None:
        self._barrier.clear()
        applied = self.steps.drop()
        if self._finish_if_done(done=done):
            return
        if self._together and (applied or self.progress.step != self.point.step):
            before, last = self.progress.step, self.point.step
            self._recovery.go_back()
            message = f"no device is left: back from step {before} to the last aggregation, of step {last}"
            self.tell(log_line(message))
        if self.members.started and self.members.joined:
            self._admit()

    def _finish_if_done(self, *, done: bool) -> bool:
        """Ends the job if nothing is left to do. Returns whether it ended.

        done: whether the device that was the last at work had come to its end.
        """
        if self._finished or self.members.at_work:
            return False
        steps = self.config.steps
        if self.steps.keeps_own:
            over = bool(self.members.done) and self.members.awaited <= self.members.done
        else:
            over = self.point.step == steps
            if over:
                self.evaluations.complete(())  # no device that could still report an evaluation is left
            evaluated = steps in self.evaluations.perplexities or not self.config.evaluates_after(steps)
            over = over and (done or evaluated)
        if over:
            self._finished = True
            self.tell(Event(finished=JobFinished(step=steps)))
        return over
