"""Which modules train: budgets, hysteresis, trials, and going on from a saved state. Numbers stand for tensors here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from isthmus.split.dlora.kill_and_revive import Decision, KillAndRevive
from isthmus.split.dlora.kill_policy import KillPolicy
from isthmus.split.dlora.module_costs import ModuleCost
from isthmus.split.errors import BadRequest

Score = Callable[[int, str], float]
STEPS = 300


def _costs(blocks: int = 4) -> dict[str, ModuleCost]:
    """Blocks of a query, a value with fewer heads and a down projection; the first block is the device's own."""
    costs = {}
    for block in range(blocks):
        remote = block > 0
        costs[f"{block}.q"] = ModuleCost(f"{block}.attention", 2 * block, 64, 64, 8, remote)
        costs[f"{block}.v"] = ModuleCost(f"{block}.attention", 2 * block, 64, 16, 8, remote)
        costs[f"{block}.down"] = ModuleCost(f"{block}.down", 2 * block + 1, 160, 64, 8, remote)
    return costs


def _noise(step: int, name: str) -> float:
    return random.Random(f"{step}/{name}").uniform(0.5, 1.5)


def _falling(step: int) -> float:
    return 1.0 + 3.0 * 0.97**step


def _run(
    controller: KillAndRevive,
    score: Score = _noise,
    loss: Callable[[int], float] = _falling,
    steps: range = range(STEPS),
) -> list[Decision]:
    decisions = []
    for step in steps:
        decision = controller.decide(step)
        controller.observe(step, loss(step), {name: score(step, name) for name in decision.active})
        decisions.append(decision)
    return decisions


@pytest.mark.parametrize("budget", ["values", "modules"])
@pytest.mark.parametrize("schedule", ["step", "cosine", "gain"])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.6])
def test_what_was_spent_never_exceeds_the_budgets_so_far(budget: str, schedule: str, fraction: float) -> None:
    policy = KillPolicy(budget=budget, schedule=schedule, active_fraction=fraction, warmup_steps=20)
    controller = KillAndRevive(_costs(), policy, STEPS)
    spent = allowed = 0.0
    for step in range(STEPS):
        decision = controller.decide(step)
        spent += controller.cost(decision.active)
        allowed += controller.budget(step)
        assert spent <= allowed + 1e-6
        controller.observe(step, _falling(step), {name: _noise(step, name) for name in decision.active})
    assert controller.budget(STEPS - 1) == pytest.approx(fraction * controller.cost(_costs()))


@pytest.mark.parametrize("budget", ["values", "modules"])
def test_without_trials_no_step_costs_more_than_its_budget(budget: str) -> None:
    policy = KillPolicy(budget=budget, active_fraction=0.25, probe_share=0.0)
    controller = KillAndRevive(_costs(), policy, STEPS)
    for step, decision in enumerate(_run(controller)):
        assert controller.cost(decision.active) <= controller.budget(step) + 1e-6


def test_the_budget_of_a_cosine_goes_down_from_all_to_the_target() -> None:
    policy = KillPolicy(active_fraction=0.2, warmup_steps=10, anneal_steps=50)
    controller = KillAndRevive(_costs(), policy, STEPS)
    budgets = [controller.budget(step) / controller.cost(_costs()) for step in range(STEPS)]
    assert budgets[:10] == [1.0] * 10
    assert all(before >= after for before, after in pairwise(budgets))
    assert budgets[35] == pytest.approx(0.6, abs=0.03)
    assert budgets[60:] == pytest.approx([0.2] * (STEPS - 60))


def test_the_budget_follows_the_gain_down() -> None:
    policy = KillPolicy(active_fraction=0.1, schedule="gain", warmup_steps=20)
    quick, slow = (KillAndRevive(_costs(), policy, STEPS) for _ in range(2))
    quick_budgets, slow_budgets = [], []
    for step in range(STEPS):
        for controller, budgets, rate in ((quick, quick_budgets, 0.93), (slow, slow_budgets, 0.985)):
            decision = controller.decide(step)
            controller.observe(step, 1 + 3 * rate**step, dict.fromkeys(decision.active, 1.0))
            budgets.append(controller.budget(step))
    assert all(before >= after for before, after in pairwise(slow_budgets))
    assert sum(quick_budgets) < sum(slow_budgets)
    assert quick_budgets[-1] == pytest.approx(0.1 * quick.cost(_costs()))


@pytest.mark.parametrize("hold", [20, 60])
def test_no_module_comes_back_more_often_than_it_may(hold: int) -> None:
    policy = KillPolicy(active_fraction=0.3, hold_steps=hold, margin=0.0, smoothing=0.0, interval=5, probe_interval=5)
    revived: dict[str, list[int]] = {}
    for step, decision in enumerate(_run(KillAndRevive(_costs(), policy, STEPS))):
        for name in decision.revived:
            revived.setdefault(name, []).append(step)
    assert any(len(steps) > 1 for steps in revived.values())
    for steps in revived.values():
        assert all(after - before >= hold for before, after in pairwise(steps))


