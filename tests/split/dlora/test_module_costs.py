"""The cost of remote LoRA modules: which there are, what they exchange and compute, by arithmetic done here by hand."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from isthmus.split.dlora.module_costs import exchange, marginal_values, module_costs, module_flops
from isthmus.split.errors import BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.groups import DROP, KEEP, MERGE
from isthmus.split.lora.lora import lora_parameters
from isthmus.split.models.architectures import architecture_of
from tests.split.tiny_models import ARCHITECTURES, make_config

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Q, K, V, OUT = (f"model.layers.2.self_attn.{name}" for name in ALL[:4])
GATE, UP, DOWN = (f"model.layers.2.mlp.{name}" for name in ALL[4:])


def _config() -> LlamaConfig:
    """Hidden 64, keys and values 16, MLP 96, three blocks."""
    return LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
    )


def _training(**changes: object) -> TrainingConfig:
    return TrainingConfig.of(**({"target_modules": ALL, "rank": 4} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_module_of_every_architecture_has_its_cost(architecture: str) -> None:
    config = make_config(architecture, layers=3)
    linear = architecture_of(config).linear_modules
    costs = module_costs(config, _training(target_modules=linear))
    in_block = len(linear) + (architecture == "gpt2")  # which calls one of its attention and one of its MLP c_proj
    assert len(costs) == 3 * in_block
    assert [cost.order for cost in costs.values()] == sorted(cost.order for cost in costs.values())
    assert sum(cost.remote for cost in costs.values()) == 2 * in_block


def test_parameters_are_those_of_the_adapter() -> None:
    from peft import inject_adapter_in_model

    from isthmus.split.lora.lora import lora_config
    from isthmus.split.models.stage import Stage, StageSpec, skeleton

    config, training = _config(), _training()
    spec = StageSpec(0, 3, embeds=True, head=True)
    model = skeleton(config, spec)
    inject_adapter_in_model(lora_config(training, config), model)
    counts: dict[str, int] = {}
    for name, value in lora_parameters([Stage(spec, model, architecture_of(config))]).items():
        module = name.partition(".lora_")[0]
        counts[module] = counts.get(module, 0) + value.numel()
    assert counts == {name: cost.parameters for name, cost in module_costs(config, training).items()}


def test_all_active_exchange_four_times_their_sites_widths() -> None:
    costs = module_costs(_config(), _training())
    both = exchange(costs, costs)
    block_down, block_up = 64 + 64 + 64 + 96, 64 + 16 + 16 + 64 + 96 + 96 + 64
    assert (both.down_forward, both.up_forward) == (2 * block_down, 2 * block_up)
    assert (both.down_backward, both.up_backward) == (2 * block_up, 2 * block_down)


def test_modules_of_one_site_share_their_input() -> None:
    costs = module_costs(_config(), _training())
    assert exchange(costs, {Q}).down_forward == exchange(costs, {Q, K, V}).down_forward == 64
    assert exchange(costs, {GATE, UP}).down_forward == 64
    assert exchange(costs, {V, OUT}).down_forward == 128
    assert marginal_values(costs, K, []) == 2 * (64 + 16)
    assert marginal_values(costs, K, [V]) == 2 * 16
    assert marginal_values(costs, K, [DOWN]) == 2 * (64 + 16)
    assert marginal_values(costs, "model.layers.0.self_attn.k_proj", []) == 0


@pytest.mark.parametrize("mode", [MERGE, DROP])
def test_the_dead_exchange_nothing_and_the_lowest_site_sends_no_gradient_below(mode: str) -> None:
    costs = module_costs(_config(), _training())
    assert exchange(costs, set(), mode).total == 0
    one = exchange(costs, {V}, mode)
    assert (one.down_forward, one.up_forward, one.down_backward, one.up_backward) == (64, 16, 16, 0)
    two = exchange(costs, {V, DOWN}, mode)
    assert (two.down_forward, two.up_forward, two.down_backward, two.up_backward) == (160, 80, 80, 96)
    front = exchange(costs, {V, "model.layers.0.mlp.down_proj"}, mode)
    assert front.up_backward == 64  # the device's own block trains below


def test_kept_modules_stay_in_the_forward_pass_and_pass_on_gradients_where_something_below_trains() -> None:
    costs = module_costs(_config(), _training())
    all_active = exchange(costs, costs)
    kept = exchange(costs, {DOWN}, KEEP)
    assert (kept.down_forward, kept.up_forward) == (all_active.down_forward, all_active.up_forward)
    assert (kept.down_backward, kept.up_backward) == (64, 0)
    below = exchange(costs, {"model.layers.0.self_attn.q_proj"}, KEEP)
    assert below == all_active


def test_flops_are_three_passes_of_active_branches() -> None:
    costs = module_costs(_config(), _training())
    parameters = 4 * (64 + 16)
    assert module_flops(costs, {V}) == 3 * 2 * parameters
    assert module_flops(costs, set()) == 0
    everything = sum(cost.parameters for cost in costs.values())
    lowest = {"model.layers.0.self_attn.q_proj"}
    above = sum(cost.parameters for cost in costs.values() if cost.order > 0)
    same_site = sum(cost.parameters for name, cost in costs.items() if cost.order == 0 and name not in lowest)
    assert above + same_site + 4 * 128 == everything
    assert module_flops(costs, lowest, KEEP) == 6 * 4 * 128 + 4 * above + 2 * same_site


def test_a_cut_or_modules_that_are_not_there_are_refused() -> None:
    with pytest.raises(BadRequest, match="choose 0 to 2"):
        module_costs(_config(), _training(cut_layer=3))
    with pytest.raises(BadRequest, match="c_attn are not in a llama block"):
        module_costs(_config(), _training(target_modules=("c_attn",)))
