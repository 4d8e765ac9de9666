"""Hosts the backbone for several devices, each with steps of its own: passes, their frames, and who is done.

One thread owns the members; a pass (a micro-batch of a device on its way through the blocks) has a thread of its own,
which waits where the device is asked. Nothing that a step changes is here, so a device that goes away in the middle
of an exchange takes nothing with it: it does the step anew. Only with `aggregate` do devices wait for one another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.aggregation.averaging import Averager
from isthmus.split.dlora.backbone import Active, Backbone
from isthmus.split.dlora.passes import Passing
from isthmus.split.errors import BadFrame, BadRequest, IsthmusError, LinkLost, WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import MERGE
from isthmus.split.job.shapes import AVERAGE
from isthmus.split.link.frames import ENDS, EVALUATIONS_AHEAD, Frame, Phase
from isthmus.split.link.order import Order
from isthmus.split.link.stage import Deliver
from isthmus.split.lora.lora import shapes_of
from isthmus.split.lora.sites import Layout, adapter_of
from isthmus.split.plan.choose import Planner, View
from isthmus.split.training.checkpoint import Checkpoint, CheckpointFolder
from isthmus.split.training.device import tensor_of
from isthmus.split.training.host import PATIENCE, Tell
from isthmus.split.training.inbox import Inbox
from isthmus.split.training.members import problem_with_open
from isthmus.split.training.perplexity import perplexity


@dataclass
class _Member:
    """A device that has joined. order: what its next frames have to be, but for those of a pass."""

    deliver: Deliver
    order: Order
    samples: int
    families: frozenset[str]
    measured: stage_pb2.Measured
    admitted: bool = False
    passes: dict[tuple[bool, int], Passing] = field(default_factory=dict)  # evaluating, number
    merged: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    trained: frozenset[int] = frozenset()  # in the step under way
    aggregate: Frame | None = None  # that has come, and waits for the others
    heard: float = field(default_factory=time.monotonic)  # of it, last

    @property
    def step(self) -> int:
        """That STEP has not come for."""
        return self.order.step

    @property
    def between_steps(self) -> bool:
        return self.order.between_steps and all(evaluating for evaluating, _ in self.passes)

    def answer(self, frame: Frame) -> None:
        self.order.answered(frame)
        self.deliver(frame)


class BackboneHost:
    """tell(kind, device, data) is called in the host's thread, with kind one of: joined, left, started, step, modules,
    evaluation, aggregation, checkpoint, log, finished, failed."""

    def __init__(
        self,
        backbone: Backbone,
        config: TrainingConfig,
        layouts: Mapping[str, Layout],
        *,
        initial_adapter: Mapping[str, Tensor],
        stage_digest: str | Mapping[str, str] = "",
        checkpoints: CheckpointFolder | None = None,
        resume: Checkpoint | None = None,
        patience: float = PATIENCE,
        tell: Tell = lambda kind, device, data: None,
    ) -> None:
        """layouts: of the job's devices, by name. initial_adapter: what an average begins with, where one is asked for.
        stage_digest: of what devices hold; by device where they differ."""
        devices = set(layouts)
        self.backbone, self.config, self.tell = backbone, config, tell
        self.ledger = backbone.ledger
        self._layouts = dict(layouts)
        self._awaited = set(devices)
        self._adapters = {device: shapes_of(adapter_of(layout)) for device, layout in layouts.items()}
        self._stage_digest, self._checkpoints, self._patience = stage_digest, checkpoints, patience
        self._planner = Planner(config, backbone.hidden_size)
        self._averager = Averager(config, initial_adapter) if config.dlora.aggregate else None
        self._point = resume or self._average_of(0, None)  # the last aggregation
        if resume and resume.stage_digest != self._point_digest:
            raise WrongState("the model's files have changed since the checkpoint was written: put the old ones back")
        self._members: dict[str, _Member] = {}
        self._steps = dict.fromkeys(devices, 0)  # that each device has told of
        self._trained = {name: frozenset(range(len(one.modules))) for name, one in layouts.items()}  # as was told last
        self._done: set[str] = set()
        self._evaluations: dict[int, dict[str, tuple[float, int]]] = {}
        self._evaluated: set[int] = set()  # steps of those that were told
        self._resources: dict[str, dict[str, float]] = {}
        self._started = self._finished = False
        self._inbox = Inbox("backbone-host", look=self._drop_silent, fail=self._fail)
        self._inbox.start()

    # ---- called from any thread ----

    def join(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """A device's OPEN. A device that joins again replaces itself."""
        return self._post(device, deliver, lambda: self._join(device, frame, deliver))

    def submit(self, device: str, frame: Frame, deliver: Deliver) -> Future[None]:
        """The next frame of a device's stream. One that is not due is refused with BadFrame, to that device alone."""
        return self._post(device, deliver, lambda: self._submit(device, frame, deliver))

    def leave(self, device: str, deliver: Deliver) -> None:
        """A device's stream has ended. Nothing happens if the device has joined again by another one since."""
        self._inbox.put(lambda: self._leave(device, deliver))

    def start_without(self, missing: set[str]) -> None:
        """Stops waiting for devices that have not come, or do not come back. They may still come."""
        self._inbox.put(lambda: self._start_without(missing))

    def adapter_shapes(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        return self._adapters.get(device)

    def layout_for(self, device: str) -> Layout | None:
        return self._layouts.get(device)

    def close(self) -> None:
        """Ends the thread once what was submitted is done, and all passes."""
        self._inbox.close()
        for member in self._members.values():
            _end_passes(member)

    @property
    def resources(self) -> dict[str, dict[str, float]]:
        """Each device's report, after `finished`."""
        return self._resources

    @property
    def average(self) -> Tensor | None:
        """The devices' averaged adapter, flat; None where none was asked for."""
        return self._point.device_adapter

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
        if self._finished or (opened.last_step == self.config.steps and device in self._done):
            deliver(Frame(Phase.CLOSE, self.config.steps))
            return
        earlier = self._members.get(device)
        if earlier is not None:
            earlier.deliver(WrongState(f"{device} has opened this job again from another run"))
            self._leave(device, earlier.deliver)
        measured = frame.measured or stage_pb2.Measured()
        order = Order(self.config, device)
        order.admit(int(opened.last_step))
        self._members[device] = _Member(deliver, order, opened.samples, frozenset(opened.codecs), measured)
        self.tell("joined", device, {"samples": opened.samples, "last_step": opened.last_step})
        self._admit()

    def _problem_with(self, device: str, opened: stage_pb2.Open | None) -> str:
        problem = problem_with_open(device, opened, self._layouts, self.config)
        if problem or opened is None:
            return problem
        if opened.adapter_values != self._values_of(device):
            return f"an adapter of {opened.adapter_values} values; this device has {self._values_of(device)}"
        digest = self._stage_digest if isinstance(self._stage_digest, str) else self._stage_digest[device]
        if digest and opened.stage_digest != digest:
            return "the device's model files differ from the coordinator's: their digests are not the same"
        if opened.last_step > self.config.steps:
            return f"a device after step {opened.last_step} of {self.config.steps}"
        return ""

    def _admit(self) -> None:
        """Lets devices in: each at once, or, where adapters are averaged, all together at the start."""
        if not self._started:
            if self.config.dlora.aggregate and not self._awaited <= self._members.keys():
                return
            self._started = True
            self.tell("started", "", {"step": self._point.step})
        for device, member in sorted(self._members.items()):
            if not member.admitted:
                self._open(device, member)

    def _open(self, device: str, member: _Member) -> None:
        view = View.of(member.families, member.measured, member.order.plan)
        plans, sentences = self._planner.plans({device: view}, {})
        for sentence in sentences:
            self.tell("log", "", {"message": sentence})
        tensor = None
        if self.config.dlora.aggregate:
            member.order.admit(self._point.step)
            tensor = self._point.device_adapter
        elif member.step - self._steps[device] == 1:
            member.order.repeat_step(member.step - 1)
        member.admitted = True
        agreement = stage_pb2.Agreement(
            start_step=member.step,
            batch_size=self.config.batch_size,
            sequence_length=self.config.text.sequence_length,
            hidden_size=self.backbone.hidden_size,
            adapter_values=self._values_of(device),
        )
        member.answer(Frame(Phase.OPEN, agreement=agreement, tensor=tensor, plan=plans[device]))

    def _start_without(self, missing: set[str]) -> None:
        self._awaited -= missing - self._members.keys()
        if self._members:
            self._admit()
        self._tell_evaluations()
        self._finish_if_done()

    def _submit(self, device: str, frame: Frame, deliver: Deliver) -> None:
        member = self._members.get(device)
        if member is None or member.deliver is not deliver:
            return  # what a stream that was replaced or refused had sent before it ended
        if not member.admitted:
            raise BadFrame(f"{Phase.Name(frame.phase)} before the session was agreed")
        member.heard = time.monotonic()
        if frame.site or frame.phase == Phase.BACKWARD:
            passing = member.passes.get((frame.phase == Phase.EVALUATE, frame.micro_batch))
            if passing is None:
                raise _not_due(device, frame)
            passing.offer(frame)
        elif frame.phase in (Phase.FORWARD, Phase.EVALUATE):
            self._begin(device, member, frame)
        elif frame.phase == Phase.MERGE:
            self._merge(device, member, frame)
        elif frame.phase == Phase.STEP:
            self._stepped(device, member, frame)
        elif frame.phase == Phase.AGGREGATE:
            self._aggregate(device, member, frame)
        elif frame.phase == Phase.REPORT:
            self._report(device, member, frame)
        elif frame.phase == Phase.CLOSE and member.step == self.config.steps:
            member.deliver(Frame(Phase.CLOSE, frame.step))
            self._done.add(device)
            self._leave(device, deliver)
        else:
            raise _not_due(device, frame)

    def _begin(self, device: str, member: _Member, frame: Frame) -> None:
        """Starts a pass."""
        evaluating = frame.phase == Phase.EVALUATE
        under_way = (evaluating, frame.micro_batch) in member.passes or len(member.passes) > EVALUATIONS_AHEAD
        if evaluating and not (member.between_steps and not under_way):
            raise _not_due(device, frame)
        if not evaluating and any(of_evaluation for of_evaluation, _ in member.passes):
            raise _not_due(device, frame)
        if evaluating:
            member.order.check_evaluation(frame)
        else:
            member.order.take(frame)
        active = self._active(device, member, frame)

        def ended(error: IsthmusError | None) -> None:  # in the pass's thread
            self._inbox.put(lambda: self._ended(device, member, passing, error))

        passing = Passing(self.backbone, self._layouts[device], frame, active, member.deliver, ended)
        member.passes[evaluating, frame.micro_batch] = passing
        passing.start()

    def _active(self, device: str, member: _Member, frame: Frame) -> Active:
        """What a pass's frame says of the modules. Raises BadFrame for what cannot be."""
        layout = self._layouts[device]
        applied = layout.unpack(frame.applied)
        if not applied <= layout.remote:
            raise BadFrame("modules of the device's own blocks are not asked for")
        if frame.phase == Phase.EVALUATE:
            return Active(frozenset(), applied, dict(member.merged))
        trained = layout.unpack(frame.trained)
        if not trained & layout.remote <= applied:
            raise BadFrame("modules that train and are not asked for")
        if not frame.micro_batch:
            member.trained = trained
        if trained != member.trained:
            raise BadFrame("micro-batches of one step that train different modules")
        self._tell_modules(device, frame.step, trained)
        for number in trained & member.merged.keys():
            del member.merged[number]
        if applied & member.merged.keys():
            raise BadFrame("modules that are merged and to be asked for")
        return Active(trained, applied, dict(member.merged))

    def _tell_modules(self, device: str, step: int, trained: frozenset[int]) -> None:
        layout = self._layouts[device]
        before, self._trained[device] = self._trained[device], trained
        killed, revived = before - trained, trained - before
        if killed or revived:
            of = f"{len(trained)} of {len(layout.modules)} active"
            message = f"{len(killed)} modules killed, {len(revived)} revived; {of}"
            names = {"killed": layout.names(killed), "revived": layout.names(revived)}
            self.tell("modules", device, {"step": step, "message": message, **names, "active": layout.names(trained)})

    def _merge(self, device: str, member: _Member, frame: Frame) -> None:
        if not member.between_steps or frame.step != member.step or self.config.dlora.killed != MERGE:
            raise _not_due(device, frame)
        layout = self._layouts[device]
        numbers = layout.unpack(frame.trained)
        if not numbers or not numbers <= layout.remote:
            raise BadFrame("MERGE of no module, or of one in the device's own blocks")
        values = tensor_of(frame)
        for number in sorted(numbers):
            parts = []
            for shape in layout.shapes(number).values():
                size = shape[0] * shape[1]
                parts.append(values[:size].reshape(shape))
                values = values[size:]
            member.merged[number] = parts[0], parts[1]

    def _ended(self, device: str, member: _Member, passing: Passing, error: IsthmusError | None) -> None:
        key = passing.evaluating, passing.number
        if member.passes.get(key) is not passing:
            return
        del member.passes[key]
        if error is not None:
            member.deliver(error)
            self._leave(device, member.deliver)
            return
        if not passing.evaluating:
            member.order.passed()
        member.deliver(passing.result)

    def _stepped(self, device: str, member: _Member, frame: Frame) -> None:
        if frame.values.get(ENDS) and frame.step == member.step < self.config.steps and member.between_steps:
            line = f"{device}: after step {member.step} no module is left that trains: its training has ended"
            if self._steps[device] < self.config.steps:  # else it is told again, over another link
                self._tell_modules(device, member.step, frozenset())
                self.tell("log", device, {"message": line})
            member.order.end()
            self._steps[device] = self.config.steps
            return
        member.order.take(frame)
        self._steps[device] = member.step
        values = frame.values
        told = {
            "step": min(self._steps.values()),
            "device_step": member.step,
            "loss": values["nll"] / max(values["tokens"], 1),
            "tokens": int(values["tokens"]),
            "devices": [device],
        }
        self.tell("step", device, told)

    def _aggregate(self, device: str, member: _Member, frame: Frame) -> None:
        member.order.take(frame)
        member.aggregate = frame
        self._average_if_complete()

    def _average_if_complete(self) -> None:
        members = {device: member for device, member in self._members.items() if member.admitted}
        if not members or self._averager is None or any(member.aggregate is None for member in members.values()):
            return
        frames = {device: member.aggregate for device, member in members.items() if member.aggregate is not None}
        total = sum(member.samples for member in members.values())
        shares = [(tensor_of(frame), members[device].samples / total) for device, frame in frames.items()]
        error = self._averager.error(shares, self._point.device_adapter)
        average, encoded = self._averager.average(shares, self._point.device_adapter)
        done = max(member.step for member in members.values())
        self.tell("aggregation", "", {"step": done, "method": AVERAGE, "aggregation_error": error})
        self._point = self._average_of(done, average)
        if self.config.checkpoints_after(done) and self._checkpoints:
            self._checkpoints.save(self._point)  # before anyone has it
            self.tell("checkpoint", "", {"step": done})
        for device, frame in frames.items():
            members[device].aggregate = None
            members[device].answer(Frame(Phase.AGGREGATE, frame.step, encoded=encoded))

    def _average_of(self, step: int, average: Tensor | None) -> Checkpoint:
        return Checkpoint(step, {}, {}, average, [], self._point_digest)

    @property
    def _point_digest(self) -> str:
        """Averages are of devices that are alike."""
        return self._stage_digest if isinstance(self._stage_digest, str) else ""

    def _values_of(self, device: str) -> int:
        return sum(math.prod(shape) for shape in self._adapters[device])

    def _report(self, device: str, member: _Member, frame: Frame) -> None:
        if "evaluation_tokens" not in frame.values:
            self._resources[device] = dict(frame.values)
            return
        if member.passes:
            raise _not_due(device, frame)
        member.order.check_evaluation(frame)
        sums = self._evaluations.setdefault(frame.step, {})
        sums[device] = (frame.values.get("evaluation_nll", 0.0), int(frame.values["evaluation_tokens"]))
        self._tell_evaluations()

    def _tell_evaluations(self) -> None:
        """Adds up those that no awaited device lacks."""
        for step, sums in sorted(self._evaluations.items()):
            total, tokens = sum(loss for loss, _ in sums.values()), sum(count for _, count in sums.values())
            if step in self._evaluated or not self._awaited <= sums.keys() or not tokens:
                continue
            self._evaluated.add(step)
            each = {name: perplexity(loss, count) for name, (loss, count) in sums.items() if count}
            data = {"step": step, "perplexity": perplexity(total, tokens), "tokens": tokens, "devices": each}
            self.tell("evaluation", "", data)

    def _leave(self, device: str, deliver: Deliver) -> None:
        member = self._members.get(device)
        if member is None or member.deliver is not deliver:
            return
        del self._members[device]
        _end_passes(member)
        self.tell("left", device, {"step": member.step, "done": device in self._done})
        self._average_if_complete()
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if not self._finished and self._done and not self._members and self._awaited <= self._done:
            self._finished = True
            self.tell("finished", "", {"step": self.config.steps})

    def _drop_silent(self) -> None:
        """Goes on without a device that owes a frame for too long: a pass, or another device, waits for it."""
        others_wait = any(member.aggregate is not None for member in self._members.values())
        for device, member in list(self._members.items()):
            late = time.monotonic() - member.heard > self._patience and member.aggregate is None and others_wait
            if late or any(passing.waits_for > self._patience for passing in member.passes.values()):
                member.deliver(LinkLost(f"{device} owed a frame for {self._patience:.0f} s"))
                self._leave(device, member.deliver)

    def _fail(self, error: IsthmusError) -> None:
        for member in self._members.values():
            member.deliver(error)
            _end_passes(member)
        self._members.clear()
        self.tell("failed", "", {"message": str(error)})


def _end_passes(member: _Member) -> None:
    for passing in member.passes.values():
        passing.end()
    member.passes.clear()


def _not_due(device: str, frame: Frame) -> BadFrame:
    site = f", site {frame.site}" if frame.site else ""
    place = f"step {frame.step}, micro-batch {frame.micro_batch}{site}"
    return BadFrame(f"{Phase.Name(frame.phase)} of {place} is not due from {device}")
