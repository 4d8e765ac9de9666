"""The side of a chain that has the text: embedding, head, sampling and perhaps the first blocks are here.

The other blocks are behind a gateway, and only hidden states leave.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace

import grpc.aio
from torch import Tensor

from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.protos.v1.chain_pb2_grpc import ChainStub
from isthmus.split.errors import BadFrame, BadRequest, IsthmusError, LinkLost
from isthmus.split.inference.chain import Cost, Holder, LocalHolder, Span, Takeover
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.exits import ExitRule
from isthmus.split.inference.local import EARLY, LOOKUP, NONE, make_drafter
from isthmus.split.inference.remote import RemoteHolder
from isthmus.split.inference.serving import ServingConfig
from isthmus.split.link.backoff import Backoff
from isthmus.split.lora.served import LoraAdapter
from isthmus.split.models.source import TensorSource
from isthmus.split.models.stage import StageSpec
from isthmus.split.runtime.base import Row
from isthmus.split.runtime.choose import AUTO, ONNX, TORCH, RuntimeChoice, make_runtime, pick_runtime
from isthmus.split.tls import Credentials, aio_channel, error_of

log = logging.getLogger(__name__)

GATEWAY = "gateway"
_FIRST_RETRY, _LAST_RETRY = 0.3, 6.0  # seconds up to which the first wait for the gateway, and any wait, is drawn
_ANSWER = 60.0  # seconds for a batch, beside those for which the gateway itself may wait for holders


def user_parts(layers: int, blocks: int) -> tuple[StageSpec, StageSpec]:
    """A guest's parts of a model of so many layers: embedding with the first `blocks` blocks, and norm with head."""
    return StageSpec(0, blocks, embeds=True, head=False), StageSpec(layers, layers, embeds=False, head=True)


def blocks_of(serving: ServingConfig, device: str, asked: int | None) -> int:
    """Number of blocks that the device computes itself: by default those of the first span if it holds them, else none.

    Raises BadRequest for a number at which no span begins.
    """
    if asked is None:
        held = serving.spans[0].last if device in serving.spans[0].holders else 0
        return held if held in serving.boundaries else 0
    if asked not in serving.boundaries:
        starts = ", ".join(map(str, serving.boundaries))
        raise BadRequest(f"--blocks {asked}: no span of {serving.name} begins there; choose {starts}")
    return asked


async def user_engine(
    source: TensorSource,
    serving: ServingConfig,
    blocks: int,
    choice: RuntimeChoice,
    *,
    sequences: int = 1,
    draft: str = AUTO,
    exits: ExitRule | None = None,
    adapters: Sequence[LoraAdapter] = (),
) -> tuple[Engine, Span]:
    """Makes an engine that is not yet started, and the span that the gateway has to hold.

    source: the tensors of `user_parts`.
    blocks: number of blocks that are computed here.
    sequences: number of texts that are answered at the same time.
    draft: as in `make_drafter`, or AUTO: by the blocks that are here, by lookup without any, by nobody with `exits`.
    """
    if draft == AUTO:
        draft = NONE if exits is not None else EARLY if blocks else LOOKUP
    config = source.config
    if choice.runtime == AUTO and not blocks:  # no block is here to measure with
        choice = replace(choice, runtime=TORCH if choice.weights == "float32" else ONNX)
    else:
        choice = replace(choice, runtime=pick_runtime(source, 0, choice))
    spans, near = [], None
    if blocks:
        room = 2 * sequences if draft == EARLY else sequences
        runtime = make_runtime(
            source, 0, blocks, choice, sequences=room, tokens=serving.limits.context, adapters=adapters
        )
        near = LocalHolder("here", runtime)
        spans.append(Span(0, blocks, config.hidden_size, chunk=serving.chain.chunk))
        await spans[0].add(near)
    far = Span(
        blocks,
        config.num_hidden_layers,
        config.hidden_size,
        chunk=serving.chain.chunk,
        patience=serving.chain.patience,
        tell=_log_recovery,
    )
    ends = Ends(source, choice)
    drafter = make_drafter(draft, source, ends, choice, near, context=serving.limits.context, sequences=sequences)
    engine = Engine(
        ends,
        [*spans, far],
        context=serving.limits.context,
        sequences=sequences,
        chunk=serving.chain.chunk,
        drafter=drafter,
        exits=exits,
    )
    return engine, far


