"""The DLoRA benchmark: its arithmetic, that what it counts is what would cross, and that the command runs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.dlora import bytes
from benchmarks.dlora.choices import chooser
from benchmarks.dlora.costs import Costs, Spent
from benchmarks.dlora.kill_and_revive import cases_of, training_of
from benchmarks.dlora.runs import Case, Outcome, Point, Texts, run, spread
from benchmarks.dlora.summary import BYTES_A_VALUE, keys, summarise
from isthmus.split.data.documents import Document
from isthmus.split.data.sequences import IGNORE, batch_indices, seen_positions
from isthmus.split.dlora.kill_policy import KillPolicy
from isthmus.split.dlora.module_costs import module_costs
from isthmus.split.job.groups import KEEP
from isthmus.split.lora.sites import layout_of
from isthmus.split.models.source import open_model
from tests.benchmark import RUNS_APART, run_benchmark, run_benchmark_of_runs
from tests.split.dlora.jobs import CONFIG, padded_text
from tests.split.tiny_models import make_model

_POLICY = KillPolicy(warmup_steps=2, schedule="step", active_fraction=0.1, interval=1, hold_steps=0, probe_share=0.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = "a device keeps its text and the cloud the frozen blocks of a model".split()  # noqa: SIM905
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=40)) for _ in range(60)]
    path.write_text("\n\n".join(lines) + "\n")
    return path


def _case(**changes: object) -> Case:
    case = Case(data="shakespeare", choice="controller", steps=4, seed=0, policy=_POLICY, documents=40)
    return replace(case, **changes)  # type: ignore[arg-type]


def _run(text: Path, case: Case) -> Outcome:
    return run(case, training_of(case), text, "default", held_out_rows=4, evaluations=2)


@pytest.mark.parametrize("fraction", [0.1, 0.0])
def test_what_is_counted_is_what_would_cross(text: Path, fraction: float) -> None:
    case = _case(policy=replace(_POLICY, active_fraction=fraction), codecs=("none", "none"))
    counted = _run(text, case)
    assert counted.coded_bytes == BYTES_A_VALUE * (counted.spent.values - counted.spent.given_values)
    assert counted.test == _run(text, replace(case, codecs=None)).test


def test_killed_modules_that_are_merged_train_as_those_that_are_kept(text: Path) -> None:
    merged, kept = (_run(text, _case(policy=replace(_POLICY, killed=killed))) for killed in ("merge", "keep"))
    assert merged.decisions == kept.decisions
    assert merged.test == pytest.approx(kept.test, rel=1e-4)
    assert merged.spent.module_values < kept.spent.module_values
    dropped = _run(text, _case(policy=replace(_POLICY, killed="drop")))
    assert dropped.test > merged.test


def test_a_step_of_the_default_model_costs_what_the_arithmetic_says() -> None:
    case = _case()
    training, config = training_of(case), open_model("default").config
    modules = module_costs(config, training)
    prices, spent = Costs(config, training, modules), Spent()
    prices.add(spent, set(modules), ())
    tokens, hidden, kv, mlp = 4 * 64, 256, 128, 672
    site = [(hidden, hidden + 2 * kv), (hidden, hidden), (hidden, 2 * mlp), (mlp, hidden)]
    assert spent.values == tokens * (4 * hidden + 5 * sum(2 * (d_in + d_out) for d_in, d_out in site))
    linear = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp
    widths = 9 * hidden + 2 * kv + 3 * mlp
    assert spent.module_flops == tokens * 6 * 6 * 8 * widths
    assert spent.front_flops == tokens * (4 * linear + 12 * 64 * hidden)
    assert spent.head_flops == tokens * 4 * hidden * 4096
    nothing = Spent()
    prices.add(nothing, (), ())
    assert nothing.values == tokens * 2 * hidden
    kept = Spent()
    prices.add(kept, (), (), KEEP)
    assert kept.module_values == spent.module_values / 2


@pytest.mark.parametrize("choice", ["controller", "fixed", "random"])
def test_every_choice_keeps_the_same_budget(choice: str) -> None:
    costs = module_costs(open_model("default").config, training_of(_case()))
    policy = KillPolicy(warmup_steps=5, anneal_steps=10, active_fraction=0.2)
    chosen = chooser(choice, costs, policy, 100, seed=0)
    spent = allowed = 0.0
    seen = set()
    for step in range(100):
        active = chosen.decide(step).active
        spent, allowed = spent + chosen.cost(active), allowed + chosen.budget(step)  # type: ignore[attr-defined]
        assert spent <= allowed + 1e-6
        chosen.observe(step, 3.0 - 0.01 * step, {name: 1.0 + hash((step, name)) % 7 for name in active})
        if step > 20:
            seen.add(active)
    assert (len(seen) == 1) == (choice == "fixed")
    named = chooser("named", costs, policy, 100, 0, ("layers.0.", "v_proj")).decide(0)
    assert len(named.active) == 7 + 5


def _outcome(
    choice: str, test: float, values: float, seed: int = 0, data: str = "e2e", fraction: float = 0.1
) -> Outcome:
    policy = KillPolicy(active_fraction=fraction)
    case = Case(data=data, choice=choice, steps=10, seed=seed, policy=policy)
    spent = Spent(u_shape_values=values, module_flops=values, head_flops=100.0)
    return Outcome(case, test, test, spent, 0, [Point(0, 0.0, 0.0, 0.0, 900.0)], [])


def test_savings_count_where_the_perplexity_is_kept() -> None:
    runs = [
        _outcome("all", 10.0, 100.0),
        _outcome("all", 20.0, 100.0, seed=1),
        _outcome("controller", 10.0, 20.0),
        _outcome("controller", 20.2, 40.0, seed=1),
        _outcome("controller", 12.0, 10.0, fraction=0.01),
        _outcome("fixed", 10.0, 5.0),
    ]
    rows = {row["name"]: row for row in summarise(runs, 10)}
    assert rows["controller, 10 %"]["perplexity_ratio"] == pytest.approx(1.01**0.5)
    assert rows["controller, 10 %"]["communication_reduction"] == pytest.approx(0.7)
    assert rows["controller, 10 %"]["compute_reduction"] == pytest.approx(0.35)
    assert rows["controller, 10 %"]["compute_reduction_of_modules"] == pytest.approx(0.7)
    figures = keys(list(rows.values()))
    assert figures["communication_reduction"] == pytest.approx(0.7)
    assert figures["communication_reduction_with_codecs"] is None
    runs += [_outcome("all", 10.0, 100.0, data="shakespeare"), _outcome("controller", 12.0, 9.0, data="shakespeare")]
    assert keys(summarise(runs, 10))["communication_reduction"] is None


def test_a_device_has_documents_from_the_whole_file(text: Path) -> None:
    documents = [Document(str(n)) for n in range(10)]
    assert [document.text for document in spread(documents, 3)] == ["0", "3", "6"]
    assert spread(documents, 20) == documents
    texts = Texts(text, training_of(_case()), "default", 1000)
    rows = {tuple(row.tolist()) for row in texts.train.input_ids}
    assert not rows & {tuple(row.tolist()) for row in (*texts.validation.input_ids, *texts.test.input_ids)}


def test_every_budget_has_its_runs_and_codecs_come_on_top() -> None:
    cases = cases_of(["e2e"], 100, 1.5, 2, [0.1, 0.2], ["controller", "random"], _POLICY, _case(), True)
    assert len(cases) == len(set(cases)) == 2 * (1 + 2 * 2 + 2)
    assert {case.steps for case in cases} == {100, 150}
    only = cases_of(["e2e"], 100, 1.5, 1, [0.1], ["controller"], _POLICY, _case(), False, ["layers.0.,v_proj"])
    assert [case.named for case in only if case.choice == "named"] == [("layers.0.", "v_proj")]


@pytest.mark.long
@RUNS_APART
def test_the_command_runs_and_writes_its_figures_and_its_picture(text: Path, tmp_path: Path, apart: bool) -> None:
    out, picture = tmp_path / "dlora.json", tmp_path / "map.png"
    options = ["--quick", "--data", "shakespeare", "--shakespeare", str(text)]
    options += ["--workers", "1", "--choices", "controller", "--json", str(out), "--heat-map", str(picture)]
    options += ["--link", "", "--pretrain-steps", "30", "--pretrain-text", str(text)]
    status, printed, err = run_benchmark_of_runs("dlora", *options, apart=apart)
    assert status == 0, printed + err
    result = json.loads(out.read_text())
    assert set(keys([])) <= result.keys()
    first = result["rows"][0]
    assert first["name"] == "all active"
    assert first["start"] < 0.5 * _run(text, _case(steps=1)).points[0].perplexity
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_link_that_cannot_be_is_refused_before_any_run(text: Path) -> None:
    options = ["--data", "shakespeare", "--shakespeare", str(text), "--link", "soon"]
    status, out, _ = run_benchmark("dlora", *options)
    assert status == 1
    assert out.startswith("error: ")
    assert "soon" in out


def test_a_missing_file_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    status, out, _ = run_benchmark("dlora", "--data", "e2e", "--e2e", str(tmp_path / "none.csv"))
    assert status == 1
    assert out.strip().startswith("error: no e2e data at")


@pytest.mark.parametrize("cut", [0, 1])
def test_the_bytes_counted_after_all_savings_are_those_that_cross(tmp_path: Path, cut: int) -> None:
    folder = make_model(tmp_path, "llama", layers=3)
    training = CONFIG.but(cut_layer=cut, steps=1)
    made = padded_text(4)
    rows = batch_indices(len(made), training.batch_size, 0, training.seed)
    of_use = int(seen_positions(made.labels[rows][:, 1:] != IGNORE).sum())
    layout = layout_of(open_model(str(folder)).config, training)
    found = bytes.savings(layout, training.batch_size * training.text.sequence_length, of_use)
    sizes = list(found.values())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == bytes.measured(str(folder), training, made)
