"""DLoRA is unsplit training: losses and adapter are plain peft's, with the same modules dead at the same steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from isthmus.protos.v1.events_pb2 import Event
from isthmus.split.job.shapes import Shape
from isthmus.split.lora.lora import A, B
from isthmus.split.lora.sites import layout_of
from isthmus.split.methods.local import train_locally
from isthmus.split.models.architectures import ARCHITECTURES as TABLE
from isthmus.split.models.source import ModelFolder
from tests.split.dlora.jobs import CONFIG, assert_same, dlora_run, padded_text, scripted, text, unsplit_run
from tests.split.tiny_models import ARCHITECTURES, make_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", layers=3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cut", [0, 1])
def test_with_all_modules_active_it_is_unsplit_peft(tmp_path: Path, architecture: str, cut: int) -> None:
    """With SGD, for Adam divides each gradient by its own size: where one is next to nothing, its rounding grows."""
    folder = make_model(tmp_path, architecture, layers=3, tied=architecture == "gpt2")
    linear = TABLE[architecture].linear_modules
    config = CONFIG.but(cut_layer=cut, target_modules=linear, optimizer="sgd", learning_rate=0.5)
    losses, adapter = unsplit_run(folder, config, text(0))
    run, told = dlora_run(folder, config, [text(0)])
    assert told["d0"] == pytest.approx(losses, rel=1e-5)
    assert_same(run.adapters["d0"], adapter, tolerance=1e-6)
    assert all(float(value.abs().max()) > 1e-3 for name, value in adapter.items() if "lora_B" in name)  # it trains


@pytest.mark.parametrize("targets", [(), ("v_proj",), ("gate_proj", "q_proj")])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_any_modules_and_rows_without_use_change_nothing(
    llama: Path, targets: tuple[str, ...], micro_batches: int
) -> None:
    config = CONFIG.but(target_modules=targets, micro_batches=micro_batches)
    losses, adapter = unsplit_run(llama, config, padded_text(1))
    run, told = dlora_run(llama, config, [padded_text(1)])
    assert told["d0"] == pytest.approx(losses, rel=1e-5)
    assert_same(run.adapters["d0"], adapter)


@pytest.mark.parametrize("killed", ["keep", "merge", "drop"])
@pytest.mark.parametrize("cut", [0, 1])
def test_with_modules_killed_and_revived_it_is_unsplit_peft_with_them_frozen_or_removed(
    llama: Path, monkeypatch: pytest.MonkeyPatch, killed: str, cut: int
) -> None:
    """All train for two steps, then each step another third of them; one block is dead for long and comes back."""

    def trained(step: int, name: str) -> bool:
        number = sum(map(ord, name))
        return step < 2 or ((number + step) % 3 == 0 and not (".1." in name and step < 6))

    config = CONFIG.but(cut_layer=cut, killed=killed)
    losses, adapter = unsplit_run(llama, config, padded_text(2), trained)
    scripted(monkeypatch, trained)
    run, told = dlora_run(llama, config, [padded_text(2)])
    assert told["d0"] == pytest.approx(losses, rel=1e-5)
    assert_same(run.adapters["d0"], adapter)


def test_devices_have_adapters_of_their_own(llama: Path) -> None:
    """Each one's is what it would be alone, whatever the others do at the same time."""
    together, told = dlora_run(llama, CONFIG, [text(0), padded_text(1), text(2)])
    for number, one in enumerate([text(0), padded_text(1), text(2)]):
        losses, adapter = unsplit_run(llama, CONFIG, one)
        assert told[f"d{number}"] == pytest.approx(losses, rel=1e-5)
        assert_same(together.adapters[f"d{number}"], adapter)
    assert together.outcome.device_adapter is None


