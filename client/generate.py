"""`isthmus-client generate`: an answer of a served model, whose prompt and text stay on this device."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import grpc
import typer

from client.identity import Identity
from protos.v1 import coordinator_pb2 as pb
from protos.v1.coordinator_pb2_grpc import CoordinatorStub
from split.errors import BadRequest, NotEnrolled
from split.terminal import (
    Asking,
    ExitThreshold,
    Json,
    MaxTokens,
    Seed,
    Stat,
    Stats,
    Stop,
    Temperature,
    TopK,
    TopP,
    interruptible,
    show_answer,
)
from split.tls import channel, error_of, split_address

if TYPE_CHECKING:  # torch: not for --help
    from split.generation.asking import Asked
    from split.models.source import TensorSource
    from split.runtime.choose import RuntimeChoice
    from split.serving import ServingConfig

_TIMEOUT = 60.0  # seconds


def generate(
    prompt: Annotated[
        str,
        typer.Option(
            help="What the answer continues; it stays on this device. `-`: from standard input, as a command line can "
            "be read by the machine's other users."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="As it or one of its adapters is served, or the job's id; by default the only one that this device "
            "may use. NAME=FOLDER: use this copy of it, instead of fetching embedding, head and first blocks."
        ),
    ] = "",
    state_dir: Annotated[
        Path, typer.Option(help="Where this device keeps its key and certificate.", envvar="ISTHMUS_STATE_DIR")
    ] = Path("~/.isthmus/device"),
    coordinator: Annotated[
        str, typer.Option(help="HOST:PORT, if not the one of the enrolment.", envvar="ISTHMUS_COORDINATOR")
    ] = "",
    blocks: Annotated[
        int | None,
        typer.Option(
            help="Compute so many of the first blocks here: 0, or up to where a span ends. By default the first span "
            "if this device holds it, else 0."
        ),
    ] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    runtime: Annotated[str, typer.Option(help="auto, torch or onnxruntime; by default as the model is served.")] = "",
    weights: Annotated[str, typer.Option(help="float32, int8 or int4; by default as the model is served.")] = "",
    device: Annotated[str, typer.Option(help="torch device: auto, cpu, cuda, cuda:1, ...")] = "auto",
    threads: Annotated[int, typer.Option(help="Processor threads for computing; 0: all cores.", min=0)] = 0,
    draft: Annotated[
        str,
        typer.Option(
            help="Who guesses at tokens that the chain then verifies together: none, lookup (the text so far), early "
            "(the blocks that are here), the folder of a small model with the same tokenizer; auto: early, or lookup "
            "with no blocks here. Answers stay the same."
        ),
    ] = "auto",
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
    logging.basicConfig(level=logging.WARNING, format="isthmus-client: %(message)s")
    prompt = sys.stdin.read() if prompt == "-" else prompt
    asking = Asking(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    with interruptible():
        import torch

        from split.generation.exits import parse_exit
        from split.runtime.choose import RuntimeChoice

        identity = _identity(state_dir.expanduser(), coordinator)
        if threads:
            torch.set_num_threads(threads)
        name, equals, folder = model.partition("=")
        with channel(identity.address, identity.credentials) as control:
            use = Use(CoordinatorStub(control), identity, name, blocks, Path(folder).expanduser() if equals else None)
        choice = RuntimeChoice(
            runtime or use.serving.runtime, weights or use.serving.weights, device, identity.state / "onnx"
        )
        exits = parse_exit(exit_threshold)

        async def work() -> None:
            stat = Stat()
            async with use.start(choice, draft=draft, exits=exits) as asked:
                texts = asked.answer(asked.tokenizer.encode(prompt), asking, stat, continues=True)
                await show_answer(texts, stat, stats=stats, as_json=json_output)

        asyncio.run(work())


class Use:
    """A served model that this device may use, with the device's part of it. Made with blocking calls."""

    serving: ServingConfig
    source: TensorSource

    def __init__(
        self,
        stub: CoordinatorStub,
        identity: Identity,
        name: str = "",
        blocks: int | None = None,
        folder: Path | None = None,
    ) -> None:
        """name: of the model, one of its adapters, or the job. blocks, folder: as `generate` takes them."""
        from client.weights import device_source
        from split.adapters.served import LoraAdapter
        from split.generation.using import blocks_of
        from split.serving import ServingConfig

        if folder is not None and not folder.is_dir():
            raise BadRequest(f"--model {name}: there is no folder {folder}")
        try:
            self._served = stub.FindServed(pb.FindServedRequest(name=name), timeout=_TIMEOUT)
        except grpc.RpcError as error:
            raise error_of(error, identity.address) from None
        self._identity = identity
        self.serving = ServingConfig.from_json(self._served.serving)
        self._adapter = self.serving.names.index(name) if name in self.serving.names else 0
        self._blocks = blocks_of(self.serving, identity.name, blocks)
        self.source, loras, self._digest = device_source(
            stub,
            identity.address,
            self._served.job,
            identity.state,
            folder,
            _tell_download(),
            adapters=self.serving.names[1:],
            user_blocks=self._blocks,
        )
        self._adapters = [
            LoraAdapter(one, lora, self.source.config) for one, lora in zip(self.serving.names[1:], loras, strict=True)
        ]

    @asynccontextmanager
    async def start(self, choice: RuntimeChoice, **speed: Any) -> AsyncIterator[Asked]:
        """An engine that is connected to the gateway. speed: what `user_engine` is told of drafts and early exits."""
        from client.runner import stage_address
        from split.generation.asking import Asked
        from split.generation.using import Using, user_engine
        from split.models.source import end_tokens
        from split.tls import join_address

        engine, far = await user_engine(
            self.source, self.serving, self._blocks, choice, adapters=self._adapters, **speed
        )
        tokenizer = self.source.tokenizer()
        using = Using(
            join_address(*stage_address(self._served.gateway, self._identity.host)),
            self._identity.credentials,
            far,
            self.serving,
            job=self._served.job,
            digest=self._digest,
            hidden_size=self.source.config.hidden_size,
        )
        async with using, engine:
            yield Asked(engine, tokenizer, end_tokens(self.source, tokenizer), self._adapter)


def _identity(state: Path, coordinator: str) -> Identity:
    identity = Identity.open(state)
    if identity is None:
        raise NotEnrolled(
            f"there is no device in {state}: name its folder with --state-dir, or enrol it with `isthmus-client run`"
        )
    if not coordinator:
        return identity
    host, port = split_address(coordinator)
    return dataclasses.replace(identity, host=host, port=port)  # for this once: a daemon may use the folder, too


def _tell_download() -> Callable[[int, int], None]:
    last = 0

    def tell(here: int, total: int) -> None:
        nonlocal last
        tenth = 10 * here // max(1, total)
        if tenth > last:
            last = tenth
            typer.echo(f"isthmus-client: {10 * tenth} % of {total / 2**20:.1f} MiB of weights are here", err=True)

    return tell
