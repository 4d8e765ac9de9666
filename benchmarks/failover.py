"""Deaths in the middle of answers: whether the answers stay the same, and how long they pause.

A coordinator on Ray and device daemons, real processes. Eight streams are answered at the same time; at a random token
whoever computes some of the blocks is killed with SIGKILL: a device, or an actor at the coordinator.

    standby  another holder of the same blocks has been announced before, and takes over
    cold     nobody else has them: the device's daemon is started again (as systemd would), or the gateway makes
             another actor

A pause is the longest time without a new piece of any stream's text, from the question on, in answers with a death.
`undisturbed` has the same of answers without one.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.harness import (
    ONE_THREAD,
    JsonFile,
    begin,
    bench_cluster,
    command,
    console,
    report_keys,
    table,
    write_json,
)
from benchmarks.serving import Served, served, wait_measured, whole_answers
from isthmus.coordinator.emulation.local_cluster import LocalCluster
from isthmus.split.errors import LinkLost
from isthmus.split.models.source import end_tokens, open_model

DEVICES = ("north", "south")
PROMPTS = (
    "First Citizen: Before we proceed",
    "def parse(text):",
    "The",
    "What say you, my lord? The night is long and",
    "import os\nimport",
    "O",
    "class Node(Base):\n    def __init__(self",
    "Enter two gentlemen, with",
)
STANDBY, COLD, UNDISTURBED = "standby", "cold", "undisturbed"


@dataclass(frozen=True)
class Death:
    """One of them. victim: device or actor; replacement: standby or cold. Seconds."""

    victim: str
    replacement: str
    at_token: int  # computed tokens, of all streams, before it
    pause: float
    recovery: float  # from the failure to the first batch computed by the replacement, the longest of the sequences
    tokens_replayed: int
    mismatched: int  # answers


class ServedRun:
    """Answers under one arrangement."""

    def __init__(self, cluster: LocalCluster, model: Served, wanted: list[str], tokens: int, chance: random.Random):
        self._cluster, self._model, self._wanted, self._tokens, self._chance = cluster, model, wanted, tokens, chance

    def undisturbed(self) -> float:
        """The longest pause without a death. Raises LinkLost if an answer is wrong even so."""
        answers, _ = self._model.ask_all(PROMPTS, self._tokens)
        if [one.text for one in answers] != self._wanted:
            raise LinkLost("answers differ from transformers' without any death")
        return max(one.longest_gap for one in answers)

    def death(self, victim: str, replacement: str) -> Death:
        span = 0 if victim == "device" else 1
        before = self._model.stats()
        # Somewhere in the answers, but not so late that they may have ended.
        wait_for = self._chance.randint(1, int(0.7 * len(PROMPTS) * self._tokens))
        at = _tokens(before, span) + wait_for
        killer = _When(lambda: _tokens(self._model.stats(), span) >= at, lambda: self._kill(victim, replacement, span))
        answers, _ = self._model.ask_all(PROMPTS, self._tokens)
        killer.join()
        known = len(_recoveries(before, span))
        recoveries = _recoveries(self._model.stats(), span)[known:]
        if not recoveries:
            raise LinkLost(f"the {victim} was killed, and nobody took over: the answers had ended; raise --tokens")
        return Death(
            victim,
            replacement,
            wait_for,
            max(one.longest_gap for one in answers),
            max(one["seconds"] for one in recoveries),
            sum(one["tokens"] for one in recoveries),
            sum(one.text != text for one, text in zip(answers, self._wanted, strict=True)),
        )

    def _kill(self, victim: str, replacement: str, span: int) -> None:
        holder = _at_work(self._model.stats(), span)
        if victim == "device":
            self._cluster.kill(holder)
            self._cluster.start_device(holder, {}, arguments=ONE_THREAD, enrolled=True)
        else:
            os.kill(int(holder.partition("-")[2]), signal.SIGKILL)

    def settle(self, holders: int, seconds: float = 120.0) -> None:
        """Until every span has so many holders again."""
        settled = _When(lambda: all(len(names) >= holders for names in _holders(self._model.stats()).values()))
        settled.join(seconds)


class _When(threading.Thread):
    """Acts as soon as a condition holds."""

    def __init__(self, condition: Callable[[], bool], act: Callable[[], None] = lambda: None) -> None:
        super().__init__(daemon=True)
        self._condition, self._act = condition, act
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        tick = threading.Event()
        deadline = time.monotonic() + 300
        try:
            while not self._condition():
                if time.monotonic() > deadline:
                    raise LinkLost("waited for 300 s")
                tick.wait(0.01)
            self._act()
        except Exception as error:  # noqa: BLE001  # raised again by who waits
            self._error = error

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self._error is not None:
            raise self._error


def _tokens(stats: dict[str, Any], span: int) -> int:
    """That all holders of a span have computed, those that are here now."""
    names = list(_holders(stats))
    return sum(int(hop["tokens"]) for hop in stats["hops"] if hop["span"] == names[span])


def _holders(stats: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for hop in stats["hops"]:
        found.setdefault(hop["span"], []).append(hop["holder"])
    return found


def _recoveries(stats: dict[str, Any], span: int) -> list[dict[str, Any]]:
    name = list(_holders(stats))[span]
    return [one for one in stats["recoveries"] if one["span"] == name]


def _at_work(stats: dict[str, Any], span: int) -> str:
    return list(_holders(stats).values())[span][0]


def main(
    model: Annotated[str, typer.Option(help="Folder in hub format, or default.")] = "default",
    deaths: Annotated[int, typer.Option(help="Of each kind: device and actor, standby and cold.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Of each answer, at most.", min=8)] = 120,
    seed: Annotated[int, typer.Option(help="Of when the deaths are.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Kill devices and actors at random tokens while eight streams are answered.

    Example: python -m benchmarks.failover --json failover.json
    """
    source = open_model(model)
    tokenizer = source.tokenizer()
    half = source.config.num_hidden_layers // 2
    cut, layers = max(1, half), source.config.num_hidden_layers
    result = begin(model=model, tokens=tokens)
    wanted = whole_answers(source.path, PROMPTS, tokens, tokenizer, end_tokens(source, tokenizer))
    chance = random.Random(seed)
    done: list[Death] = []
    quiet: list[float] = []
    arrangements = {
        STANDBY: (f"{'+'.join(DEVICES)}:0-{cut},cloud+cloud:{cut}-{layers}", 2),
        COLD: (f"{DEVICES[0]}:0-{cut},cloud:{cut}-{layers}", 1),
    }
    with bench_cluster(coordinator_threads=1) as cluster:
        with console.status("starting the coordinator and two devices"):
            cluster.start_coordinator()
            for name in DEVICES:
                cluster.start_device(name, {}, arguments=ONE_THREAD)
            cluster.wait_connected(DEVICES)
            wait_measured(cluster, DEVICES)
        for replacement, (stages, holders) in arrangements.items():
            with served(cluster, model, stages, patience=300) as here:
                run = ServedRun(cluster, here, wanted, tokens, chance)
                run.settle(holders)
                quiet.append(run.undisturbed())
                for number in range(2 * deaths):
                    victim = ("device", "actor")[number % 2]
                    with console.status(f"{replacement}: {victim} {number // 2 + 1} of {deaths}"):
                        done.append(run.death(victim, replacement))
                        run.settle(holders)
    show(done, quiet)
    result |= summarise(done, quiet)
    report_keys(result, ("mismatched_answers", "pause_ms_standby", "pause_ms_cold", "tokens_replayed"), ".0f")
    write_json(json_file, result)


