"""What the runs of the DLoRA benchmark say: each against the run of the same seed in which all modules train."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.dlora.runs import Outcome

BYTES_A_VALUE = 4  # float32
ALL, CONTROLLER = "all", "controller"


def label(outcome: Outcome, baseline_steps: int) -> str:
    """The runs that differ in their seed only share a label."""
    case = outcome.case
    if case.choice == ALL:
        name = "all active" if case.steps == baseline_steps else f"all active, {case.steps} steps"
    elif case.choice == "named":
        name = f"only {', '.join(case.named)}"
    else:
        name = f"{case.choice}, {100 * case.policy.active_fraction:g} %"
    return name if case.codecs is None else f"{name}, {case.codecs[0]} and {case.codecs[1]}"


def sent_bytes(outcome: Outcome) -> float:
    """Both ways: float32, or as coded; what the cloud was given of killed modules is never coded."""
    if outcome.case.codecs is None:
        return BYTES_A_VALUE * outcome.spent.values
    return outcome.coded_bytes + BYTES_A_VALUE * outcome.spent.given_values


def summarise(outcomes: Sequence[Outcome], baseline_steps: int) -> list[dict[str, Any]]:
    """A row for each data and label, in the order of the runs; reductions are shares that were saved.

    A run whose partner (all active, the baseline's steps, same data and seed) has not ended yet is left out.
    """
    partners = {
        (each.case.data, each.case.seed): each
        for each in outcomes
        if each.case.choice == ALL and each.case.steps == baseline_steps and each.case.codecs is None
    }
    groups: dict[tuple[str, str], list[tuple[Outcome, Outcome]]] = {}
    for each in outcomes:
        partner = partners.get((each.case.data, each.case.seed))
        if partner is not None:
            groups.setdefault((each.case.data, label(each, baseline_steps)), []).append((each, partner))
    return [_row(data, name, pairs) for (data, name), pairs in groups.items()]


def _row(data: str, name: str, pairs: Sequence[tuple[Outcome, Outcome]]) -> dict[str, Any]:
    first = pairs[0][0]
    ratios = [math.log(each.test / partner.test) for each, partner in pairs]
    return {
        "data": data,
        "name": name,
        "choice": first.case.choice,
        "steps": first.case.steps,
        "codecs": first.case.codecs,
        "seeds": len(pairs),
        "start": first.points[0].perplexity,
        "perplexity": math.exp(fmean(math.log(each.test) for each, _ in pairs)),
        "perplexity_ratio": math.exp(fmean(ratios)),
        "perplexity_ratio_standard_error": stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else None,
        "communication_reduction": _saved((sent_bytes(each), sent_bytes(partner)) for each, partner in pairs),
        "compute_reduction": _saved((each.spent.flops, partner.spent.flops) for each, partner in pairs),
        "compute_reduction_of_modules": _saved(
            (each.spent.module_flops, partner.spent.module_flops) for each, partner in pairs
        ),
        "bytes": fmean(sent_bytes(each) for each, _ in pairs),
        "flops": fmean(each.spent.flops for each, _ in pairs),
    }


def _saved(pairs: Iterable[tuple[float, float]]) -> float:
    return 1 - fmean(mine / partner for mine, partner in pairs)


def best_within(rows: Sequence[Mapping[str, Any]], ratio: float, coded: bool) -> dict[str, Mapping[str, Any]]:
    """By data: the controller's row that saves most bytes and keeps within the ratio of perplexity; absent if none."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["choice"] == CONTROLLER and (row["codecs"] is not None) == coded and row["perplexity_ratio"] <= ratio:
            data = row["data"]
            if data not in best or row["communication_reduction"] > best[data]["communication_reduction"]:
                best[data] = row
    return best


def keys(rows: Sequence[Mapping[str, Any]], ratio: float = 1.01) -> dict[str, float | None]:
    """The figures: the worse of the data sets. None where no budget that was tried keeps within the ratio."""
    data = {row["data"] for row in rows}
    plain, coded = best_within(rows, ratio, False), best_within(rows, ratio, True)

    def worst(best: Mapping[str, Mapping[str, Any]], key: str) -> float | None:
        return min(float(row[key]) for row in best.values()) if data and set(best) == data else None

    ratios = [float(row["perplexity_ratio"]) for row in plain.values()]
    return {
        "communication_reduction": worst(plain, "communication_reduction"),
        "compute_reduction": worst(plain, "compute_reduction"),
        "compute_reduction_of_modules": worst(plain, "compute_reduction_of_modules"),
        "perplexity_ratio": max(ratios) if set(plain) == data and ratios else None,
        "communication_reduction_with_codecs": worst(coded, "communication_reduction"),
    }