class Using:
    """Keeps a stream of Chain.Use up, as a span's holder.

    Start it with `async with`, which raises what the first attempt ends with. A stream that breaks is dialled again,
    and the span sends what the gateway has lost with it. Once the gateway does not let this device in any more, every
    batch of the span ends with its reason.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        span: Span,
        serving: ServingConfig,
        *,
        job: str,
        digest: str,
        hidden_size: int,
        sequences: int = 1,
    ) -> None:
        """address: HOST:PORT of the gateway.
        digest: digest of the tensors of `user_parts`."""
        self._address, self._credentials, self._span, self._serving = address, credentials, span, serving
        self._hidden_size = hidden_size
        self._timeout = _ANSWER + serving.chain.patience * len(serving.spans)
        self._hello = pb.UserHello(
            job=job, first=span.first, digest=digest, sequences=sequences, session=secrets.token_hex(8)
        )
        self.streams = 0  # number of streams that the gateway has taken
        self._cost = Cost()  # the cost of all streams
        self._taken: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Using:
        self._taken = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep_up(self._taken))
        try:
            await self._taken
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_up(self, taken: asyncio.Future[None]) -> None:
        backoff = Backoff(_FIRST_RETRY, _LAST_RETRY)
        while True:  # a stream's end is an error in any case
            before = self.streams
            try:
                await self._stream(taken)
            except Exception as error:
                known = error if isinstance(error, IsthmusError) else IsthmusError(f"{type(error).__name__}: {error}")
                if known is not error:
                    log.exception("the stream to the gateway failed")
                if not taken.done():
                    taken.set_exception(known)
                    return
                if not isinstance(known, LinkLost):
                    await self._span.add(_Refusal(known))
                    return
                if self.streams > before:
                    backoff.reset()
                seconds = backoff.wait()
                log.warning("%s; dialling again in %.1f s", known, seconds)
                await asyncio.sleep(seconds)

    async def _stream(self, taken: asyncio.Future[None]) -> None:
        """Runs one stream, from hello to end, which is an error in any case."""
        agreed: asyncio.Future[RemoteHolder | None] = asyncio.get_running_loop().create_future()
        holder: RemoteHolder | None = None
        async with aio_channel(self._address, self._credentials) as channel:
            try:
                async for message in ChainStub(channel).Use(_messages(self._hello, agreed)):
                    if holder is not None:
                        holder.heard(message)
                        continue
                    self._check(message)
                    codec = self._serving.chain.codec
                    holder = RemoteHolder(
                        GATEWAY, codec, secrets.randbits(48), self._hidden_size, timeout=self._timeout
                    )
                    holder.cost = self._cost
                    agreed.set_result(holder)
                    await self._span.add(holder)
                    self.streams += 1
                    if not taken.done():
                        taken.set_result(None)
                raise LinkLost("the gateway closed the stream")
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and taken.done():
                    # Somebody has the sequence that this stream had: one may become free before the span's patience
                    # ends.
                    raise LinkLost(error.details() or "the gateway has no sequence free") from None
                raise error_of(error, f"{self._address} (the model's gateway)") from None
            finally:
                if holder is None:
                    agreed.set_result(None)
                else:
                    holder.end(LinkLost("the stream has ended"))
                    self._span.remove(holder)

    def _check(self, message: pb.FromHolder) -> None:
        hello, wanted = message.hello, self._hello
        if message.WhichOneof("kind") != "hello" or (hello.job, hello.first) != (wanted.job, wanted.first):
            raise BadFrame("the gateway's first message is not its hello")
        if (
            hello.last != self._span.last
            or hello.sequences < wanted.sequences
            or hello.tokens < self._serving.limits.context
        ):
            raise BadFrame(
                f"the gateway has blocks up to {hello.last} for {hello.sequences} sequences of {hello.tokens}"
                f" tokens; up to {self._span.last} for {wanted.sequences} of {self._serving.limits.context} are needed"
            )


async def _messages(hello: pb.UserHello, agreed: asyncio.Future[RemoteHolder | None]) -> AsyncIterator[pb.ToHolder]:
    yield pb.ToHolder(user=hello)
    holder = await agreed
    if holder is not None:
        async for message in holder.messages():
            yield message


class _Refusal(Holder):
    """Stands in place of a gateway that does not let this device in any more."""

    def __init__(self, error: IsthmusError) -> None:
        self.name, self.cost, self._error = GATEWAY, Cost(), error

    @property
    def gone(self) -> bool:
        return False

    async def compute(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        raise self._error

    def forget(self, sequences: Iterable[int]) -> None:
        pass

    def end(self, error: IsthmusError) -> None:
        pass


def _log_recovery(one: Takeover) -> None:
    log.info("blocks %s: %d tokens sent again, %.2f s", one.span, one.tokens, one.seconds)
