"""`isthmus-client generate`: an answer of a served model, whose prompt and text stay on this device."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import grpc
import typer

from isthmus.client.identity import Identity
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.split.errors import BadRequest, NotEnrolled
from isthmus.split.printable import log_to_stderr
from isthmus.split.terminal import (
    AnswerOptions,
    AnswerStats,
    ExitThreshold,
    Json,
    MaxTokens,
    Seed,
    Stats,
    Stop,
    Temperature,
    TopK,
    TopP,
    interruptible,
    show_answer,
)
from isthmus.split.tls import channel, check_name, error_of, join_address, split_address

if TYPE_CHECKING:  # torch, which --help does not need
    from isthmus.split.inference.exits import ExitRule
    from isthmus.split.inference.serving import ServingConfig
    from isthmus.split.inference.text_generator import TextGenerator
    from isthmus.split.lora.served import LoraAdapter
    from isthmus.split.models.source import TensorSource
    from isthmus.split.runtime.choose import RuntimeChoice

_TIMEOUT = 60.0  # seconds
_LARGE = 16 * 2**20  # bytes of weights that take so long to fetch that progress is shown


Prompt = Annotated[
    str,
    typer.Option(
        help="What the answer continues; it stays on this device. `-`: from standard input, as a command line can be "
        "read by the machine's other users."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="As it or one of its adapters is served, or the job's id; by default the only one that this device may "
        "use. NAME=FOLDER: use this copy of it, instead of fetching embedding, head and first blocks."
    ),
]
StateDir = Annotated[
    Path, typer.Option(help="Where this device keeps its key and certificate.", envvar="ISTHMUS_STATE_DIR")
]
Coordinator = Annotated[
    str, typer.Option(help="HOST:PORT, if not the one of the enrolment.", envvar="ISTHMUS_COORDINATOR")
]
Blocks = Annotated[
    int | None,
    typer.Option(
        help="Compute so many of the first blocks here: 0, or up to where a span ends. By default the first span if "
        "this device holds it, else 0."
    ),
]
Runtime = Annotated[str, typer.Option(help="auto, torch or onnxruntime; by default as the model is served.")]
Weights = Annotated[str, typer.Option(help="float32, int8 or int4; by default as the model is served.")]
Device = Annotated[str, typer.Option(help="torch device: auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[int, typer.Option(help="Processor threads for computing; 0: all cores.", min=0)]
Draft = Annotated[
    str,
    typer.Option(
        help="Who guesses at tokens that the chain then verifies together: none, lookup (the text so far), early (the "
        "blocks that are here), the folder of a small model with the same tokenizer; auto: early, or lookup with no "
        "blocks here. Answers stay the same."
    ),
]


def generate(
    prompt: Prompt,
    model: Model = "",
    state_dir: StateDir = Path("~/.isthmus/device"),
    coordinator: Coordinator = "",
    blocks: Blocks = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    runtime: Runtime = "",
    weights: Weights = "",
    device: Device = "auto",
    threads: Threads = 0,
    draft: Draft = "auto",
    exit_threshold: ExitThreshold = "",
    stats: Stats = False,
    json_output: Json = False,
) -> None:
    """Continue a text with a served model; prompt and answer stay on this device.

    Embedding, head and sampling are here, and so are the first --blocks blocks;
    hidden states leave. `isthmus serve --users NAME` says who may do this;
    the devices that hold the model's first blocks may in any case.

    Example: isthmus-client generate --prompt "Shall I compare thee" --max-tokens 40 --temperature 0 --stats
    """
    log_to_stderr("isthmus-client: %(message)s", logging.WARNING)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    asking = AnswerOptions(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    with interruptible():
        from isthmus.split.runtime.choose import RuntimeChoice, check_runtime

        identity = _identity(state_dir.expanduser(), coordinator)
        _use_threads(threads)
        exits = _exit_rule(exit_threshold, draft)
        check_runtime(runtime or "auto", weights or "float32")  # before anything is fetched
        name, equals, folder = model.partition("=")
        found = find(identity, name, blocks, Path(folder).expanduser() if equals else None)
        if exits is not None and not found.blocks:
            raise BadRequest("--exit-threshold: no block is on this device; see --blocks")
        served = found.serving.chain
        choice = RuntimeChoice(runtime or served.runtime, weights or served.weights, device, identity.state / "onnx")

        async def work() -> None:
            stat = AnswerStats()
            async with start(identity, found, choice, draft=draft, exits=exits) as engine:
                texts = engine.answer(engine.tokenizer.encode(prompt), asking, stat, continues=True)
                await show_answer(texts, stat, stats=stats, as_json=json_output)

        asyncio.run(work())


def _use_threads(threads: int) -> None:
    """Sets torch's number of threads for computing; 0 leaves the choice to torch."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def _exit_rule(exit_threshold: str, draft: str) -> ExitRule | None:
    from isthmus.split.inference.exits import parse_exit

    exits = parse_exit(exit_threshold)
    if exits is not None and draft not in ("auto", "none"):
        raise BadRequest("--exit-threshold and --draft exclude each other")
    return exits


