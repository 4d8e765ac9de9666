"""One DLoRA job as unsplit training: which modules train at each step is the controller's choice, costs are counted.

A job over a network with some of its modules killed has the losses of unsplit training with the same modules frozen at
the same steps (the method's tests hold that), so quality can be measured here, by plain transformers and peft.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from benchmarks.dlora.choices import chooser
from benchmarks.dlora.costs import Costs, Spent
from benchmarks.dlora.wires import Wires
from isthmus.split.data.documents import Document, read_documents, split_documents
from isthmus.split.data.sequences import Sequences, batch_indices, build_sequences
from isthmus.split.dlora.kill_policy import KillPolicy
from isthmus.split.dlora.module_costs import module_costs
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import DROP, MERGE
from isthmus.split.lora.lora import draw_initial_values, lora_config
from isthmus.split.models.architectures import architecture_of
from isthmus.split.models.source import open_model
from isthmus.split.training.evaluate import load_model
from isthmus.split.training.loss import nll
from isthmus.split.training.optim import Stepper

_PREFIX = "base_model.model."
_HELD_OUT, _TEST = 0.2, 0.1  # shares of the documents, by hash: held out; of these the test's, the rest is to choose by


@dataclass(frozen=True)
class Case:
    """One run. choice: all, controller, random, fixed, or named (the modules whose names hold one of `named`)."""

    data: str
    choice: str
    steps: int
    seed: int
    policy: KillPolicy = field(default_factory=KillPolicy)
    score: str = "gradient"
    learning_rate: float = 4e-3
    documents: int = 500  # that the device has
    named: tuple[str, ...] = ()
    codecs: tuple[str, str] | None = None  # of hidden states, of gradients


@dataclass(frozen=True)
class Point:
    """After some steps, of which the first are none: spent so far, and the perplexity on the text to choose by."""

    step: int
    values: float
    flops: float
    module_flops: float
    perplexity: float


@dataclass(frozen=True)
class Outcome:
    case: Case
    validation: float  # perplexity at the end, on the text to choose by
    test: float  # the same on text that no choice has seen
    spent: Spent
    coded_bytes: int  # where codecs were on the link
    points: list[Point]
    decisions: list[tuple[int, list[str]]]  # step, active modules; where they changed
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)


class Texts:
    """Training text, text to choose settings by, and text for the figures, each of at most so many documents.

    Those are taken at equal distances from the whole file: neighbours in it are alike.
    """

    def __init__(self, path: Path, training: TrainingConfig, model: str, documents: int) -> None:
        data, tokenizer = training.text, open_model(model).tokenizer()
        train, held_out = split_documents(read_documents(path, data), _HELD_OUT)
        validation, test = split_documents(held_out, _TEST)
        train, validation, test = (spread(part, documents) for part in (train, validation, test))
        self.train = build_sequences(train, tokenizer, data, keep_last=False)
        self.validation = build_sequences(validation, tokenizer, data, keep_last=True)
        self.test = build_sequences(test, tokenizer, data, keep_last=True)


def spread(documents: list[Document], count: int) -> list[Document]:
    """At most `count` of them, at equal distances, in order."""
    if len(documents) <= count:
        return documents
    return [documents[index * len(documents) // count] for index in range(count)]


class Modules:
    """The LoRA modules of a peft model, by their names in the whole model; each trains, or is killed in its mode."""

    def __init__(self, model: torch.nn.Module, killed: str) -> None:
        self.layers = {
            name.removeprefix(_PREFIX): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
        }
        self.killed = killed
        self.active = set(self.layers)

    def parameters(self, name: str) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[name]
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def set_active(self, active: Collection[str]) -> None:
        for name in self.active ^ set(active):
            layer: Any = self.layers[name]
            on = name in active
            for parameter in self.parameters(name):
                parameter.requires_grad_(on)
            if self.killed == MERGE:
                layer.unmerge() if on else layer.merge(adapter_names=["default"])
            elif self.killed == DROP:
                layer.scaling["default"] = layer.lora_alpha["default"] / layer.r["default"] if on else 0.0
        self.active = set(active)


def run(case: Case, training: TrainingConfig, path: Path, model: str, held_out_rows: int, evaluations: int) -> Outcome:
    """Train once. held_out_rows: at most so many on the way; at the end all."""
    source = open_model(model)
    texts = Texts(path, training, model, case.documents)
    wrapped = get_peft_model(load_model(str(source.path), model), lora_config(training, source.config)).eval()
    draw_initial_values([(name.removeprefix(_PREFIX), module) for name, module in wrapped.named_modules()], case.seed)
    costs = module_costs(source.config, training)
    modules = Modules(wrapped, case.policy.killed)
    prices, spent = Costs(source.config, training, costs), Spent()
    choice = chooser(case.choice, costs, case.policy, case.steps, case.seed, case.named)
    named = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    stepper = Stepper(named, training)
    wires = None
    if case.codecs is not None:
        blocks: Any = wrapped.get_submodule(_PREFIX + architecture_of(source.config).layers)
        wires = Wires(modules.layers, blocks, costs, training.devices.cut_layer, case.codecs, case.seed)
    gauge = Gauge(case.score, modules)
    points: list[Point] = []
    decisions: list[tuple[int, list[str]]] = []
    scores: list[tuple[int, dict[str, float]]] = []
    every = max(1, case.steps // evaluations)
    points.append(Point(0, 0.0, 0.0, 0.0, evaluate(wrapped, texts.validation, held_out_rows)))
    for step in range(case.steps):
        decision = choice.decide(step)
        if not decisions or decision.killed or decision.revived:
            decisions.append((step, [name for name in costs if name in decision.active]))
        modules.set_active(decision.active)
        if wires is not None:
            wires.set_active(decision.active)
        rows = batch_indices(len(texts.train), training.batch_size, step, training.seed)
        if decision.active:
            total, tokens = nll(
                wrapped(input_ids=texts.train.input_ids[rows], use_cache=False).logits, texts.train.labels[rows]
            )
            loss = total / max(tokens, 1)
            loss.backward()
            gauge.before_step()
            stepper.step(step, stepper.gradient_norm_squared())
            choice.observe(step, float(loss.detach()), gauge.after_step())
        prices.add(spent, decision.active, decision.killed if step else (), case.policy.killed)
        if (step + 1) % every == 0:
            perplexity = evaluate(wrapped, texts.validation, held_out_rows)
            points.append(Point(step + 1, spent.values, spent.flops, spent.module_flops, perplexity))
            scores.append((step, choice.scores()))
    validation, test = (evaluate(wrapped, text) for text in (texts.validation, texts.test))
    return Outcome(case, validation, test, spent, 0 if wires is None else wires.bytes, points, decisions, scores)


class Gauge:
    """Responsiveness of the active modules, by name of the measure:

    gradient: norm of the gradient of A and B; update: norm of what the step changed in A and B over their own norm;
    gain: by how much the last update of the module has lowered the loss of this batch, to first order.
    """

    def __init__(self, measure: str, modules: Modules) -> None:
        self.measure, self.modules = measure, modules
        self._before: dict[str, list[Tensor]] = {}
        self._update: dict[str, list[Tensor]] = {}
        self._found: dict[str, float] = {}

    @torch.no_grad()
    def before_step(self) -> None:
        self._found = {}
        for name in self.modules.active:
            pair = self.modules.parameters(name)
            gradients = [parameter.grad for parameter in pair if parameter.grad is not None]
            if self.measure == "gradient":
                self._found[name] = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            elif self.measure == "gain" and name in self._update:
                moved = zip(self._update[name], gradients, strict=True)
                self._found[name] = -sum(float((update * g).sum()) for update, g in moved)
            if self.measure != "gradient":
                self._before[name] = [parameter.detach().clone() for parameter in pair]

    @torch.no_grad()
    def after_step(self) -> dict[str, float]:
        if self.measure == "gradient":
            return self._found
        self._update = {}
        for name in self.modules.active:
            pair = self.modules.parameters(name)
            self._update[name] = [now - old for now, old in zip(pair, self._before[name], strict=True)]
            if self.measure == "update":
                moved = math.sqrt(sum(float(u.square().sum()) for u in self._update[name]))
                size = math.sqrt(sum(float(p.square().sum()) for p in pair))
                self._found[name] = moved / max(size, 1e-12)
        return self._found


@torch.no_grad()
def evaluate(model: torch.nn.Module, text: Sequences, rows: int | None = None) -> float:
    """Perplexity on the first `rows` sequences (None: on all)."""
    total, tokens = 0.0, 0
    count = len(text) if rows is None else min(rows, len(text))
    for start in range(0, count, 32):
        part = slice(start, min(start + 32, count))
        loss, predicted = nll(model(input_ids=text.input_ids[part], use_cache=False).logits, text.labels[part])
        total, tokens = total + float(loss), tokens + predicted
    return math.exp(total / tokens)


def mean_perplexity(outcomes: Sequence[Outcome]) -> float:
    """Geometric, over seeds."""
    return math.exp(fmean(math.log(outcome.test) for outcome in outcomes))


def as_json(outcome: Outcome) -> Mapping[str, Any]:
    return asdict(outcome)
