"""A device's side of DLoRA: all that is trained, the text, the labels and the loss.

The device has the embedding, `cut_layer` blocks, the norm and the head, as in the U-shaped split, and the LoRA modules
of the whole model. In a pass the server asks for what the modules in its blocks add to their bases' outputs and,
backward, for the gradients by their inputs. Each device has steps of its own: no other device waits for them, unless
adapters are averaged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from isthmus.protos.v1 import stage_pb2
from isthmus.split.data.sequences import IGNORE, Sequences, seen_positions
from isthmus.split.dlora.module_selector import ModuleSelector
from isthmus.split.dlora.modules import ActiveSet, RemoteModules, asked_site
from isthmus.split.errors import BadTensor
from isthmus.split.job.shapes import Shape
from isthmus.split.link.coding import Terms
from isthmus.split.link.device import Link
from isthmus.split.link.frames import EVALUATIONS_AHEAD, INPUT_GRADIENT, Frame, Phase
from isthmus.split.lora.lora import lora_parameters
from isthmus.split.lora.sites import layout_of
from isthmus.split.models.precision import autocast
from isthmus.split.models.stage import Stage
from isthmus.split.plan.choose import FRONT, FRONT_BACKWARD, TAIL
from isthmus.split.training.device_steps import Batch, DeviceContext, DeviceSteps, Gradients
from isthmus.split.training.frames import of_use, tensor_like
from isthmus.split.training.loss import nll_where_wanted

MODULES, MODULES_BACKWARD = "modules", "modules backward"  # names of its work in the ledger, beside the planner's


@dataclass
class _Part:
    """A micro-batch, or a held-out batch, under way.

    labels: (rows, sequence).
    smashed: hidden states at the cut, (rows, sequence, hidden).
    rows: number of positions that cross.
    predicted: number of predicted tokens.
    applied: modules that the server asks for.
    """

    labels: Tensor
    smashed: Tensor
    rows: int
    predicted: int
    applied: frozenset[int]


@dataclass
class _OpenBatch:
    """A step under way.

    begun: number of micro-batches that have been sent.
    done: number of micro-batches that are through.
    loss: the loss summed so far, in nats.
    """

    batch: Batch
    begun: int = 0
    done: int = 0
    loss: float = 0.0
    parts: dict[int, _Part] = field(default_factory=dict)


class DloraDevice(DeviceSteps):
    """DLoRA's steps on a device.

    stages: (front, tail).
    model: the whole model's configuration.
    shape: this device's shape; None for the job's.
    """

    def __init__(
        self, context: DeviceContext, stages: Sequence[Stage], model: PreTrainedConfig, shape: Shape | None = None
    ) -> None:
        super().__init__(context)
        config = context.config
        self.front, self.tail = stages
        self.model = self.front.model.config
        shape = shape or Shape(config.devices.cut_layer, config.lora.rank)
        self.layout = layout_of(model, config).cut_at(shape.cut, shape.rank)
        self._device, self._dtype = next(self.front.parameters()).device, context.dtype
        self.remote = RemoteModules(self.layout, config.seed, self._device)
        self.parameters = dict(sorted({**lora_parameters(stages), **self.remote.parameters}.items()))
        self.active = ActiveSet(self.layout, self.parameters, self.front, config.dlora.killed)
        self.killing = ModuleSelector(self.layout, self.parameters, config, context.ledger.traffic)
        self._chosen_for = -1  # the step for which it was last decided what trains

    @property
    def terms(self) -> Terms:
        return replace(super().terms, layout=self.layout)

    def own_adapter(self) -> dict[str, Tensor]:
        """All LoRA values of this device; dropped modules have a B of zeros."""
        dropped = set(self.active.dropped())
        return {
            name: torch.zeros_like(value) if name in dropped else value.detach().clone()
            for name, value in self.parameters.items()
        }

    def begin(self) -> None:
        self.remote.drop()
        self.active.began()

    def state(self) -> dict[str, Any]:
        return {"controller": self.killing.state(), "trained": self.layout.names(self.active.trained)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.killing.load_state(state.get("controller", {}))
        if "trained" in state:
            self.active.train(frozenset(self.layout.by_name[name].number for name in state["trained"]))

    # ---- a step ----

    def train(self, link: Link, step: int) -> Gradients | None:
        if not self._choose(step):
            return None
        self._merge(link, step)
        under_way = _OpenBatch(Batch.of(self.context, step, link.coder.plan, self._device))
        while under_way.done < len(under_way.batch.slices):
            self._send_forwards(link, under_way)
            self._answer(link, under_way, link.receive())
        tokens = under_way.batch.tokens
        self.killing.observe(step, under_way.loss / max(tokens, 1), self.active.trained)
        return Gradients(under_way.loss, tokens)

    def _choose(self, step: int) -> bool:
        """Decides, once for each step, what trains in it. Returns whether anything does."""
        if self._chosen_for != step:
            self._chosen_for, trained = step, self.killing.decide(step)
            if trained != self.active.trained:
                self.active.train(trained)
        return bool(self.active.trained)

    def _merge(self, link: Link, step: int) -> None:
        """Sends the server the killed modules that it has to apply itself from here on."""
        for number, values in self.active.to_merge():
            link.send(Frame(Phase.MERGE, step, tensor=values, trained=self.layout.pack(frozenset({number}))))

    def _send_forwards(self, link: Link, under_way: _OpenBatch) -> None:
        """Sends as many micro-batches as may be under way."""
        batch = under_way.batch
        while under_way.begun < len(batch.slices) and under_way.begun - under_way.done < batch.depth:
            which = batch.slices[under_way.begun]
            input_ids, labels = batch.input_ids[which], batch.labels[which]
            with self.ledger.computing((FRONT, input_ids.shape)), autocast(self._dtype, self._device):
                smashed = self.front(input_ids)
            part, frame = self._begun(Phase.FORWARD, batch.step, under_way.begun, smashed, labels)
            under_way.parts[under_way.begun] = part
            under_way.begun += 1
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

    def _answer(self, link: Link, under_way: _OpenBatch, asked: Frame) -> None:
        """Answers whatever the server sends in a step. Raises BadTensor for what is not due."""
        number = asked.micro_batch
        part = under_way.parts.get(number)
        if asked.step != under_way.batch.step or part is None or asked.phase not in (Phase.FORWARD, Phase.BACKWARD):
            raise BadTensor(f"the coordinator sent {Phase.Name(asked.phase)} of step {asked.step}, which is not due")
        if asked.site and asked.phase == Phase.FORWARD:
            self._outputs(link, asked, part, keep_as=number)
        elif asked.site:
            self._site_backward(link, asked, part)
        elif asked.phase == Phase.FORWARD:
            self._loss(link, under_way, part, asked)
        else:
            self._front_backward(part, asked)
            del under_way.parts[number]
            under_way.done += 1

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

    def _loss(self, link: Link, under_way: _OpenBatch, part: _Part, answer: Frame) -> None:
        """Computes the loss of a micro-batch whose last hidden states have come, and sends the gradient by them."""
        batch = under_way.batch
        last = tensor_like(answer, part.smashed.shape).to(self._device).requires_grad_()
        with self.ledger.computing((TAIL, last.shape, part.predicted)):
            with autocast(self._dtype, self._device):
                total, _ = nll_where_wanted(self.tail, last, part.labels)
            (total / max(batch.tokens, 1)).backward()
        assert last.grad is not None
        under_way.loss += float(total.detach())
        values = {"tokens": float(batch.tokens)}
        link.send(Frame(Phase.BACKWARD, batch.step, answer.micro_batch, last.grad, values=values))

    def _front_backward(self, part: _Part, answer: Frame) -> None:
        """Runs the front backward, if anything there trains, for a micro-batch whose gradient at the cut has come."""
        if not part.smashed.requires_grad:
            return
        gradient = tensor_like(answer, part.smashed.shape).to(self._device, part.smashed.dtype)
        with self.ledger.computing((FRONT_BACKWARD, gradient.shape, self.active.trained & self.layout.front)):
            part.smashed.backward(gradient)

    # ---- evaluation ----

    def evaluate(self, link: Link, step: int, held_out: Sequences) -> tuple[float, int]:
        self._merge(link, step)
        size = self.config.batch_size
        pairs = zip(held_out.input_ids.split(size), held_out.labels.split(size), strict=True)
        free, under_way = deque(range(EVALUATIONS_AHEAD + 1)), dict[int, _Part]()
        total, count, waiting = 0.0, 0, next(pairs, None)
        while waiting is not None or under_way:
            if waiting is not None and free:
                input_ids, labels = (tensor.to(self._device) for tensor in waiting)
                with self.ledger.computing(("evaluate front", input_ids.shape)):
                    smashed = self.front(input_ids).float()
                number = free.popleft()
                under_way[number], frame = self._begun(Phase.EVALUATE, step, number, smashed, labels)
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
        return total, count
