"""The server's half of a split training step: the same micro-batch of all devices runs through its blocks as one.

Devices may have different cuts. The server has the blocks from the smallest cut on, as consecutive segments between the
cuts. A device's rows enter at its own cut, where they join those that came through the segments before. All is one
autograd graph, whose leaves are what the devices sent.

A segment that some devices hold themselves is a copy for the others. It trains on the mean over the tokens of those who
use it, as a device trains on the mean over its own, so that an aggregation weights it like the devices that it stands
for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.split.codecs.finite import DIVERGED, can_be_used, is_finite
from isthmus.split.errors import WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.frozen import FrozenPart
from isthmus.split.lora.lora import lora_parameters
from isthmus.split.models.precision import autocast
from isthmus.split.models.stage import Stage
from isthmus.split.resources.ledger import Ledger
from isthmus.split.training.loss import nll
from isthmus.split.training.optim import Stepper


@dataclass
class _Graph:
    """What a micro-batch under way holds until its backward pass.

    leaves: by cut, what entered there, (sum of rows, sequence, hidden).
    entered: by device, the cut of its leaf and its rows in that leaf.
    rows: by device, its rows in the outputs.
    """

    leaves: dict[int, Tensor]
    entered: dict[str, tuple[int, slice]]
    outputs: Tensor
    rows: dict[str, slice]

    def entries(self) -> tuple[tuple[int, int], ...]:
        """What makes two graphs with outputs of one shape differ in work: how many rows enter at which cut."""
        return tuple((cut, len(leaf)) for cut, leaf in sorted(self.leaves.items()))

    def batches_without(self, devices: Collection[str]) -> dict[str, Tensor]:
        """What the other devices sent, by device."""
        others = {device: place for device, place in self.entered.items() if device not in devices}
        return {device: self.leaves[cut].detach()[rows] for device, (cut, rows) in others.items()}


_Objective = Callable[[_Graph, Mapping[str, float]], tuple[Tensor, Tensor | None]]
"""Function from a graph and each device's share of the step's tokens to what is differentiated and its gradient."""


class ServerTrainer:
    """The coordinator's blocks and their LoRA.

    cuts: cuts of the devices that do not enter at the first segment.

    What a device sends can be finite and still make its rows overflow. Such a device is left out of what `forward`,
    `backward` and `forward_backward` return, and of the step's gradient from there on.
    """

    def __init__(
        self,
        stages: Stage | Sequence[Stage],
        config: TrainingConfig,
        ledger: Ledger,
        *,
        dtype: torch.dtype,
        cuts: Mapping[str, int] | None = None,
    ) -> None:
        self.config, self.ledger = config, ledger
        self._dtype = dtype
        self._graphs: dict[int, _Graph] = {}  # by micro-batch
        self._total = 0  # predicted tokens of the step, of all devices that take part in its first backward pass
        self._below: dict[int, int] = {}  # by segment's first block: the tokens of the devices that use it
        self.use(stages, cuts or {})
        self.stepper = Stepper(lora_parameters(self.stages), config)

    def use(self, stages: Stage | Sequence[Stage], cuts: Mapping[str, int]) -> None:
        """Uses these segments and these devices' cuts from now on. Not while a step is under way."""
        self.stages = [stages] if isinstance(stages, Stage) else list(stages)
        self.stage = self.stages[-1]
        self.cuts = dict(cuts)
        self._device = next(self.stage.parameters()).device
        self._names = {stage.spec.first: list(lora_parameters([stage])) for stage in self.stages}
        self.frozen = FrozenPart(self.stages, self.config)
        self._norms: dict[int, float] = {}  # by segment: squared norm of the gradient of the mean over those who use it

    def forward(self, batches: Mapping[str, Tensor], *, micro_batch: int = 0) -> dict[str, Tensor]:
        """Runs a micro-batch forward.

        batches: by device, hidden states at the cut (rows, sequence, hidden).

        Returns the last hidden states, by device and of the same shapes.
        """
        graph = self._graphs[micro_batch] = self._forward(batches)
        outputs = {device: graph.outputs[rows].detach() for device, rows in graph.rows.items()}
        return {device: values for device, values in outputs.items() if is_finite(values)}

    def backward(
        self, gradients: Mapping[str, tuple[Tensor, int]], *, micro_batch: int = 0, last: bool = True
    ) -> dict[str, Tensor]:
        """Runs a micro-batch backward, and returns each device's gradient by its hidden states at the cut.

        gradients: by device, the gradient of its own mean loss by its last hidden states, and the number of predicted
        tokens of its whole batch. A device that has gone since the forward pass is left out.
        last: whether it is the step's last micro-batch, after which `norm_squared` is that of the whole step.

        Raises WrongState where the gradient of all devices together is not finite.
        """

        def objective(graph: _Graph, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
            joint = torch.zeros_like(graph.outputs)
            for device in gradients.keys() & graph.rows.keys():
                joint[graph.rows[device]] = gradients[device][0].to(self._device) * weights[device]
            return graph.outputs, joint

        graph = self._graphs.pop(micro_batch)
        tokens = {device: count for device, (_, count) in gradients.items()}
        return self._backward(graph, objective, tokens, micro_batch=micro_batch, last=last)

    def forward_backward(
        self,
        batches: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        tokens: Mapping[str, int],
        *,
        micro_batch: int = 0,
        last: bool = True,
    ) -> tuple[dict[str, Tensor], dict[str, tuple[float, int]]]:
        """Runs a micro-batch forward and backward, with the labels at the server.

        batches: by device, hidden states at the cut (rows, sequence, hidden).
        labels: by device, (rows, sequence).
        tokens: by device, the number of predicted tokens of its whole batch.
        last: whether it is the step's last micro-batch.

        Returns, by device, the gradients at the cut, and the micro-batch's summed loss in nats with its number of
        predicted tokens. Raises WrongState where the gradient of all devices together is not finite.
        """
        sums: dict[str, tuple[float, int]] = {}

        def objective(graph: _Graph, weights: Mapping[str, float]) -> tuple[Tensor, None]:
            losses = []
            for device, rows in graph.rows.items():
                loss, count = nll(graph.outputs[rows], labels[device].to(self._device))
                sums[device] = float(loss.detach()), count
                losses.append(loss)
            return torch.stack(losses).sum() / max(1, self._total), None

        graph = self._forward(batches)
        gradients = self._backward(graph, objective, tokens, micro_batch=micro_batch, last=last)
        fit = {device: sums[device] for device in gradients if math.isfinite(sums[device][0])}
        return {device: gradients[device] for device in fit}, fit

    def step(self, step: int, device_norms_squared: Mapping[str, tuple[float, int]]) -> None:
        """Applies optimiser step `step`.

        device_norms_squared: by device, the squared norm of its gradient and its number of predicted tokens; the whole
        gradient's norm is this side's and the devices' mean, weighted by tokens.

        Raises WrongState where that norm is not finite.
        """
        total = max(1, sum(tokens for _, tokens in device_norms_squared.values()))
        of_devices = sum(norm * tokens / total for norm, tokens in device_norms_squared.values())
        mine = sum(norm * self._share(first) for first, norm in self._norms.items())
        self.stepper.step(step, mine + of_devices)
        self._norms.clear()

    @torch.no_grad()
    def evaluate(self, hidden_states: Tensor, device: str = "") -> Tensor:
        """Runs held-out text forward without a gradient.

        hidden_states: (batch, sequence, hidden), at this device's cut.

        Returns the last hidden states, or logits where the head is here.
        """
        cut = self._cut_of(device)
        work = ("evaluate", hidden_states.shape, cut)
        with self.ledger.computing(work):  # always in float32, so that what is reported is exact
            outputs = hidden_states.to(self._device)
            for stage in self.stages:
                if stage.spec.first >= cut:
                    outputs = stage(outputs)
            return outputs

    def restore(self, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Takes over what `stepper` once had: its parameters' values, by name, and its optimiser's state.

        Raises WrongState if they are not of this stage.
        """
        parameters = self.stepper.parameters
        shapes = {name: value.shape for name, value in parameters.items()}
        if {name: value.shape for name, value in adapter.items()} != shapes:
            raise WrongState("the checkpoint is of another model, cut or rank than this job's")
        self.drop()
        self.take(adapter)
        self.stepper = Stepper(parameters, self.config)
        self.stepper.load_state(optimizer)

    @torch.no_grad()
    def take(self, values: Mapping[str, Tensor], *, anew: bool = False) -> None:
        """Sets some of its LoRA parameters, by name.

        anew: whether the optimiser forgets what it knows of them.
        """
        for name, value in values.items():
            self.stepper.parameters[name].copy_(value)
        if anew:
            self.stepper.forget(values)

    def rebuild(self, stages: Sequence[Stage], cuts: Mapping[str, int], values: Mapping[str, Tensor]) -> None:
        """Uses other segments, where cuts have moved. Not while a step is under way.

        values: LoRA values, by name, for blocks that were not here; all other blocks keep their values and optimiser
        state.
        """
        own = {name: value.detach() for name, value in self.stepper.parameters.items()}
        state = self.stepper.state()
        self.use(stages, cuts)
        self.stepper = Stepper(lora_parameters(self.stages), self.config)
        names = self.stepper.parameters.keys()
        self.take({name: value for name, value in {**values, **own}.items() if name in names})
        self.stepper.load_state({key: value for key, value in state.items() if key.rpartition("|")[0] in names})

    def norm_squared(self, device: str = "") -> float:
        """Squared norm of this side's gradient, of the blocks from this device's cut on.

        It is known after the step's last micro-batch.
        """
        cut = self._cut_of(device)
        return sum(norm for first, norm in self._norms.items() if first >= cut)

    def drop(self) -> None:
        """Forgets a step under way, its graphs and its gradients."""
        self._graphs.clear()
        self._norms.clear()
        self.stepper.drop_gradients()

    def _cut_of(self, device: str) -> int:
        return self.cuts.get(device, self.stages[0].spec.first)

    def _forward(self, batches: Mapping[str, Tensor]) -> _Graph:
        graph = _Graph({}, {}, torch.empty(0), {})
        hidden: Tensor | None = None
        end = 0
        for stage in self.stages:
            entering = [device for device in batches if self._cut_of(device) == stage.spec.first]
            if entering:
                begin = 0
                for device in entering:
                    rows = len(batches[device])
                    graph.entered[device] = (stage.spec.first, slice(begin, begin + rows))
                    graph.rows[device] = slice(end, end + rows)
                    begin, end = begin + rows, end + rows
                leaf = torch.cat([batches[device].to(self._device) for device in entering]).requires_grad_()
                graph.leaves[stage.spec.first] = leaf
                hidden = leaf if hidden is None else torch.cat([hidden, leaf])
            if hidden is None:  # no device at work uses this segment
                continue
            work = ("forward", hidden.shape, stage.spec.first)
            with self.ledger.computing(work), autocast(self._dtype, self._device):
                hidden = stage(hidden)
        assert hidden is not None, "no device at work"
        graph.outputs = hidden
        return graph

    def _weights(self, tokens: Mapping[str, int], micro_batch: int) -> dict[str, float]:
        """Each device's share of the step's tokens, which is the same in all micro-batches, whoever goes meanwhile."""
        if micro_batch == 0:
            self._total = sum(tokens.values())
            self._below = {
                stage.spec.first: sum(n for device, n in tokens.items() if self._cut_of(device) <= stage.spec.first)
                for stage in self.stages
            }
        return {device: count / max(1, self._total) for device, count in tokens.items()}

    def _backward(
        self, graph: _Graph, objective: _Objective, tokens: Mapping[str, int], *, micro_batch: int, last: bool
    ) -> dict[str, Tensor]:
        """Adds a micro-batch to the step's gradient, and returns the gradients at the cut by device.

        Devices that would make the gradient unusable are left out, and it is then computed anew from the others.
        """
        while True:
            present = {device: count for device, count in tokens.items() if device in graph.rows}
            weights = self._weights(present, micro_batch)
            at_cut, of_parameters = self._differentiate(graph, objective, weights)
            unfit = {device for device, gradient in at_cut.items() if not is_finite(gradient)}
            if not unfit and can_be_used(of_parameters.values()):
                break
            unfit = unfit or self._unfit_alone(graph, objective, weights)
            if not unfit:
                raise WrongState(f"the gradient of all devices together is not finite: {DIVERGED}")
            if not present.keys() - unfit:
                return {}
            graph = self._forward(graph.batches_without(unfit))
        for name, gradient in of_parameters.items():
            parameter = self.stepper.parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        if last:
            self._finish_gradients()
        return {device: at_cut[device] for device in weights}

    def _differentiate(
        self, graph: _Graph, objective: _Objective, weights: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradients of each device's own mean loss by what it sent, and those of the LoRA parameters, by name."""
        parameters = {name: one for name, one in self.stepper.parameters.items() if one.requires_grad}
        leaves = list(graph.leaves)
        inputs = [*graph.leaves.values(), *parameters.values()]
        outputs, by_outputs = objective(graph, weights)
        with self.ledger.computing(("backward", graph.outputs.shape, *graph.entries())):
            found = torch.autograd.grad(outputs, inputs, by_outputs, allow_unused=True)
        by_cut = dict(zip(leaves, found[: len(leaves)], strict=True))
        at_cut = {}
        for device, (cut, rows) in graph.entered.items():
            gradient = by_cut[cut]
            assert gradient is not None
            # A batch without a predicted token has weight 0 and no gradient, so there is nothing to divide.
            at_cut[device] = gradient[rows] / (weights.get(device) or 1.0)
        of_parameters = zip(parameters, found[len(leaves) :], strict=True)
        return at_cut, {name: one.contiguous() for name, one in of_parameters if one is not None}

    def _unfit_alone(self, graph: _Graph, objective: _Objective, weights: Mapping[str, float]) -> set[str]:
        """The devices whose rows by themselves give LoRA a gradient that cannot be used."""
        unfit = set()
        for device in graph.rows:
            alone = self._forward(graph.batches_without(graph.rows.keys() - {device}))
            _, of_parameters = self._differentiate(alone, objective, weights)
            if not can_be_used(of_parameters.values()):
                unfit.add(device)
        return unfit

    def _share(self, first: int) -> float:
        """The share of the step's tokens that ran through a segment."""
        return self._below[first] / max(1, self._total)

    def _finish_gradients(self) -> None:
        """Turns each segment's gradient into that of the mean over the tokens of those who use it."""
        for first, names in self._names.items():
            share = self._share(first)
            if 0 < share < 1:
                for name in names:
                    parameter = self.stepper.parameters[name]
                    if parameter.grad is not None:
                        parameter.grad.div_(share)
            self._norms[first] = self.stepper.gradient_norm_squared(names if len(self._names) > 1 else None)