@dataclass(frozen=True)
class Found:
    """A served model that this device may use, and the device's part of it."""

    job: str
    gateway: str  # HOST:PORT
    serving: ServingConfig
    blocks: int  # number of blocks that are computed here
    source: TensorSource
    digest: str
    adapters: list[LoraAdapter]
    adapter: int  # which of the adapters was asked for, as in Row


def find(identity: Identity, name: str = "", blocks: int | None = None, folder: Path | None = None) -> Found:
    """Asks the coordinator for the model, and for those of its weights that are not here yet.

    name: the name of the model or one of its adapters, or the job's id; empty for the only model.
    blocks: number of blocks to compute here, as in `blocks_of`.
    folder: a copy of the model; None to fetch the weights.

    Raises BadRequest, NotFound, NotAllowed, WrongState or BadModelFolder for what cannot be used, and LinkLost.
    """
    from isthmus.client.runner import stage_address
    from isthmus.client.weights import device_source
    from isthmus.split.inference.serving import ServingConfig
    from isthmus.split.inference.using import blocks_of
    from isthmus.split.lora.served import LoraAdapter

    if folder is not None and not folder.is_dir():
        raise BadRequest(f"--model {name}: there is no folder {folder}")
    with channel(identity.address, identity.credentials) as control:
        stub = CoordinatorStub(control)
        try:
            served = stub.FindServed(pb.FindServedRequest(name=name), timeout=_TIMEOUT)
        except grpc.RpcError as error:
            raise error_of(error, identity.address) from None
        check_name(served.job, "a job's id")
        serving = ServingConfig.from_json(served.serving)
        own = blocks_of(serving, identity.name, blocks)
        source, loras, digest = device_source(
            stub,
            identity.address,
            served.job,
            identity.state,
            folder,
            _tell_download(),
            adapters=serving.names[1:],
            user_blocks=own,
        )
    gateway = join_address(*stage_address(served.gateway, identity.host))
    adapters = [LoraAdapter(one, lora, source.config) for one, lora in zip(serving.names[1:], loras, strict=True)]
    asked_for = serving.names.index(name) if name in serving.names else 0
    return Found(served.job, gateway, serving, own, source, digest, adapters, asked_for)


@asynccontextmanager
async def start(
    identity: Identity, found: Found, choice: RuntimeChoice, *, draft: str, exits: ExitRule | None = None
) -> AsyncIterator[TextGenerator]:
    """An engine that is at work, with a stream to the gateway. Raises what the first attempt to reach it ends with.

    draft, exits: as in `user_engine`.
    """
    from isthmus.split.inference.text_generator import TextGenerator
    from isthmus.split.inference.using import Using, user_engine
    from isthmus.split.models.source import end_tokens

    engine, far = await user_engine(
        found.source, found.serving, found.blocks, choice, adapters=found.adapters, draft=draft, exits=exits
    )
    tokenizer = found.source.tokenizer()
    using = Using(
        found.gateway,
        identity.credentials,
        far,
        found.serving,
        job=found.job,
        digest=found.digest,
        hidden_size=found.source.config.hidden_size,
    )
    async with using, engine:
        yield TextGenerator(engine, tokenizer, end_tokens(found.source, tokenizer), found.adapter)


def _identity(state: Path, coordinator: str) -> Identity:
    identity = Identity.open(state)
    if identity is None:
        raise NotEnrolled(
            f"there is no device in {state}: name its folder with --state-dir, or enrol it with `isthmus-client run`"
        )
    if not coordinator:
        return identity
    host, port = split_address(coordinator)
    return replace(identity, host=host, port=port)  # not saved, for a daemon may use the folder too


def _tell_download() -> Callable[[int, int], None]:
    last = 0

    def tell(here: int, total: int) -> None:
        nonlocal last
        tenth = 10 * here // max(1, total)
        if tenth > last and total > _LARGE:
            last = tenth
            typer.echo(f"isthmus-client: {10 * tenth} % of {total / 2**20:.1f} MiB of weights are here", err=True)

    return tell