def test_a_small_lead_changes_nothing() -> None:
    def close(step: int, name: str) -> float:
        return 1.0 + (0.1 if name.endswith("q") == (step // 50 % 2 == 0) else 0.0)

    policy = KillPolicy(budget="modules", active_fraction=0.5, schedule="step", probe_share=0.0, margin=0.3)
    decisions = _run(KillAndRevive(_costs(), policy, STEPS), close)
    assert sum(bool(decision.killed or decision.revived) for decision in decisions) == 1


def test_a_module_whose_responsiveness_rises_comes_back() -> None:
    def rising(step: int, name: str) -> float:
        return (5.0 if step > 100 else 0.1) if name == "3.v" else _noise(step, name)

    policy = KillPolicy(active_fraction=0.3, schedule="step", warmup_steps=20)
    decisions = _run(KillAndRevive(_costs(), policy, STEPS), rising)
    assert "3.v" not in decisions[60].active
    assert all("3.v" in decision.active for decision in decisions[-50:])


def test_a_stalled_loss_starts_trials_before_their_time() -> None:
    policy = KillPolicy(active_fraction=0.3, schedule="step", probe_interval=10_000, stall_steps=30)

    def trials(loss: Callable[[int], float]) -> list[int]:
        decisions = _run(KillAndRevive(_costs(), policy, STEPS), loss=loss)
        return [step for step, decision in enumerate(decisions) if "loss stalled" in decision.reason]

    assert trials(lambda step: 4.0 - 0.01 * step) == []
    stalled = trials(lambda step: max(1.0, 4.0 - 0.05 * step))
    assert stalled
    assert 60 <= stalled[0] <= 180  # the loss is smoothed


def test_every_killed_module_has_its_turn_however_dear_it_is() -> None:
    policy = KillPolicy(
        active_fraction=0.1, warmup_steps=1, schedule="step", probe_share=0.8, probe_steps=10, probe_interval=5
    )
    decisions = _run(KillAndRevive(_costs(), policy, 600), lambda step, name: 1.0, steps=range(600))
    assert {name for decision in decisions[1:] for name in decision.revived} >= {
        name for name in _costs() if not name.startswith("0.") and name not in decisions[1].active
    }


def test_the_same_observations_give_the_same_decisions() -> None:
    first, second = (_run(KillAndRevive(_costs(), KillPolicy(), STEPS)) for _ in range(2))
    assert first == second
    assert any(decision.revived for decision in first)


@pytest.mark.parametrize("stop", [7, 41, 100, 203])
@pytest.mark.parametrize("schedule", ["cosine", "gain"])
def test_a_state_taken_up_in_the_middle_goes_on_as_if_nothing_had_happened(stop: int, schedule: str) -> None:
    policy = KillPolicy(active_fraction=0.3, schedule=schedule)
    whole = _run(KillAndRevive(_costs(), policy, STEPS))
    first = KillAndRevive(_costs(), policy, STEPS)
    before = _run(first, steps=range(stop))
    second = KillAndRevive(_costs(), policy, STEPS)
    second.load_state(json.loads(json.dumps(first.state())))
    assert before + _run(second, steps=range(stop, STEPS)) == whole
    assert second.scores() == pytest.approx(second.scores())


def test_the_state_of_other_modules_or_of_another_policy_is_refused() -> None:
    state = KillAndRevive(_costs(), KillPolicy(), STEPS).state()
    with pytest.raises(BadRequest, match="other modules"):
        KillAndRevive(_costs(5), KillPolicy(), STEPS).load_state(state)
    with pytest.raises(BadRequest, match="another policy"):
        KillAndRevive(_costs(), KillPolicy(interval=3), STEPS).load_state(state)


def test_modules_that_do_not_respond_are_not_chosen() -> None:
    def some(step: int, name: str) -> float:
        return 0.0 if name in ("1.q", "2.v") else 1.0

    policy = KillPolicy(active_fraction=0.9, schedule="step", probe_share=0.0)
    last = _run(KillAndRevive(_costs(), policy, STEPS), some)[-1]
    assert not {"1.q", "2.v"} & last.active
    everything = replace(policy, active_fraction=1.0)
    assert len(_run(KillAndRevive(_costs(), everything, STEPS), some)[-1].active) == len(_costs())


def test_modules_that_do_harm_are_killed_though_there_is_room_for_them() -> None:
    policy = KillPolicy(active_fraction=0.9, schedule="step", probe_share=0.0)
    last = _run(KillAndRevive(_costs(), policy, STEPS), lambda step, name: -1.0 if name == "2.v" else 1.0)[-1]
    assert "2.v" not in last.active
    assert {"1.v", "3.v"} <= last.active


def test_all_modules_can_be_dead() -> None:
    policy = KillPolicy(budget="modules", active_fraction=0.0, schedule="step", warmup_steps=10)
    decisions = _run(KillAndRevive(_costs(), policy, STEPS))
    assert decisions[10].active == frozenset()
    assert decisions[10].killed == tuple(_costs())
    assert decisions[-1].active == frozenset()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [60, 300, 1000])
@pytest.mark.parametrize("fraction", [0.005, 0.02, 0.05, 0.125, 0.25])
def test_a_budget_above_zero_always_leaves_something_active(fraction: float, steps: int, seed: int) -> None:
    """Where the device has no block, so that every module costs something, and most of the budget takes turns."""
    costs = {name: replace(cost, remote=True) for name, cost in _costs().items()}
    turn = min(40, steps // 10)
    turns = {"probe_share": 0.8, "probe_steps": turn, "hold_steps": turn, "probe_interval": 10}
    policy = KillPolicy(active_fraction=fraction, warmup_steps=steps // 10, anneal_steps=steps // 3, **turns)
    controller = KillAndRevive(costs, policy, steps)
    weights = {name: random.Random(f"{seed}/{name}").lognormvariate(0, 1) for name in costs}
    decisions = _run(controller, lambda step, name: weights[name] * _noise(step, name), steps=range(steps))
    assert all(decision.active for decision in decisions)
    prices = [controller.cost({name}) for name in costs]
    spent = sum(controller.cost(decision.active) for decision in decisions)
    assert spent <= sum(max(controller.budget(step), min(prices)) for step in range(steps)) + turn * max(prices)


def test_modules_take_turns_where_one_at_a_time_is_all_that_there_may_be() -> None:
    costs = {name: replace(cost, remote=True) for name, cost in _costs().items()}
    policy = KillPolicy(budget="modules", active_fraction=0.01, schedule="step", hold_steps=5)
    decisions = _run(KillAndRevive(costs, policy, STEPS), lambda step, name: 1.0)[policy.warmup_steps :]
    assert all(len(decision.active) == 1 for decision in decisions)
    assert set(costs) == {name for decision in decisions for name in decision.active}


def test_no_modules_at_all_are_no_error() -> None:
    assert _run(KillAndRevive({}, KillPolicy(), STEPS))[-1] == Decision(frozenset())


def test_a_budget_of_values_costs_modules_of_the_devices_own_blocks_nothing() -> None:
    policy = KillPolicy(active_fraction=0.0, schedule="step", probe_share=0.0)
    assert _run(KillAndRevive(_costs(), policy, STEPS))[-1].active == {"0.q", "0.v", "0.down"}


def test_with_a_budget_of_values_cheap_modules_stay_where_all_respond_alike() -> None:
    policy = KillPolicy(active_fraction=0.15, schedule="step", probe_share=0.0)
    last = _run(KillAndRevive(_costs(), policy, STEPS), lambda step, name: 1.0)[-1]
    assert {name for name in last.active if not name.startswith("0.")} == {"1.v", "1.q"}  # q shares v's input
    policy = replace(policy, budget="modules", active_fraction=0.5)
    last = _run(KillAndRevive(_costs(), policy, STEPS), lambda step, name: 3.0 if name.endswith("down") else 1.0)[-1]
    assert {"1.down", "2.down", "3.down"} <= last.active


def test_what_is_not_finite_or_not_known_is_left_out() -> None:
    controller = KillAndRevive(_costs(), KillPolicy(), STEPS)
    controller.decide(0)
    controller.observe(0, float("nan"), {"0.q": float("inf"), "elsewhere": 1.0, "1.q": 2.0})
    assert controller.scores() == {"1.q": 2.0}
    json.dumps(controller.state(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"budget": "bytes"}, "choose one of values, modules"),
        ({"schedule": "linear"}, "choose one of step, cosine, gain"),
        ({"killed": "burn"}, "choose one of keep, merge, drop"),
        ({"active_fraction": 1.5}, "active_fraction is 1.5; choose 0 to 1"),
        ({"active_fraction": float("nan")}, "active_fraction is nan; choose 0 to 1"),
        ({"margin": -1.0}, "choose 0 or more"),
        ({"smoothing": 1.0}, "choose 0 to 0.999"),
        ({"interval": 0}, "interval is 0; choose 1 or more"),
        ({"warmup_steps": -1}, "choose 0 or more"),
    ],
)
def test_a_policy_that_cannot_be_says_what_to_choose(changes: dict[str, object], line: str) -> None:
    with pytest.raises(BadRequest, match=line):
        KillPolicy(**changes)  # type: ignore[arg-type]