def test_devices_may_differ_in_cut_and_rank(llama: Path) -> None:
    """Each passes the blocks that it has not itself, with modules of its own rank; one of rank 0 has none to train."""
    shapes = [Shape(2, 2), Shape(1, 4), Shape(0, 3), Shape(1, 0)]
    texts = [text(0), padded_text(1), text(2), text(3)]
    run, told = dlora_run(llama, CONFIG, texts, shapes={f"d{number}": shape for number, shape in enumerate(shapes)})
    for number, (shape, one) in enumerate(zip(shapes[:3], texts, strict=False)):
        # The scale is the job's, whatever a device's own rank is.
        alike = CONFIG.but(rank=shape.rank, alpha=CONFIG.lora.alpha * shape.rank / CONFIG.lora.rank)
        losses, adapter = unsplit_run(llama, alike, one)
        assert told[f"d{number}"] == pytest.approx(losses, rel=1e-5)
        assert_same(run.adapters[f"d{number}"], adapter)
    assert run.adapters["d3"] == {}
    assert told["d3"] == []


def test_an_average_that_was_asked_for_is_that_of_the_adapters(llama: Path) -> None:
    config = CONFIG.but(aggregate=True, aggregate_every=4, checkpoint_every=4)
    once = config.but(aggregate_every=config.steps)
    alone = [unsplit_run(llama, CONFIG, one)[1] for one in (text(0), text(1, 20))]
    run, _ = dlora_run(llama, once, [text(0), text(1, 20)])
    average = {name: (40 * alone[0][name] + 20 * alone[1][name]) / 60 for name in alone[0]}
    assert_same(run.adapters["d0"], average)
    assert_same(run.adapters["d1"], average)
    assert run.outcome.device_adapter is not None
    twice, _ = dlora_run(llama, config, [text(0), text(1, 20)])
    assert_same(twice.adapters["d0"], twice.adapters["d1"], 0)
    assert any(not torch.equal(twice.adapters["d0"][name], value) for name, value in average.items())


def test_how_far_an_average_is_from_that_of_the_products_is_told(llama: Path) -> None:
    config = CONFIG.but(aggregate=True, aggregate_every=CONFIG.steps)
    told: list[Event] = []
    train_locally(ModelFolder(llama), config, [(text(0), None), (text(1, 20), None)], tell=told.append)
    one, other = (unsplit_run(llama, CONFIG, sequences)[1] for sequences in (text(0), text(1, 20)))
    lost = norm = 0.0
    for module in [name.removesuffix(A) for name in one if name.endswith(A)]:
        a, b = ((2 * one[module + end] + other[module + end]) / 3 for end in (A, B))
        exact = (2 * one[module + B] @ one[module + A] + other[module + B] @ other[module + A]) / 3
        lost += float((b @ a - exact).square().sum())
        norm += float(exact.square().sum())
    (aggregated,) = [event.aggregation for event in told if event.HasField("aggregation")]
    assert (aggregated.step, aggregated.method) == (CONFIG.steps, "average")
    assert aggregated.aggregation_error == pytest.approx(math.sqrt(lost / norm), rel=1e-2)


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "hadamard,uniform:step=0.05,zstd", "klt,uniform:step=0.05,zstd"])
def test_lossy_codecs_make_it_smaller_and_nearly_the_same(llama: Path, codec: str) -> None:
    exact, losses = dlora_run(llama, CONFIG, [text(0)])
    run, told = dlora_run(llama, CONFIG.but(codec=codec), [text(0)])
    assert told["d0"] == pytest.approx(losses["d0"], rel=0.02)
    sizes = [one.ledgers["d0"].traffic.total_bytes("sent") for one in (run, exact)]
    assert sizes[0] < 0.6 * sizes[1]


def test_modules_that_share_an_input_share_a_site(llama: Path) -> None:
    layout = layout_of(ModelFolder(llama).config, CONFIG)
    kinds = [[module.name.rpartition(".")[2] for module in site.modules] for site in layout.sites]
    assert kinds == 3 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert {layout.modules[number].block for number in layout.front} == {0}
    some = frozenset(module.number for module in layout.modules[::3])
    assert layout.unpack(layout.pack(some)) == some
