"""A device's side of DLoRA: all that is trained, the text, the labels and the loss.

The device has the embedding, `cut_layer` blocks, the norm and the head, as in the U-shaped split, and the LoRA
modules of the whole model. In a pass the server asks for what the modules in its blocks add to their bases' outputs,
and, backward, for the gradients by their inputs. The device's steps are its own: no other device waits for them,
unless adapters are averaged.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import FAMILIES
from isthmus.split.data.sequences import IGNORE, Sequences, batch_indices, micro_batch_slices, seen_positions
from isthmus.split.dlora.killing import Killing
from isthmus.split.dlora.modules import ActiveSet, RemoteModules, asked_site
from isthmus.split.errors import BadTensor
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape
from isthmus.split.link.coding import Terms
from isthmus.split.link.device import Link
from isthmus.split.link.frames import ENDS, EVALUATIONS_AHEAD, INPUT_GRADIENT, Frame, Phase
from isthmus.split.lora.lora import flatten, load_flat, lora_parameters, shapes_of
from isthmus.split.lora.sites import layout_of
from isthmus.split.models.precision import autocast
from isthmus.split.models.stage import Stage
from isthmus.split.plan.choose import FRONT, FRONT_BACKWARD, TAIL
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.checkpoint import DeviceRecord, DeviceState
from isthmus.split.training.device import (
    Cancelled,
    Progress,
    numbers_of,
    of_use,
    tensor_like,
)
from isthmus.split.training.loss import nll_where_wanted
from isthmus.split.training.optim import Stepper

log = logging.getLogger(__name__)

MODULES, MODULES_BACKWARD = "modules", "modules backward"  # of its work in the ledger, beside the planner's names


@dataclass
class _Part:
    """A micro-batch, or a held-out batch, under way. smashed: hidden states at the cut. rows: of use, that cross."""

    labels: Tensor
    smashed: Tensor
    rows: int
    predicted: int  # tokens
    applied: frozenset[int]


@dataclass
class _Batch:
    """A step under way."""

    step: int
    input_ids: Tensor
    labels: Tensor
    tokens: int  # predicted ones
    slices: list[slice]
    depth: int
    begun: int = 0
    done: int = 0
    loss: float = 0.0  # summed
    parts: dict[int, _Part] = field(default_factory=dict)


class DloraTrainer:
    """stages: (front, tail). model: the whole model's configuration. record: this device's own, on its disk."""

    def __init__(
        self,
        stages: Sequence[Stage],
        model: PreTrainedConfig,
        config: TrainingConfig,
        train: Sequences,
        validation: Sequences | None,
        ledger: Ledger,
        *,
        dtype: torch.dtype = torch.float32,
        record: DeviceRecord | None = None,
        stage_digest: str = "",
        shape: Shape | None = None,
    ) -> None:
        """shape: of this device; None: the job's."""
        self.front, self.tail = stages
        self.config, self.ledger = config, ledger
        self.train, self.validation = train, validation
        shape = shape or Shape(config.devices.cut_layer, config.lora.rank)
        self.layout = layout_of(model, config).cut_at(shape.cut, shape.rank)
        self._device = next(self.front.parameters()).device
        self.remote = RemoteModules(self.layout, config.seed, self._device)
        self.parameters = dict(sorted({**lora_parameters(stages), **self.remote.parameters}.items()))
        self.active = ActiveSet(self.layout, self.parameters, self.front, config.dlora.killed)
        self.killing = Killing(self.layout, self.parameters, config, ledger.traffic)
        self.stepper = Stepper(self.parameters, config)
        self.step = 0  # steps done
        self._chosen_for = -1  # the step that it was last decided for what trains
        self._told: dict[str, float] = {}  # by the last STEP, which a broken link may have lost
        self._dtype, self._record, self._stage_digest = dtype, record, stage_digest
        self._initial = self._average = flatten(self.parameters)  # _average: what all devices had last
        self._points = {0: DeviceState(0, self._initial, {}, {})}  # at the last two aggregations
        kept = record.last() if record else None
        if kept is not None:
            self._take(kept)

    @property
    def terms(self) -> Terms:
        """Of a link for this trainer."""
        model = self.front.model.config
        shapes = shapes_of(self.parameters)
        return Terms(self.config, len(self.train), shapes, model.hidden_size, model.vocab_size, self.layout)

    def adapter(self) -> dict[str, Tensor]:
        """What was learnt, by names in the whole model. Dropped modules have a B of zeros."""
        dropped = set(self.active.dropped())
        return {
            name: torch.zeros_like(value) if name in dropped else value.detach().clone()
            for name, value in self.parameters.items()
        }

    def run(
        self,
        link: Link,
        *,
        cancelled: threading.Event,
        tell: Callable[[Progress], None] = lambda _: None,
        keep: Callable[[Mapping[str, Tensor]], None] = lambda _: None,
    ) -> None:
        """To the job's end, from where this trainer is. After LinkLost it may be called again: the step that was cut
        off is done anew, and counts once. keep: gets the adapter before the coordinator hears of the end."""
        if not self._open(link):
            return
        if self.config.evaluates_after(self.step):
            self._evaluate(link, self.step)
        while self.step < self.config.steps:
            if cancelled.is_set():
                raise Cancelled("the task was cancelled")
            if not self._choose():
                self._end_early(link)
                break
            loss = self._training_step(link, self.step)
            tell(Progress(self.step, self.config.steps, loss))
            if self.config.aggregates_after(self.step):
                self._aggregate(link)
            if self.config.evaluates_after(self.step):
                self._evaluate(link, self.step)
        keep(self.adapter())
        link.send(Frame(Phase.REPORT, step=self.config.steps, values=numbers_of(self.ledger.summary())))
        link.send(Frame(Phase.CLOSE, step=self.config.steps))
        link.receive()

    def _choose(self) -> bool:
        """Decides what trains in the step that comes, once for each step; whether anything does."""
        if self._chosen_for != self.step:
            self._chosen_for, trained = self.step, self.killing.decide(self.step)
            if trained != self.active.trained:
                self.active.train(trained)
        return bool(self.active.trained)

    def _open(self, link: Link) -> bool:
        """Whether there is something to do."""
        opened = stage_pb2.Open(
            codecs=sorted(FAMILIES),
            samples=len(self.train.input_ids),
            stage_digest=self._stage_digest,
            last_step=self.step,
            adapter_values=sum(value.numel() for value in self.parameters.values()),
        )
        link.send(Frame(Phase.OPEN, open=opened, measured=link.measure().to_proto()))
        answer = link.receive()
        if answer.phase == Phase.CLOSE:
            return False
        start = answer.agreement.start_step if answer.phase == Phase.OPEN and answer.agreement else -1
        if self.config.dlora.aggregate and start >= 0:
            self._go_to(start, answer.tensor)
        elif start == self.step - 1 and self._told:
            link.send(Frame(Phase.STEP, start, values=self._told))
        elif start != self.step:
            raise BadTensor("the coordinator's answer to OPEN does not fit this device")
        self.remote.drop()
        self.stepper.drop_gradients()
        self.active.began()
        return True

    def _training_step(self, link: Link, step: int) -> float:
        """Returns the mean loss."""
        self._merge(link, step)
        rows = batch_indices(len(self.train.input_ids), self.config.batch_size, step, self.config.seed)
        labels = self.train.labels[rows].to(self._device)
        plan = link.coder.plan
        batch = _Batch(
            step,
            self.train.input_ids[rows].to(self._device),
            labels,
            int((labels[:, 1:] != IGNORE).sum()),
            micro_batch_slices(len(rows), plan.micro_batches),
            plan.depth,
        )
        while batch.done < len(batch.slices):
            self._send_forwards(link, batch)
            self._answer(link, batch, link.receive())
        loss = batch.loss / max(batch.tokens, 1)
        norm_squared = self.stepper.gradient_norm_squared()
        self.killing.observe(step, loss, self.active.trained)
        self.stepper.step(step, norm_squared)
        self.step += 1
        self._told = {"norm_squared": norm_squared, "tokens": float(batch.tokens), "nll": batch.loss}
        self._rest(self.step)  # before anyone hears of the step
        link.send(Frame(Phase.STEP, step, values=self._told))
        return loss

    def _end_early(self, link: Link) -> None:
        """No module is left that trains: the job is over for this device. Over another link that is told again."""
        log.warning("after step %d no module is left that trains: training ends here", self.step)
        last = self.config.steps
        self._rest(last)
        link.send(Frame(Phase.STEP, self.step, values={"norm_squared": 0.0, "tokens": 0.0, "nll": 0.0, ENDS: 1.0}))
        if self.config.evaluates_after(last):
            self._evaluate(link, last)

    def _merge(self, link: Link, step: int) -> None:
        """Gives the server what it is to apply itself from here on."""
        for number, values in self.active.to_merge():
            link.send(Frame(Phase.MERGE, step, tensor=values, trained=self.layout.pack(frozenset({number}))))

    def _send_forwards(self, link: Link, batch: _Batch) -> None:
        """As many micro-batches as may be under way."""
        while batch.begun < len(batch.slices) and batch.begun - batch.done < batch.depth:
            which = batch.slices[batch.begun]
            input_ids, labels = batch.input_ids[which], batch.labels[which]
            with self.ledger.computing((FRONT, input_ids.shape)), autocast(self._dtype, self._device):
                smashed = self.front(input_ids)
            part, frame = self._begun(Phase.FORWARD, batch.step, batch.begun, smashed, labels)
            batch.parts[batch.begun] = part
            batch.begun += 1
            link.send(frame)

    def _begun(
        self, phase: stage_pb2.Phase, step: int, number: int, smashed: Tensor, labels: Tensor
    ) -> tuple[_Part, Frame]:
        hidden_states, wanted = of_use(smashed.detach().float(), labels)
        applied = self.active.applied
        rows = labels.numel() if wanted is None else int(seen_positions(wanted).sum())
        trained = self.layout.pack(self.active.trained) if phase == Phase.FORWARD else b""
        frame = Frame(
            phase, step, number, hidden_states, wanted=wanted, trained=trained, applied=self.layout.pack(applied)
        )
        return _Part(labels, smashed, rows, int((labels[:, 1:] != IGNORE).sum()), applied), frame

    def _answer(self, link: Link, batch: _Batch, asked: Frame) -> None:
        """Whatever the server sends in a step."""
        number = asked.micro_batch
        part = batch.parts.get(number)
        if asked.step != batch.step or part is None or asked.phase not in (Phase.FORWARD, Phase.BACKWARD):
            raise BadTensor(f"the coordinator sent {Phase.Name(asked.phase)} of step {asked.step}, which is not due")
        if asked.site and asked.phase == Phase.FORWARD:
            self._outputs(link, asked, part, keep_as=number)
        elif asked.site:
            self._site_backward(link, asked, part)
        elif asked.phase == Phase.FORWARD:
            self._loss(link, batch, part, asked)
        else:
            self._front_backward(part, asked)
            del batch.parts[number]
            batch.done += 1

    def _outputs(self, link: Link, asked: Frame, part: _Part, *, keep_as: int | None = None) -> None:
        site, inputs = asked_site(self.layout, asked, part.rows)
        work = (MODULES, site.number, inputs.shape, part.applied, keep_as is None)
        dtype = torch.float32 if keep_as is None else self._dtype
        with self.ledger.computing(work), autocast(dtype, self._device):
            outputs = self.remote.outputs(site, part.applied, inputs, keep_as=keep_as)
        link.send(Frame(asked.phase, asked.step, asked.micro_batch, outputs.float(), site=site.number))

    def _site_backward(self, link: Link, asked: Frame, part: _Part) -> None:
        width = self.layout.site(asked.site).outputs(part.applied)
        site, gradients = asked_site(self.layout, asked, part.rows, width)
        wanted = bool(asked.values.get(INPUT_GRADIENT))
        work = (MODULES_BACKWARD, site.number, gradients.shape, part.applied, self.active.trained, wanted)
        with self.ledger.computing(work):
            gradient = self.remote.backward(site, asked.micro_batch, gradients, wanted=wanted)
        if gradient is not None:
            link.send(Frame(Phase.BACKWARD, asked.step, asked.micro_batch, gradient.float(), site=site.number))

    def _loss(self, link: Link, batch: _Batch, part: _Part, answer: Frame) -> None:
        """The last hidden states of a micro-batch have come."""
        last = tensor_like(answer, part.smashed.shape).to(self._device).requires_grad_()
        with self.ledger.computing((TAIL, last.shape, part.predicted)):
            with autocast(self._dtype, self._device):
                total, _ = nll_where_wanted(self.tail, last, part.labels)
            (total / max(batch.tokens, 1)).backward()
        assert last.grad is not None
        batch.loss += float(total.detach())
        values = {"tokens": float(batch.tokens)}
        link.send(Frame(Phase.BACKWARD, batch.step, answer.micro_batch, last.grad, values=values))

    def _front_backward(self, part: _Part, answer: Frame) -> None:
        """The gradient at the cut has come, where something in front of it trains."""
        if not part.smashed.requires_grad:
            return
        gradient = tensor_like(answer, part.smashed.shape).to(self._device, part.smashed.dtype)
        with self.ledger.computing((FRONT_BACKWARD, gradient.shape, self.active.trained & self.layout.front)):
            part.smashed.backward(gradient)

    @torch.no_grad()
    def _evaluate(self, link: Link, done: int) -> None:
        """Sums the loss of the held-out sequences over the split, and reports it."""
        if self.validation is None:
            return
        self._merge(link, done)
        size = self.config.batch_size
        pairs = zip(self.validation.input_ids.split(size), self.validation.labels.split(size), strict=True)
        free, under_way = deque(range(EVALUATIONS_AHEAD + 1)), dict[int, _Part]()
        total, count, waiting = 0.0, 0, next(pairs, None)
        while waiting is not None or under_way:
            if waiting is not None and free:
                input_ids, labels = (tensor.to(self._device) for tensor in waiting)
                with self.ledger.computing(("evaluate front", input_ids.shape)):
                    smashed = self.front(input_ids).float()
                number = free.popleft()
                under_way[number], frame = self._begun(Phase.EVALUATE, done, number, smashed, labels)
                link.send(frame)
                waiting = next(pairs, None)
                continue
            asked = link.receive()
            part = under_way.get(asked.micro_batch)
            if part is None:
                raise BadTensor(f"the coordinator sent EVALUATE of batch {asked.micro_batch}, which is not due")
            if asked.site:
                self._outputs(link, asked, part)
                continue
            last = tensor_like(asked, part.smashed.shape).to(self._device)
            with self.ledger.computing(("evaluate tail", last.shape, part.predicted)):
                loss, tokens = nll_where_wanted(self.tail, last, part.labels)
            total, count = total + float(loss), count + tokens
            del under_way[asked.micro_batch]
            free.append(asked.micro_batch)
        link.send(Frame(Phase.REPORT, done, values={"evaluation_nll": total, "evaluation_tokens": float(count)}))

    def _aggregate(self, link: Link) -> None:
        mine = flatten(self.parameters)
        gain = mine - self._average if link.coder.adapters_differ("adapters_up") else mine
        link.send(Frame(Phase.AGGREGATE, self.step - 1, tensor=gain))
        average = tensor_like(link.receive(), mine.shape)
        self._average = self._average + average if link.coder.adapters_differ("adapters_down") else average
        load_flat(self.parameters, self._average)

    def _rest(self, done: int) -> None:
        """Keeps what a later session may have to go on from: at aggregations here, at checkpoints on the disk.

        done: steps; all of the job's where it ends early.
        """
        aggregates, keeps = self.config.aggregates_after(done), self.config.checkpoints_after(done)
        if not aggregates and not (keeps and self._record):
            return
        state = DeviceState(
            self.step,
            flatten(self.parameters),
            self.stepper.state(),
            self.killing.state(),
            self.layout.names(self.active.trained),
            self._told,
        )
        if aggregates:
            self._points = {max(self._points): self._points[max(self._points)], self.step: state}
        if keeps and self._record:
            self._record.save(state)

    def _go_to(self, step: int, average: Tensor | None) -> None:
        """To the last aggregation, whose average the coordinator has sent (None: to the start)."""
        self._average = self._initial if average is None else average
        kept = self._points.get(step) or (self._record.at(step) if self._record else None)
        if kept is None:
            log.warning("no optimiser state of step %d on this device: its moments start anew", step)
        self._take(DeviceState(step, self._average, kept.optimizer if kept else {}, kept.controller if kept else {}))

    def _take(self, state: DeviceState) -> None:
        load_flat(self.parameters, state.adapter)
        self.stepper = Stepper(self.parameters, self.config)
        self.stepper.load_state(state.optimizer)
        self.killing.load_state(state.controller)
        if state.trained is not None:
            self.active.train(frozenset(self.layout.by_name[name].number for name in state.trained))
        self.step, self._told = state.step, dict(state.told)