def summarise(deaths: list[Death], quiet: list[float]) -> dict[str, Any]:
    """Pauses are medians; tokens_replayed is the sum over all deaths."""
    pauses = {
        f"pause_ms_{kind}": 1000 * median([one.pause for one in deaths if one.replacement == kind])
        for kind in (STANDBY, COLD)
    }
    return {
        "mismatched_answers": sum(one.mismatched for one in deaths),
        **pauses,
        "pause_ms_undisturbed": 1000 * median(quiet),
        "tokens_replayed": sum(one.tokens_replayed for one in deaths),
        "deaths": [asdict(one) for one in deaths],
    }


def show(deaths: list[Death], quiet: list[float]) -> None:
    rows: list[tuple[object, ...]] = [(UNDISTURBED, "", f"{1000 * median(quiet):.0f}", "", "", "", "")]
    for replacement in (STANDBY, COLD):
        for victim in ("device", "actor"):
            mine = [one for one in deaths if (one.replacement, one.victim) == (replacement, victim)]
            rows.append(
                (
                    f"{replacement}, {victim}",
                    len(mine),
                    f"{1000 * median(one.pause for one in mine):.0f}",
                    f"{1000 * max(one.pause for one in mine):.0f}",
                    f"{1000 * median(one.recovery for one in mine):.0f}",
                    f"{median(one.tokens_replayed for one in mine):.0f}",
                    sum(one.mismatched for one in mine),
                )
            )
    columns = ("death", "times", "pause ms", "longest", "recovery ms", "tokens sent again", "wrong answers")
    console.print(table("eight streams, one death in each run", columns, rows))


if __name__ == "__main__":
    command(main)
