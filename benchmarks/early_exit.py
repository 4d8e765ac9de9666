"""Early exit: how many tokens need not wait for the link at a threshold, and how often the full model would agree.

The default model, cut after its first blocks; prompts are real text that it has not been trained on. For every
threshold the answers are generated in this process with the first blocks' opinion where these are sure; then the full
model (plain transformers) reads each answer, and says at every place which token it would have taken there.

    share        of tokens that did not wait for the blocks behind the cut
    agreement    of all tokens, those that the full model would have taken after the same text
    of early     the same, of the tokens that came early alone
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.harness import JsonFile, begin, command, console, table, write_json
from isthmus.split.data.stdlib_text import PRIVATE_MODULES, private_text
from isthmus.split.errors import BadRequest
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.exits import ExitRule, parse_exit
from isthmus.split.inference.local import local_engine
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.models.source import ModelFolder, open_model
from isthmus.split.runtime.choose import TORCH, RuntimeChoice

PROMPT, ANSWER = 96, 96  # tokens
THRESHOLDS = ("0.95", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1", "0")
_GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Point:
    """Shares of tokens, first tokens of answers left out: these come from the prompt."""

    share: float
    agreement: float
    of_early: float


def prompts_of(text: str, source: ModelFolder, count: int, length: int = PROMPT) -> list[tuple[int, ...]]:
    """Passages from random places of a text."""
    tokenizer, chance = source.tokenizer(), random.Random(0)
    size = 8 * length  # characters: enough for so many tokens
    starts = [chance.randrange(max(1, len(text) - size)) for _ in range(count)]
    found = [tuple(tokenizer.encode(text[start : start + size], verbose=False)[:length]) for start in starts]
    if any(len(prompt) < 2 for prompt in found):
        raise BadRequest("the text is too short for prompts")
    return found


async def answers(source: ModelFolder, cut: int, rule: ExitRule, prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Of each prompt the answer."""
    engine = await local_engine(
        source,
        cuts=(cut,),
        context=PROMPT + ANSWER,
        sequences=8,
        queue=len(prompts),
        choice=RuntimeChoice(TORCH),
        exits=rule,
    )

    async def ask(running: Engine, prompt: tuple[int, ...]) -> list[int]:
        return [token.id async for token in running.submit(Request(prompt, ANSWER, _GREEDY))]

    async with engine:
        return await asyncio.gather(*(ask(engine, prompt) for prompt in prompts))


@torch.inference_mode()
def opinions(model: Any, cut: int, prompt: Sequence[int], answer: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (answer, vocabulary) from which each token of the answer comes: after the cut, and after all blocks."""
    output = model(torch.tensor([[*prompt, *answer]]), output_hidden_states=True)
    places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    early = model.lm_head(model.model.norm(output.hidden_states[cut][0, places]))
    return early, output.logits[0, places]


def point(
    model: Any, cut: int, rule: ExitRule, prompts: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> Point:
    tokens = right = came_early = right_early = 0
    for prompt, answer in zip(prompts, found, strict=True):
        early, full = opinions(model, cut, prompt, answer)
        agrees = (full.argmax(-1) == torch.tensor(answer))[1:]
        sure = torch.tensor(rule.sure(early))[1:]
        tokens += len(agrees)
        right += int(agrees.sum())
        came_early += int(sure.sum())
        right_early += int((agrees & sure).sum())
    return Point(came_early / tokens, right / tokens, right_early / came_early if came_early else 1.0)


def main(
    cuts: Annotated[str, typer.Option(help="Numbers of blocks before the link, with commas.")] = "1,2,3",
    thresholds: Annotated[str, typer.Option(help="As for --exit-threshold, with commas.")] = ",".join(THRESHOLDS),
    prompts: Annotated[int, typer.Option(help="Passages that are continued.", min=1)] = 24,
    text: Annotated[
        Path | None, typer.Option(help="Of which; by default source code of the standard library.", dir_okay=False)
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Agreement with the full model against the share of tokens that never waited for the link.

    Example: python -m benchmarks.early_exit --cuts 2 --thresholds 0.9,0.5,entropy:1 --json early_exit.json
    """
    source = open_model("default")
    passages = prompts_of(private_text(PRIVATE_MODULES) if text is None else text.read_text(), source, prompts)
    whole = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    result = begin(text="private" if text is None else text.name, points=[])
    for cut in map(int, cuts.split(",")):
        rows = []
        for name in thresholds.split(","):
            rule = parse_exit(name)
            if rule is None:
                raise BadRequest("--thresholds: one of them is empty")
            with console.status(f"{cut} blocks, {name}"):
                found = asyncio.run(answers(source, cut, rule, passages))
                one = point(whole, cut, rule, passages, found)
            result["points"].append({"cut": cut, "threshold": name, **vars(one)})
            rows.append((name, f"{one.share:.1%}", f"{one.agreement:.1%}", f"{one.of_early:.1%}"))
        title = f"cut after {cut} of {source.config.num_hidden_layers} blocks"
        console.print(table(title, ("threshold", "share", "agreement", "of early"), rows))
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
