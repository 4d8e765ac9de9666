"""What the commands share in a terminal: printing, the options of an answer, and how an answer is shown.

This module does not import torch, so `--help` and commands that only talk to a server start quickly.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from isthmus.split.printable import printable


class PlainConsole(Console):
    """Shows every text as it is: no markup, no emoji codes, and each on one bounded line, whoever has written it."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


console = PlainConsole()

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
MaxTokens = Annotated[int, typer.Option(help="Of one answer, at most.", min=1)]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the fewest likeliest tokens that have this share.")]
TopK = Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0: all.")]
Seed = Annotated[int | None, typer.Option(help="The same draws again.")]
Stats = Annotated[bool, typer.Option("--stats", help="Say afterwards what the answer took, by hop.")]
EXIT_THRESHOLD = (
    "Tokens of which the first blocks are so sure (0 to 1, or entropy:NATS) do not wait for the others: faster, not "
    "the same answers. Off by default."
)
ExitThreshold = Annotated[str, typer.Option(help=EXIT_THRESHOLD)]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")]


def print_json(value: Any) -> None:
    """Print a value as one line of JSON on standard output."""
    typer.echo(json.dumps(value))


def human_bytes(count: float) -> str:
    """Format a number of bytes: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class AnswerOptions:
    """What a command's user chooses about an answer.

    max_tokens: the most tokens of the answer; None: as many as the context has room for. temperature, top_p, top_k and
    seed: as in `isthmus.split.inference.request.Sampling`. stop: texts that end the answer.
    """

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...] = ()


@dataclass
class AnswerStats:
    """Figures of one answer: those of `isthmus.split.inference.request.Timing`, and of each hop.

    first_token, total: seconds since the question. hops: as in `isthmus.split.inference.engine.Engine.stats`.
    """

    first_token: float = 0.0
    total: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    exited: int = 0
    hops: list[dict[str, Any]] = field(default_factory=list)


def hops_between(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Subtract what each hop's figures were `before` from what they are `after`; hops without a batch are left out."""
    known = {(hop["span"], hop["holder"]): hop for hop in before}
    hops = []
    for hop in after:
        old = known.get((hop["span"], hop["holder"]), {})
        if old.get("batches", 0) > hop["batches"]:  # it has come anew since, and counts from 0
            old = {}
        sums = {name: value - old.get(name, 0) for name, value in hop.items() if isinstance(value, int | float)}
        hops.append({**hop, **sums, "median_ms_beyond_computing": hop["median_ms_beyond_computing"]})
    return [hop for hop in hops if hop["batches"]]


def show_stat(stat: AnswerStats) -> None:
    """Print a line about the tokens and a table of what each hop took."""
    from rich.table import Table

    after = max(stat.total - stat.first_token, 1e-9)
    rate = f", {(stat.tokens - 1) / after:.1f} tokens a second after it" if stat.tokens > 1 else ""
    console.print(
        f"{stat.prompt_tokens} tokens of prompt, {stat.tokens} of answer; first after {stat.first_token:.2f} s{rate}"
    )
    if stat.drafted or stat.exited:
        console.print(
            f"{stat.rounds} times through the whole chain: {stat.accepted} of {stat.drafted} drafts were right, "
            f"{stat.exited} tokens came early"
        )
    table = Table("blocks", "holder", "batches", "computing", "encoding", "waiting", "sent", "received")
    for hop in stat.hops:
        table.add_row(
            hop["span"],
            hop["holder"],
            str(hop["batches"]),
            f"{hop['computing']:.2f} s",
            f"{hop['coding']:.2f} s",
            f"{max(0.0, hop['seconds'] - hop['computing'] - hop['coding']):.2f} s",
            human_bytes(hop["sent"]),
            human_bytes(hop["received"]),
        )
    console.print(table)


def show_text(text: str) -> None:
    """Of an answer, which may have lines. In a pipe or a file it is what the model wrote, to the byte."""
    typer.echo(printable(text, None, keep="\n\t") if sys.stdout.isatty() else text, nl=False)


async def show_answer(texts: AsyncIterator[str], stat: AnswerStats, *, stats: bool, as_json: bool) -> None:
    """Print an answer: its text as it comes, followed by its figures if `stats`; or both at its end, as JSON."""
    whole = ""
    async for text in texts:
        whole += text
        if not as_json:
            show_text(text)
    if as_json:
        print_json({"text": whole, "stats": vars(stat)})
        return
    typer.echo()
    if stats:
        show_stat(stat)


@contextmanager
def interruptible() -> Iterator[None]:
    """End the command with exit status 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(130) from None
