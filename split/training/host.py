"""Hosts the server's stage for several devices: who takes part in which step, and when a step is complete.

One thread owns everything here; `join`, `submit` and `leave` only put work into its inbox, so there is nothing to lock.
A phase of a micro-batch runs when every participant's frame for it is there. A device that goes away is no longer
waited for; one that comes (again) takes part from the next aggregation on, when all devices have the same adapter. When
nobody is left, the stage goes back to the last aggregation: the devices' part of the steps since then has gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.aggregation.averaging import Share
from isthmus.split.aggregation.merging import Merging
from isthmus.split.errors import BadFrame, BadRequest, IsthmusError, LinkLost, WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import remembers_samples, stream_of
from isthmus.split.link.coding import Plan
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.order import Order
from isthmus.split.link.profile import LinkProfile
from isthmus.split.link.stage import Deliver
from isthmus.split.plan.choose import Planner, View
from isthmus.split.plan.moving import Mover
from isthmus.split.training.checkpoint import Checkpoint, CheckpointFolder
from isthmus.split.training.device import tensor_of
from isthmus.split.training.inbox import Inbox
from isthmus.split.training.job_adapters import JobAdapters, Segments
from isthmus.split.training.loss import nll
from isthmus.split.training.members import Member, problem_with_open
from isthmus.split.training.perplexity import perplexity
from isthmus.split.training.server import ServerTrainer

Tell = Callable[[str, str, dict[str, Any]], None]  # kind, device, data
_Group = tuple[int, stage_pb2.Phase, int]  # step, phase, micro-batch
_MOST_KEYS = 2**24  # samples of a device that codecs with a memory tell apart: their order takes 8 bytes each
_PLAN_FIRST, _PLAN_EVERY = 2, 8  # aggregations: the first ones after which a plan is made anew, then every so many

PATIENCE = 300.0  # seconds that a connected device may owe a frame before the others go on without it


@dataclass(frozen=True)
class Outcome:
    """What a finished job leaves: the server's adapter, the devices' averaged one (flat), and each device's report.

    merged: where devices differ, the whole adapter, by name.
    """

    server: dict[str, Tensor]
    device_adapter: Tensor
    losses: list[float]
    perplexities: dict[int, float]
    resources: dict[str, dict[str, float]]
    merged: dict[str, Tensor] | None = None


class StageHost:
    """initial_adapter: what every device's adapter is at the start, by name; merging: instead, where devices differ.

    stage_digest: of what a device holds; by cut where they differ. mover: says when cuts are to move; segments: makes
    the server's stages for the shapes that there are then.

    tell(kind, device, data) is called in the host's thread, with kind one of: joined, left, started, step, aggregation,
    evaluation, checkpoint, log, finished, failed."""

    def __init__(
        self,
        trainer: ServerTrainer,
        config: TrainingConfig,
        devices: set[str],
        *,
        initial_adapter: Mapping[str, Tensor] = MappingProxyType({}),
        merging: Merging | None = None,
        mover: Mover | None = None,
        segments: Segments | None = None,
        stage_digest: str | Mapping[int, str] = "",
        checkpoints: CheckpointFolder | None = None,
        resume: Checkpoint | None = None,
        patience: float = PATIENCE,
        tell: Tell = lambda kind, device, data: None,
    ) -> None:
        self.trainer, self.config, self.tell = trainer, config, tell
        self.ledger = trainer.ledger
        self._devices = frozenset(devices)  # that may take part
        self._awaited = set(devices)  # that the first step waits for
        self._adapters = JobAdapters(
            trainer,
            config,
            initial_adapter=initial_adapter,
            merging=merging,
            mover=mover,
            segments=segments,
            stage_digest=stage_digest,
            tell=tell,
        )
        self._checkpoints, self._patience = checkpoints, patience
        self._members: dict[str, Member] = {}
        self._groups: dict[_Group, dict[str, Frame]] = {}
        self._norms: dict[str, tuple[float, int]] = {}  # of the last step's gradients on the devices
        self._planner = Planner(config, trainer.stage.model.config.hidden_size)
        self._aggregations = 0
        self._stepped_ahead = False  # with overlap stale: this side has done a step whose STEP frames have not all come
        self._steps_timed = 0
        self._evaluations: dict[int, dict[str, tuple[float, int]]] = {}
        self._resources: dict[str, dict[str, float]] = {}
        self._perplexities: dict[int, float] = {}
        self._losses: list[float] = []
        self.step = 0
        self._started = self._finished = False
        if resume:
            self._go_back_to(resume)
        self._point = resume or self._snapshot(None)  # the last aggregation, or the start
        self._inbox = Inbox("stage-host", look=self._drop_silent, fail=self._fail)
        self._inbox.start()

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
        self._inbox.close()

    def outcome(self) -> Outcome:
        """After `finished`."""
        server = {name: value.detach().cpu() for name, value in self.trainer.stepper.parameters.items()}
        average, merged = self._adapters.result(self._point, server)
        return Outcome(server, average, self._losses, self._perplexities, self._resources, merged)

    def adapter_shapes(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        return self._adapters.shapes_for(device)

    def layout_for(self, device: str) -> None:
        return None

    # ---- in the host's thread ----

    def _post(self, device: str, deliver: Deliver, work: Callable[[], None]) -> Future[None]:
        def refused(error: BadRequest) -> None:
            deliver(error)
            self._leave(device, deliver)

        return self._inbox.post(work, refused)

    def _join(self, device: str, frame: Frame, deliver: Deliver) -> None:
        opened = frame.open
        problem = self._problem_with(device, opened)
        if problem or opened is None:
            raise BadFrame(problem)
        if self._finished:
            deliver(Frame(Phase.CLOSE, self.step))  # nothing is left to do
            return
        earlier = self._members.get(device)
        if earlier is not None:
            earlier.deliver(WrongState(f"{device} has opened this job again from another run"))
            self._leave(device, earlier.deliver)
        measured = frame.measured or stage_pb2.Measured()
        order = Order(self.config, device)
        member = Member(deliver, order, opened.samples, frozenset(opened.codecs), measured)
        member.moves = self._adapters.has_moved(device, opened)
        self._members[device] = member
        self.tell("joined", device, {"samples": opened.samples, "last_step": opened.last_step})
        if not self._participants:
            self._admit()

    def _problem_with(self, device: str, opened: stage_pb2.Open | None) -> str:
        problem = problem_with_open(device, opened, self._devices, self.config)
        if problem or opened is None:
            return problem
        problem = self._adapters.problem_with(device, opened)
        if problem:
            return problem
        if opened.samples > _MOST_KEYS and remembers_samples(self.config.link.codec):
            return f"{opened.samples} training sequences are more than the {_MOST_KEYS} that ef and delta keep apart"
        return ""

    def _admit(self) -> None:
        """Lets devices in: all together at the start; later at an aggregation, or at once when none is at work."""
        if not self._started:
            if not self._awaited <= self._members.keys():
                return
            self._started = True
            self.tell("started", "", {"step": self.step})
        waiting = {device: member for device, member in sorted(self._members.items()) if not member.admitted}
        if not waiting:
            return
        settled = next((self._members[device].plan.micro_batches for device in self._participants), None)
        plans = self._plan(waiting, settled)
        for device, member in waiting.items():
            member.admit(self.step)
            agreement = stage_pb2.Agreement(
                start_step=self.step,
                batch_size=self.config.batch_size,
                sequence_length=self.config.text.sequence_length,
                hidden_size=self.trainer.stage.model.config.hidden_size,
                adapter_values=self._adapters.values_of(device),
            )
            answer = self._adapters.start(device, self._point, moved=member.moves)
            member.moves = False
            member.answer(replace(answer, agreement=agreement, plan=plans[device]))

    def _plan(self, members: Mapping[str, Member], micro_batches: int | None = None) -> dict[str, Plan]:
        """How each device's tensors cross from now on; watchers are told what changes and why."""
        views = {device: View.of(member.families, member.measured, member.plan) for device, member in members.items()}
        for device, member in members.items():
            member.link = views[device].link
        work, steps = self.trainer.ledger.compute_by_work, self._steps_timed
        stage = {name: work[name] / steps for name in ("forward", "backward")} if steps else {}
        plans, sentences = self._planner.plans(views, stage, micro_batches)
        for sentence in sentences:
            self.tell("log", "", {"message": sentence})
        return plans

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
            member.order.check_evaluation(frame)
            member.answer(self._evaluated(device, frame))
        elif frame.phase == Phase.REPORT:
            self._report(device, member, frame)
        elif frame.phase == Phase.CLOSE:
            member.answer(Frame(Phase.CLOSE, frame.step))
            self._leave(device, deliver, closed=True)
        else:
            member.order.take(frame)
            self._look_at(frame, upward=True)
            self._groups.setdefault((frame.step, frame.phase, frame.micro_batch), {})[device] = frame
            self._run_complete_groups()

    def _run_complete_groups(self) -> None:
        """Runs what every participant has sent."""
        for key in sorted(self._groups):
            group, participants = self._groups.get(key), self._participants
            if group is None or not participants or not set(participants) <= group.keys():
                continue
            del self._groups[key]
            frames = {device: group[device] for device in participants}
            step, phase, micro_batch = key
            if phase == Phase.FORWARD:
                self._forward(step, micro_batch, frames)
            elif phase == Phase.BACKWARD:
                self._backward(step, micro_batch, frames)
            elif phase == Phase.STEP:
                self._apply(step, frames)
            else:
                self._aggregate(step, frames)

    def _forward(self, step: int, micro_batch: int, frames: Mapping[str, Frame]) -> None:
        batches = {device: tensor_of(frame) for device, frame in frames.items()}
        if self.config.devices.labels == "device":
            for device, output in self.trainer.forward(batches, micro_batch=micro_batch).items():
                self._answer(
                    device, Frame(Phase.FORWARD, step, micro_batch, where_wanted(output.float(), frames[device].wanted))
                )
            return
        labels = {device: frame.labels for device, frame in frames.items() if frame.labels is not None}
        tokens = {device: int(frame.values["tokens"]) for device, frame in frames.items()}
        last = self._is_last(micro_batch, frames)
        gradients, sums = self.trainer.forward_backward(batches, labels, tokens, micro_batch=micro_batch, last=last)
        for device, gradient in gradients.items():
            loss, count = sums[device]
            values = {"nll": loss, "tokens": float(count)}
            self._answer_gradient(device, Frame(Phase.FORWARD, step, micro_batch, gradient, values=values))
        self._step_at_once(step, last)

    def _backward(self, step: int, micro_batch: int, frames: Mapping[str, Frame]) -> None:
        gradients = {device: (tensor_of(frame), int(frame.values["tokens"])) for device, frame in frames.items()}
        last = self._is_last(micro_batch, frames)
        for device, gradient in self.trainer.backward(gradients, micro_batch=micro_batch, last=last).items():
            self._answer_gradient(device, Frame(Phase.BACKWARD, step, micro_batch, gradient))
        self._step_at_once(step, last)

    def _is_last(self, micro_batch: int, frames: Mapping[str, Frame]) -> bool:
        return micro_batch + 1 == self._members[next(iter(frames))].plan.micro_batches

    def _answer_gradient(self, device: str, frame: Frame) -> None:
        trains = self._adapters.values_of(device) > 0  # else the gradient is of no use there
        tensor = tensor_of(frame).float() if trains else None
        values = {**frame.values, "norm_squared": self.trainer.norm_squared(device)}
        self._answer(device, replace(frame, tensor=tensor, values=values))

    def _answer(self, device: str, frame: Frame) -> None:
        self._look_at(frame, upward=False)
        self._members[device].answer(frame)

    def _look_at(self, frame: Frame, *, upward: bool) -> None:
        """Shows the planner a tensor of the last step before it is asked."""
        done = frame.step + 1
        due = self.config.aggregates_after(done) and done < self.config.steps and self._plan_due
        if due and self._planner.automatic and frame.micro_batch == 0 and frame.tensor is not None:
            self._planner.look_at(stream_of(frame.phase, upward, self.config.devices.labels), frame.tensor)

    @property
    def _plan_due(self) -> bool:
        """After the aggregation that comes next."""
        return self._aggregations < _PLAN_FIRST or (self._aggregations + 1) % _PLAN_EVERY == 0

    def _step_at_once(self, step: int, last: bool) -> None:
        """With overlap stale: this side's step, before the devices' norms are known: clipped by their last ones."""
        if self.config.link.stale and last:
            self.trainer.step(step, self._norms)
            self._stepped_ahead = True

    def _apply(self, step: int, frames: Mapping[str, Frame]) -> None:
        norms = {name: (frame.values["norm_squared"], int(frame.values["tokens"])) for name, frame in frames.items()}
        if not self.config.link.stale:
            self.trainer.step(step, norms)
        self._stepped_ahead = False
        self._norms = norms
        self.step = step + 1
        self._steps_timed += 1
        tokens = sum(tokens for _, tokens in norms.values())
        loss = sum(frame.values["nll"] for frame in frames.values()) / max(tokens, 1)
        self._losses.append(loss)
        self.tell("step", "", {"step": self.step, "loss": loss, "tokens": tokens, "devices": sorted(frames)})

    def _aggregate(self, step: int, frames: Mapping[str, Frame]) -> None:
        """The devices' adapters, averaged by their numbers of training sequences, on disk before anyone has it."""
        shares = {device: Share(tensor_of(frame), self._members[device].samples) for device, frame in frames.items()}
        average, answers = self._adapters.merge(step, shares, self._point)
        for device, frame in frames.items():
            self._members[device].measured = frame.measured or self._members[device].measured
        measured = {device: self._members[device].measured for device in frames}
        answers |= self._adapters.move(step, measured, self._steps_timed)
        self._point = self._snapshot(average)
        if self.config.checkpoints_after(self.step) and self._checkpoints:
            self._checkpoints.save(self._point)
            self.tell("checkpoint", "", {"step": self.step})
        plans: dict[str, Plan] = {}
        changed = any(LinkProfile.from_proto(one.measured).differs(one.link) for one in self._members.values())
        if (self._plan_due or changed) and self.step < self.config.steps:
            plans = self._plan({device: self._members[device] for device in frames})
        self._aggregations += 1
        for device in frames:
            self._members[device].answer(replace(answers[device], plan=plans.get(device)))
        self._admit()

    def _snapshot(self, average: Tensor | None) -> Checkpoint:
        stepper = self.trainer.stepper
        server = {name: value.detach().to("cpu", copy=True) for name, value in stepper.parameters.items()}
        digest = self._adapters.digest
        point = Checkpoint(self.step, server, stepper.state(), average, list(self._losses), digest)
        return self._adapters.into(point)

    def _go_back_to(self, point: Checkpoint) -> None:
        """Raises WrongState for a checkpoint of another model or of other options."""
        if point.stage_digest != self._adapters.digest:
            raise WrongState("the model's files have changed since the checkpoint was written: put the old ones back")
        self._adapters.restore(point)
        self.step, self._losses = point.step, list(point.losses)

    def _evaluated(self, device: str, frame: Frame) -> Frame:
        outputs = self.trainer.evaluate(tensor_of(frame), device)
        if frame.labels is None:
            return Frame(Phase.EVALUATE, frame.step, tensor=where_wanted(outputs.float(), frame.wanted))
        loss, tokens = nll(outputs, frame.labels.to(outputs.device))
        return Frame(Phase.EVALUATE, frame.step, values={"nll": float(loss), "tokens": float(tokens)})

    def _report(self, device: str, member: Member, frame: Frame) -> None:
        if "evaluation_tokens" not in frame.values:
            self._resources[device] = dict(frame.values)
            return
        member.order.check_evaluation(frame)
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
        self._norms.pop(device, None)
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
        if self.step != self._point.step or self._stepped_ahead:
            self._stepped_ahead = False
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


def where_wanted(outputs: Tensor, wanted: Tensor | None) -> Tensor:
    """Last hidden states, with zeros where the device has no use for them: codecs drop such rows. None: all are."""
    return outputs if wanted is None else outputs * wanted.to(outputs.device).unsqueeze(-1)
