"""Decoding: tokens a second of transformers, of llama.cpp (where its binaries are given), and of Isthmus in one process
and over several, on loopback and over emulated links.

A Llama of 97.5 million random parameters (or any model). Greedy, 16 tokens of prompt and 64 of answer. All processes
share one machine. What is compared takes turns, `--rounds` times, and a ratio is the median of the rounds'.

    one process        embedding, blocks and head in this process
    two, three         the gateway with embedding and head, and holders of half or a third of the blocks each: device
                       daemons and an actor, over gRPC with mutual TLS
    drafts             of the default model: a device that is the user itself, over the last of the links (drafting.py)
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks import drafting
from benchmarks.harness import (
    JsonFile,
    begin,
    bench_cluster,
    command,
    console,
    links_in,
    report_keys,
    table,
    write_json,
)
from benchmarks.llama_cpp import bench, rpc_servers, write_gguf
from benchmarks.random_llama import model_named
from benchmarks.serving import Served, served, wait_measured
from isthmus.split.inference.local import local_engine
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.models.source import ModelFolder, open_model
from isthmus.split.runtime.choose import AUTO, TORCH, RuntimeChoice

PROMPT, ANSWER, LONG = 16, 64, 128  # tokens
LINKS = ("1gbit,1ms", "20mbit,40ms")
_GREEDY = Sampling(temperature=0)


def prompt_of(length: int, number: int, vocabulary: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(1, vocabulary, (length,), generator=generator).tolist())


def of_transformers(folder: Path, vocabulary: int) -> Callable[[], dict[str, float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt_of(PROMPT, 0, vocabulary)])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def measure() -> dict[str, float]:
        seconds = {}
        for tokens in (1, ANSWER + 1):
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=tokens, **options)
            seconds[tokens] = time.perf_counter() - start
        return {"decode": ANSWER / (seconds[ANSWER + 1] - seconds[1]), "first_token_ms": 1000 * seconds[1]}

    return measure


def of_one_process(
    folder: ModelFolder, choice: RuntimeChoice, requests: tuple[int, ...]
) -> Callable[[], dict[str, float]]:
    """decode: of one answer after its first token; by number of requests: of all answers, prompts included."""
    vocabulary = folder.config.vocab_size

    async def work() -> dict[str, float]:
        context = PROMPT + LONG + ANSWER
        async with await local_engine(folder, context=context, sequences=16, choice=choice) as engine:

            async def ask(length: int, number: int, tokens: int) -> Any:
                answer = engine.submit(Request(prompt_of(length, number, vocabulary), tokens, _GREEDY))
                async for _ in answer:
                    pass
                return answer.timing

            await ask(PROMPT, 99, ANSWER)  # everything has been touched once
            alone = await ask(PROMPT, 0, ANSWER)
            figures = {
                "decode": (alone.tokens - 1) / (alone.total - alone.first_token),
                "first_token_ms": 1000 * alone.first_token,
                "prefill": LONG / (await ask(LONG, 1, 1)).total,
            }
            for count in requests:
                start = time.perf_counter()
                await asyncio.gather(*(ask(PROMPT, 100 * count + number, ANSWER) for number in range(count)))
                figures[f"requests_{count}"] = count * ANSWER / (time.perf_counter() - start)
            return figures

    return lambda: asyncio.run(work())


def of_served(model: Served, vocabulary: int, number: int, requests: tuple[int, ...]) -> dict[str, float]:
    def prompt(one: int) -> list[int]:
        return list(prompt_of(PROMPT, one, vocabulary))

    model.ask_all([prompt(number)], ANSWER)
    _, first = model.ask_all([prompt(number + 1)], 1)
    (alone,), whole = model.ask_all([prompt(number + 2)], ANSWER + 1)
    beyond = [hop["median_ms_beyond_computing"] for hop in model.stats()["hops"]]
    figures = {
        "decode": (alone.tokens - 1) / (whole - first),
        "first_token_ms": 1000 * first,
        "hop_overhead_ms": max(beyond),
    }
    for count in requests:
        answers, seconds = model.ask_all([prompt(number + 1000 * count + one) for one in range(count)], ANSWER)
        figures[f"requests_{count}"] = sum(one.tokens for one in answers) / seconds
    return figures


def main(
    model: Annotated[
        str,
        typer.Option(help="large, billion (97.5 or 1000 million random parameters), default, or a folder."),
    ] = "large",
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Folder with llama-bench and ggml-rpc-server (scripts/build_llama_cpp.sh).")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of everything that is compared.", min=1)] = 3,
    runtime: Annotated[str, typer.Option(help="auto, torch or onnxruntime.")] = AUTO,
    links: Annotated[str, typer.Option(help="RATE,ROUND_TRIP;... or empty.")] = ";".join(LINKS),
    json_file: JsonFile = None,
) -> None:
    """Tokens per second of decoding, in one process and over several.

    Example: python -m benchmarks.generate --llama-cpp llama/build/bin --json generate.json
    """
    specs = links_in(links)
    result = begin(model=model)
    measured: dict[str, list[dict[str, float]]] = {}

    def note(name: str, measure: Callable[[], dict[str, float]]) -> None:
        with console.status(name):
            measured.setdefault(name, []).append(measure())

    with bench_cluster() as cluster:
        folder = cluster.folder
        source = open_model(model_named(model, folder))
        vocabulary, layers = source.config.vocab_size, source.config.num_hidden_layers
        cache, threads = folder / "onnx", os.cpu_count() or 1
        choices = {"one process": RuntimeChoice(runtime, cache=cache)}
        if runtime != TORCH:
            choices |= {
                f"one process, {weights}": RuntimeChoice(runtime, weights, cache=cache) for weights in ("int8", "int4")
            }
        gguf = write_gguf(source.path, folder / "model.gguf") if llama_cpp else None
        plain = of_transformers(source.path, vocabulary)
        for _ in range(rounds):
            note("transformers", plain)
            if llama_cpp and gguf:
                note("llama.cpp", lambda: bench(llama_cpp, gguf, threads))
                with rpc_servers(llama_cpp, 2, threads) as servers:
                    note("llama.cpp, two RPC servers", lambda servers=servers: bench(llama_cpp, gguf, threads, servers))
            for name, choice in choices.items():
                note(name, of_one_process(source, choice, (4, 16) if name == "one process" else ()))
        del plain
        devices = {"loopback": "near", **{link: f"far-{number}" for number, link in enumerate(specs)}}
        with console.status("starting the coordinator and its devices"):
            cluster.start_coordinator(stage_ports=2)
            copy = ("--model", f"{source.path.name}={source.path}")  # nothing large goes over a slow link
            cluster.start_device("third", {}, arguments=copy)
            for link, device in devices.items():
                cluster.start_device(device, {}, arguments=copy, link=specs.get(link))
            cluster.wait_connected(["third", *devices.values()])
        with console.status("devices measure themselves"):
            wait_measured(cluster, ["third", *devices.values()])
        half, third = layers // 2, layers // 3
        chains = {f"two, {link}": f"{device}:0-{half},cloud:{half}-{layers}" for link, device in devices.items()}
        chains["three, loopback"] = f"near:0-{third},third:{third}-{2 * third},cloud:{2 * third}-{layers}"
        if specs:
            link, device = list(devices.items())[-1]
            with console.status(f"drafts, {link}"):
                choice = RuntimeChoice(runtime, cache=cache)
                drafted = drafting.measure(cluster, device, choice, rounds)
            measured |= {f"drafts, {link}, {name}": runs for name, runs in drafted.items()}
        for name, stages in chains.items():
            settings = {"sequences": 16, "context": PROMPT + LONG + ANSWER, "runtime": runtime}
            with served(cluster, str(source.path), stages, **settings) as here:
                count = (4, 16) if "loopback" in name else ()
                again = of_one_process(source, choices["one process"], count)
                for number in range(rounds):
                    note(f"one process beside {name}", again)
                    note(name, lambda here=here, number=number, count=count: of_served(here, vocabulary, number, count))
    show(measured)
    result["runs"] = measured
    result |= ratios(measured)
    report_keys(result, KEYS)
    write_json(json_file, result)


KEYS = (
    "one_process_over_transformers",
    "one_process_over_llama_cpp",
    "two_processes_over_one",
    "two_processes_over_one_4_requests",
    "two_processes_over_one_16_requests",
    "two_processes_over_llama_cpp_rpc",
    "hop_overhead_ms",
    "sixteen_requests_over_one",
    "int4_over_float32",
    "int8_over_float32",
    "tokens_per_round_trip",
    "drafts_over_none",
)


def ratios(measured: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians of the rounds' ratios; those that were measured."""

    def over(name: str, other: str, figure: str = "decode", by: str = "decode") -> float | None:
        if figure not in measured.get(name, [{}])[0] or by not in measured.get(other, [{}])[0]:
            return None
        pairs = zip(measured[name], measured[other], strict=False)
        return median(mine[figure] / theirs[by] for mine, theirs in pairs)

    two = "two, loopback"
    found = {
        "one_process_over_transformers": over("one process", "transformers"),
        "one_process_over_llama_cpp": over("one process", "llama.cpp"),
        "two_processes_over_one": over(two, f"one process beside {two}"),
        **{
            f"two_processes_over_one_{count}_requests": over(
                two, f"one process beside {two}", f"requests_{count}", f"requests_{count}"
            )
            for count in (4, 16)
        },
        "two_processes_over_llama_cpp_rpc": over(two, "llama.cpp, two RPC servers"),
        "hop_overhead_ms": median(one["hop_overhead_ms"] for one in measured[two]) if two in measured else None,
        "sixteen_requests_over_one": over("one process", "one process", "requests_16"),
        "int4_over_float32": over("one process, int4", "one process"),
        "int8_over_float32": over("one process, int8", "one process"),
    }
    early = next((name for name in measured if name.endswith("temperature 0, early")), None)
    if early is not None:
        found["tokens_per_round_trip"] = median(run["tokens_per_round_trip"] for run in measured[early])
        found["drafts_over_none"] = over(early, early.replace("early", "none"))
    return {name: value for name, value in found.items() if value is not None}


def show(measured: dict[str, list[dict[str, float]]]) -> None:
    columns = {
        "decode": "tokens/s",
        "requests_4": "4 requests",
        "requests_16": "16 requests",
        "prefill": "prefill/s",
        "first_token_ms": "first token ms",
        "hop_overhead_ms": "beyond computing ms",
        "tokens_per_round_trip": "tokens a round trip",
    }
    rows = []
    for name, runs in measured.items():
        cells = [f"{median(run[key] for run in runs):.1f}" if key in runs[0] else "" for key in columns]
        rows.append((name, *cells))
    console.print(table("medians of the rounds", ("", *columns.values()), rows))


if __name__ == "__main__":
    command(main)
