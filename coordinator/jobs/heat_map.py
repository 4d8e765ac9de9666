"""A picture of Kill and Revive, as PNG: which LoRA modules trained when."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.split.errors import BadRequest

Decisions = Sequence[tuple[int, Collection[str]]]
"""Steps in rising order, each with the modules that train from there on until the next."""

Scores = Mapping[int, Mapping[str, float]]
"""Responsiveness by step and module, at any steps."""

_COLUMNS = 400  # most columns of the picture: in longer jobs several steps share one
_DOTS_AN_INCH = 100


def last_of_each(decisions: Decisions) -> Decisions:
    """The decisions in rising order, one for each step: the last, for a device that restarts decides anew."""
    return sorted(dict(decisions).items())


def activity(modules: Sequence[str], decisions: Decisions, steps: int, columns: int = _COLUMNS) -> NDArray[np.float64]:
    """How much each module trained, (modules, columns): the share of a column's steps in which it did.

    Columns are runs of steps of equal length, of which the last may be shorter; fewer steps than columns have a column
    each. Before the first decision nothing trains.
    """
    width = -(-steps // max(1, min(columns, steps)))
    row = {name: index for index, name in enumerate(modules)}
    by_step = np.zeros((len(modules), steps))
    ends = [step for step, _ in decisions[1:]] + [steps]
    for (step, active), end in zip(decisions, ends, strict=True):
        by_step[[row[name] for name in active if name in row], step:end] = 1.0
    starts = range(0, steps, width)
    return np.stack([by_step[:, start : start + width].mean(axis=1) for start in starts], axis=1)


def responsiveness(modules: Sequence[str], scores: Scores, steps: int, columns: int) -> NDArray[np.float64]:
    """Scores of the modules, (modules, columns), from 0 to 1.

    They are the last ones known at a column's end, over the largest of that column.
    """
    width = -(-steps // max(1, min(columns, steps)))
    known = sorted(scores)
    result = np.zeros((len(modules), -(-steps // width)))
    for column in range(result.shape[1]):
        before = [step for step in known if step < (column + 1) * width]
        if before:
            here = scores[before[-1]]
            result[:, column] = [max(0.0, here.get(name, 0.0)) for name in modules]
    largest = result.max(axis=0, initial=0.0)
    return result / np.where(largest > 0, largest, 1.0)


def heat_map(
    path: Path, modules: Sequence[str], decisions: Decisions, steps: int, scores: Scores | None = None
) -> None:
    """Writes the picture: a row for each module, in the order given, and time from left to right.

    decisions: what trained when.
    steps: the job's number of steps.
    scores: with these, a module that trained is the darker the more responsive it was; else all are equally dark.

    White is what was killed. Raises BadRequest where there is nothing to draw.
    """
    if not modules or steps < 1:
        raise BadRequest("no LoRA modules or no steps to draw a heat map of: draw it once the job has begun")
    from matplotlib.figure import Figure  # takes half a second, which only those who draw pay for

    matrix = activity(modules, decisions, steps)
    if scores:
        matrix = matrix * (0.25 + 0.75 * responsiveness(modules, scores, steps, _COLUMNS))
    height = max(2.0, 0.18 * len(modules) + 1.2)
    figure = Figure(figsize=(11, height), dpi=_DOTS_AN_INCH, layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(
        matrix,
        aspect="auto",
        interpolation="nearest",
        cmap="Blues",
        vmin=0.0,
        vmax=1.0,
        extent=(0.0, float(steps), len(modules) - 0.5, -0.5),
    )
    axis.set_yticks(range(len(modules)), list(modules), fontsize=6)
    axis.set_xlabel("step")
    label = "trained, by responsiveness" if scores else "share of steps in which it trained"
    figure.colorbar(image, ax=axis, label=label, fraction=0.03)
    share = activity(modules, decisions, steps, steps).mean()
    axis.set_title(f"Kill and Revive: {100 * share:.1f} % of modules and steps trained", fontsize=9)
    figure.savefig(path, format="png")
