"""`--cut auto`, `--rank auto`: what is chosen for made-up devices, and what it is reckoned from."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from isthmus.split.dlora.modules import RemoteModules
from isthmus.split.errors import BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import ByName, Shape, options_of, parse_by_name
from isthmus.split.link.profile import LinkProfile
from isthmus.split.lora.lora import add_lora, lora_config
from isthmus.split.lora.sites import layout_of
from isthmus.split.models.source import ModelFolder
from isthmus.split.models.stage import StageSpec, build_stages
from isthmus.split.plan.costs import Costs
from isthmus.split.plan.memory import LIBRARIES, training_bytes
from isthmus.split.plan.shapes import Capabilities, choose_shapes
from isthmus.split.resources.ledger import Ledger
from tests.split.tiny_models import ARCHITECTURES, make_model

MODEL = LlamaConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip
TRAINING = TrainingConfig.of(cuts="auto", ranks="auto", codec="none", batch_size=8, sequence_length=128, rank=8)
COSTS = Costs(MODEL, TRAINING)
FAST = LinkProfile(0.001, 1e9, 1e9)
SERVER = Capabilities(2e10)


def _chosen(devices: dict[str, Capabilities], server: Capabilities = SERVER, **changes: object) -> dict[str, Shape]:
    costs = Costs(MODEL, TRAINING.but(**changes))
    return {name: choice.shape for name, choice in choose_shapes(costs, devices, server).items()}


def test_faster_devices_hold_more_and_no_slower_one_holds_more() -> None:
    devices = {f"d{speed}": Capabilities(speed * 4e9, link=FAST) for speed in (1, 2, 4, 8)}
    shapes = _chosen(devices)
    cuts = [shapes[f"d{speed}"].cut for speed in (1, 2, 4, 8)]
    assert cuts == sorted(cuts)
    assert cuts[0] < cuts[-1]
    assert shapes == _chosen(devices)


def test_no_combination_of_cuts_has_a_shorter_step() -> None:
    """Against all there are, for two devices; the solver's deadline is near the best one."""
    devices = {"a": Capabilities(3e9, link=FAST), "b": Capabilities(2e10, link=LinkProfile(0.02, 5e6, 5e6))}
    costs = Costs(MODEL, TRAINING.but(rank=1, ranks=""))
    chosen = choose_shapes(costs, devices, SERVER)
    best = min(
        max(choice.step_seconds for choice in choose_shapes(fixed, devices, SERVER).values())
        for cuts in itertools.product(range(1, 8), repeat=2)
        for fixed in [Costs(MODEL, costs.training.but(cuts=f"a={cuts[0]},b={cuts[1]},auto"))]
    )
    assert max(choice.step_seconds for choice in chosen.values()) <= 1.03 * best


def test_a_slow_server_gives_its_blocks_away_and_a_fast_one_takes_them() -> None:
    devices = {"a": Capabilities(1e10, link=FAST), "b": Capabilities(1e10, link=FAST)}
    assert _chosen(devices, Capabilities(1e9))["a"].cut > _chosen(devices, Capabilities(1e12))["a"].cut


def test_a_narrow_link_lowers_the_rank_whose_adapters_have_to_cross_it() -> None:
    devices = {"wide": Capabilities(1e10, link=FAST), "narrow": Capabilities(1e10, link=LinkProfile(0.1, 2e5, 2e5))}
    shapes = _chosen(devices, aggregate_every=1, cuts="4,")
    assert shapes["wide"].rank == 8
    assert 1 <= shapes["narrow"].rank < 8


def test_memory_bounds_the_cut_and_what_is_named_stays() -> None:
    roomy, tight = (
        Capabilities(1e11, memory=memory, link=FAST) for memory in (2**36, training_bytes(COSTS, 2, 8) / 0.9)
    )
    shapes = _chosen({"roomy": roomy, "tight": tight}, Capabilities(1e9))
    assert shapes["roomy"].cut == 7
    assert shapes["tight"].cut == 2
    assert _chosen({"roomy": roomy, "tight": tight}, Capabilities(1e9), cuts="roomy=3,auto")["roomy"].cut == 3
    assert _chosen({"roomy": roomy, "tight": tight}, ranks="tight=0,auto")["tight"].rank == 0


def test_a_device_without_the_memory_for_the_smallest_share_is_refused_with_the_figures() -> None:
    with pytest.raises(BadRequest) as refused:
        _chosen({"watch": Capabilities(1e9, memory=2**28, link=FAST)})
    line = str(refused.value)
    assert line.startswith("device watch has 0.23 GiB of memory for a job; its smallest share (cut 1, rank 1, ")
    assert f"takes {training_bytes(COSTS, 1, 1) / 2**30:.2f} GiB" in line
    assert "\n" not in line


def test_shapes_that_devices_have_already_stay() -> None:
    devices = {"a": Capabilities(1e10, link=FAST), "b": Capabilities(1e10, link=FAST)}
    alone = choose_shapes(COSTS, devices, Capabilities(1e12))
    kept = choose_shapes(COSTS, devices, Capabilities(1e12), {"a": Shape(5, 3), "gone": Shape(2, 2)})
    assert alone["a"].shape != Shape(5, 3)
    assert kept.keys() == {"a", "b"}
    assert kept["a"].shape == Shape(5, 3)


def test_what_modules_of_the_servers_blocks_keep_until_backward_is_counted() -> None:
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    training = TrainingConfig.of(method="dlora", target_modules=every, batch_size=2, sequence_length=16)
    costs, layout = Costs(MODEL, training), layout_of(MODEL, training)
    remote = RemoteModules(layout, 0, torch.device("cpu"))
    parameters = {value.untyped_storage().data_ptr() for value in remote.parameters.values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for site in layout.sites:
            if site.block >= training.devices.cut_layer:
                remote.outputs(site, layout.remote, torch.zeros(costs.tokens, site.inputs), keep_as=0)
    for inputs, outputs in remote._under_way.values():
        keep(inputs), keep(outputs)
    exchanged = training.but(method="splitlora")
    adapter = 4 * 4 * 8 * costs.lora_values * (costs.layers - 1)
    counted = training_bytes(costs, 1, 8) - training_bytes(Costs(MODEL, exchanged), 1, 8) - adapter
    assert 0.9 * sum(kept.values()) <= counted <= sum(kept.values())  # the rest: what A makes of the inputs, r values


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operations_are_counted_as_the_ledger_counts_them_and_memory_is_enough(
    tmp_path: Path, architecture: str
) -> None:
    source = ModelFolder(make_model(tmp_path, architecture, layers=4, hidden=64))
    training = TrainingConfig.of(batch_size=4, sequence_length=64)
    costs = Costs(source.config, training)
    stage = build_stages(source, [StageSpec(1, 3, embeds=False, head=False)])[0]
    add_lora(stage, lora_config(training, source.config), 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(4, 64, 64, requires_grad=True)
    forward, backward = Ledger(), Ledger()
    with forward.computing("x"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage(x)
    with backward.computing("x"):
        output.backward(torch.ones_like(output))
    assert costs.forward(2, 8, costs.tokens) == pytest.approx(forward.flops, rel=0.02)
    assert costs.backward(2, 8, costs.tokens) == pytest.approx(backward.flops, rel=0.02)
    ends = training_bytes(costs, 0, 8)
    weights_and_lora = 4 * 2 * (costs.block_values + 4 * 8 * costs.lora_values)
    assert sum(kept.values()) <= training_bytes(costs, 2, 8) - ends - weights_and_lora <= 2.5 * sum(kept.values())
    assert ends > LIBRARIES


@pytest.mark.parametrize(
    ("text", "rest", "named"),
    [("3", 3, {}), ("auto", None, {}), ("a=2,b=auto,4", 4, {"a": 2, "b": None}), ("a=0", 1, {"a": 0})],
)
def test_cuts_and_ranks_are_asked_for_by_name(text: str, rest: int | None, named: dict[str, int | None]) -> None:
    assert parse_by_name("--cut", text, 1) == ByName(rest, named)


@pytest.mark.parametrize("text", ["", "a=", "1,2", "a=1,a=2", "=3", "x", "-1", "a=-1"])
def test_what_is_no_choice_of_cuts_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="--cut"):
        parse_by_name("--cut", text, 1)


def test_the_jobs_rank_is_the_largest_that_is_named() -> None:
    default = TrainingConfig()
    assert options_of("2", "4", default) == {"cut_layer": 2, "rank": 4, "cuts": "", "ranks": ""}
    mixed = options_of("a=3,auto", "a=2,b=16,4", default)
    assert mixed == {"cut_layer": 1, "rank": 16, "cuts": "a=3,auto", "ranks": "a=2,b=16,4"}
    assert options_of("1", "a=0", default)["rank"] == 8
    assert options_of("1", "auto", default) == {"cut_layer": 1, "rank": 8, "cuts": "", "ranks": "auto"}
    with pytest.raises(BadRequest, match="more than the job's rank"):
        TrainingConfig.of(rank=4, ranks="8")
