"""Devices that use the chain themselves, over mutual TLS in one process: same tokens, and no harm to anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus.coordinator.control.authority import Authority
from isthmus.coordinator.control.interceptors import ErrorInterceptor
from isthmus.coordinator.gateway import guests
from isthmus.coordinator.gateway.chain import ChainServicer
from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.protos.v1 import chain_pb2_grpc
from isthmus.split.errors import BadRequest, IsthmusError, LinkLost, NotAllowed
from isthmus.split.inference.chain import Span
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.holding import Holding
from isthmus.split.inference.local import local_engine
from isthmus.split.inference.request import Request, Sampling
from isthmus.split.inference.serving import ServingConfig, parse_stages
from isthmus.split.inference.using import Using, blocks_of, user_engine
from isthmus.split.inference.wire import HiddenCoder
from isthmus.split.job.events import tell_nobody
from isthmus.split.models.source import TensorSource, open_model
from isthmus.split.models.stage import StageSpec
from isthmus.split.runtime.choose import TORCH, RuntimeChoice, make_runtime
from isthmus.split.tls import SERVER_OPTIONS, Credentials, Peer, aio_channel, bind, channel, server_credentials
from tests.split.inference.whole import answers, greedy, ids_of, prompts, run, whole_model
from tests.split.tiny_models import make_model

JOB, CHOICE, GREEDY = "job", RuntimeChoice(TORCH), Sampling(temperature=0)
LENGTHS = (2, 20, 5)
COUNT = 24
SERVING = ServingConfig.of(
    spans=parse_stages("cloud:0-2,cloud:2-6"),
    name="m",
    context=80,
    sequences=2,
    chunk=16,
    patience=20,
    users=("laptop", "phone"),
    guests=3,
)
LIMIT = 60.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.open(tmp_path_factory.mktemp("authority"))


@functools.cache
def device(authority: Authority, name: str) -> Credentials:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    certificate, _ = authority.sign_device(csr.public_bytes(serialization.Encoding.PEM), name)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Credentials(authority.ca_pem, certificate, private)


@dataclass
class Served:
    """A gateway, its holders in threads, and devices that use it."""

    source: TensorSource
    authority: Authority
    serving: ServingConfig
    servicer: ChainServicer
    spans: list[Span]
    address: str = ""
    revoked: set[str] = field(default_factory=set)

    @property
    def load(self) -> dict[str, int]:
        return self.servicer.guests.load

    @contextlib.asynccontextmanager
    async def user(
        self, blocks: int, name: str = "laptop", sequences: int = 3, address: str = ""
    ) -> AsyncIterator[Engine]:
        engine, far = await user_engine(self.source, self.serving, blocks, CHOICE, sequences=sequences)
        using = Using(
            address or self.address,
            device(self.authority, name),
            far,
            self.serving,
            job=JOB,
            digest=f"digest-{blocks}",
            hidden_size=self.source.config.hidden_size,
            sequences=sequences,
        )
        async with using, engine:
            yield engine

    @contextlib.contextmanager
    def holder(self, span: Span) -> Iterator[Holding]:
        """One more, in a thread of its own; killed at the end."""
        certificate, key = self.authority.issue_stage(JOB)
        spec = StageSpec(span.first, span.last, embeds=False, head=False)
        runtime = make_runtime(
            self.source, span.first, span.last, CHOICE, sequences=self.serving.room, tokens=self.serving.limits.context
        )
        with channel(self.address, Credentials(self.authority.ca_pem, certificate, key)) as opened:
            hidden_size = self.source.config.hidden_size
            holding = Holding(opened, runtime, spec, job=JOB, digest=str(span), hidden_size=hidden_size)

            def work() -> None:
                with contextlib.suppress(IsthmusError):
                    holding.run()

            thread = threading.Thread(target=work)
            thread.start()
            try:
                yield holding
            finally:
                holding._transport.close()
                thread.join(LIMIT)

    @contextlib.asynccontextmanager
    async def stub(self, name: str = "laptop") -> AsyncIterator[chain_pb2_grpc.ChainStub]:
        async with aio_channel(self.address, device(self.authority, name)) as opened:
            yield chain_pb2_grpc.ChainStub(opened)


@contextlib.asynccontextmanager
async def served(folder: Path, authority: Authority, serving: ServingConfig = SERVING) -> AsyncIterator[Served]:
    source = open_model(str(folder))
    hidden_size = source.config.hidden_size
    spans = [Span(one.first, one.last, hidden_size, chunk=16, patience=serving.chain.patience) for one in serving.spans]
    digests = {str(span): str(span) for span in spans}
    user_digests = {span.first: f"digest-{span.first}" for span in spans}

    def allowed(peer: Peer) -> bool:
        return peer.name not in it.revoked

    servicer = ChainServicer(JOB, serving, spans, source.config, digests, user_digests, allowed, tell_nobody)
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=SERVER_OPTIONS)
    chain_pb2_grpc.add_ChainServicer_to_server(servicer, server)
    certificate, key = authority.issue_server()
    port = bind(server, "127.0.0.1", 0, server_credentials(certificate, key, authority.ca_pem))
    await server.start()
    it = Served(source, authority, serving, servicer, spans, f"127.0.0.1:{port}")
    with contextlib.ExitStack() as holders:
        for span in spans:
            await asyncio.to_thread(holders.enter_context, it.holder(span))
            await span.complete()
        try:
            yield it
        finally:
            await server.stop(None)
            await asyncio.to_thread(holders.close)


def story(
    folder: Path, authority: Authority, tell: Callable[[Served], Awaitable[None]], serving: ServingConfig = SERVING
) -> None:
    async def go() -> None:
        async with asyncio.timeout(120), served(folder, authority, serving) as it:
            await tell(it)

    asyncio.run(go())


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(LIMIT):
            while not condition():  # noqa: ASYNC110  # what is waited for are states of several parts
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {LIMIT:.0f} s: {what}") from None


def requests(sampling: Sampling = GREEDY, lengths: Sequence[int] = LENGTHS) -> list[Request]:
    return [Request(prompt, COUNT, sampling) for prompt in prompts(lengths)]


def wanted(folder: Path, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    model = whole_model(folder)
    return [greedy(model, prompt, COUNT) for prompt in prompts(lengths)]


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_answers_are_those_of_transformers(
    tmp_path: Path, authority: Authority, architecture: str, blocks: int
) -> None:
    folder = make_model(tmp_path, architecture, tied=architecture == "gpt2")

    async def tell(it: Served) -> None:
        async with it.user(blocks) as engine:
            assert await answers(engine, requests()) == wanted(folder)
            spans = [hop["span"] for hop in engine.stats()["hops"]]
            assert spans == (["0-2", "2-6"] if blocks else ["0-6"])

    story(folder, authority, tell)


def test_draws_with_a_seed_are_those_of_one_process(llama: Path, authority: Authority) -> None:
    asked = requests(Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=5))
    alone = run(lambda: local_engine(open_model(str(llama)), context=80), lambda engine: answers(engine, asked))

    async def tell(it: Served) -> None:
        async with it.user(2) as engine:
            assert await answers(engine, asked) == alone

    story(llama, authority, tell)


def test_devices_and_clients_of_the_api_do_not_disturb_each_other(llama: Path, authority: Authority) -> None:
    lengths = (2, 20, 5, 11, 1, 7)

    async def tell(it: Served) -> None:
        api = Engine(Ends(it.source, CHOICE), it.spans, context=80, sequences=2, chunk=16)
        async with api, it.user(0, "laptop", 1) as one, it.user(2, "phone", 2) as two:
            engines = (api, one, two)
            assert await asyncio.gather(*(answers(engine, requests(lengths=lengths)) for engine in engines)) == [
                wanted(llama, lengths)
            ] * len(engines)
        assert not any(span.recoveries for span in it.spans)

    story(llama, authority, tell)


def test_a_lossy_codec_makes_fewer_bytes(llama: Path, authority: Authority) -> None:
    sent = {}

    async def tell(it: Served) -> None:
        async with it.user(0) as engine:
            await answers(engine, requests())
            sent[it.serving.chain.codec] = engine.stats()["hops"][-1]["sent"]

    for codec in ("none", "hadamard,int8"):
        story(llama, authority, tell, SERVING.but(codec=codec))
    assert sent["hadamard,int8"] < 0.7 * sent["none"]


def test_only_hidden_states_leave(llama: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[pb.ToHolder] = []
    take = guests.Guest._take
    monkeypatch.setattr(guests.Guest, "_take", lambda self, message: (seen.append(message), take(self, message)))

    async def tell(it: Served) -> None:
        async with it.user(2) as engine:
            await answers(engine, requests())

    story(llama, authority, tell)
    batches = [message.batch for message in seen if message.HasField("batch")]
    assert len(batches) >= COUNT
    assert {message.WhichOneof("kind") for message in seen} == {"agreed", "batch"}
    for batch in batches:
        assert batch.hidden.dtype == "float32"
        assert list(batch.hidden.shape) == [sum(row.count for row in batch.rows), 32]


def test_no_message_to_the_gateway_has_a_place_for_text_or_tokens() -> None:
    strings, numbers = set(), set()
    pending, known = [pb.ToHolder.DESCRIPTOR], set()
    while pending:
        message = pending.pop()
        known.add(message.full_name)
        for entry in message.fields:
            if entry.message_type is not None:
                if entry.message_type.full_name not in known:
                    pending.append(entry.message_type)
            elif entry.type in (entry.TYPE_STRING, entry.TYPE_BYTES):
                strings.add(f"{message.name}.{entry.name}")
            else:
                numbers.add(f"{message.name}.{entry.name}")
    assert strings == {
        "Agreed.codec", "UserHello.job", "UserHello.digest", "UserHello.session",
        "Tensor.codec", "Tensor.dtype", "Tensor.payload",
    }  # fmt: skip
    assert numbers == {
        "Agreed.seed", "Batch.id", "Forget.sequences", "Row.adapter", "Row.count", "Row.long", "Row.position",
        "Row.sequence", "Tensor.shape", "UserHello.first", "UserHello.sequences",
    }  # fmt: skip


def test_too_many_sequences_are_refused_and_those_of_a_user_who_left_are_free_again(
    llama: Path, authority: Authority
) -> None:
    async def tell(it: Served) -> None:
        async with it.user(0, sequences=2):
            with pytest.raises(IsthmusError, match=r"too few sequences for devices are free \(1; 2 asked for\)"):
                async with it.user(0, "phone", sequences=2):
                    pass
        await until(lambda: it.load == {"streams": 0, "free": 3}, "the sequences are free")
        async with it.user(0, "phone", sequences=3) as engine:
            assert await answers(engine, requests()) == wanted(llama)

    story(llama, authority, tell)


def test_a_user_that_vanishes_in_the_middle_leaves_no_trace(llama: Path, authority: Authority) -> None:
    async def tell(it: Served) -> None:
        async with it.user(0) as engine:
            answer = engine.submit(requests()[1])
            await anext(aiter(answer))
        await until(lambda: it.load == {"streams": 0, "free": 3}, "the sequences are free")
        assert not any(span._journal for span in it.spans)
        async with it.user(2, "phone") as engine:
            assert await answers(engine, requests()) == wanted(llama)

    story(llama, authority, tell)


class Proxy:
    """Carries bytes to the gateway, until `cut`; then for whoever dials anew."""

    def __init__(self, address: str) -> None:
        self._host, port = address.split(":")
        self._port, self._open = int(port), list[asyncio.StreamWriter]()
        self.cuts = 0

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        self.cuts += 1
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to = await asyncio.open_connection(self._host, self._port)
        self._open += [writer, to]

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(copy(reader, to), copy(there, writer))


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_link_that_is_cut_in_the_middle_changes_no_answer(llama: Path, authority: Authority, blocks: int) -> None:
    async def tell(it: Served) -> None:
        async with Proxy(it.address) as proxy, it.user(blocks, address=proxy.address) as engine:
            running = asyncio.gather(*(ids_of(engine.submit(request)) for request in requests()))
            for batches in (6, 14):
                await until(lambda least=batches: _batches(engine) > least or running.done(), "batches")
                assert not running.done()
                proxy.cut()
            assert await running == wanted(llama)
            recoveries = engine.stats()["recoveries"]
            assert {one["holder"] for one in recoveries} == {"gateway"}
            assert any(one["tokens"] > 0 for one in recoveries)
            assert it.load == {"streams": 1, "free": 0}  # the new stream has the sequences of the old one

    story(llama, authority, tell)


def _batches(engine: Engine) -> int:
    return sum(hop["batches"] for hop in engine.stats()["hops"] if hop["holder"] == "gateway")


def test_a_holder_that_dies_changes_no_answer_of_a_device(llama: Path, authority: Authority) -> None:
    async def tell(it: Served) -> None:
        far = it.spans[1]
        async with it.user(0) as engine:
            running = asyncio.gather(*(ids_of(engine.submit(request)) for request in requests()))
            await until(lambda: _batches(engine) > 6, "batches")
            dying = far.holders[0]
            dying.end(LinkLost("killed"))
            holding = it.holder(far)
            await asyncio.to_thread(holding.__enter__)
            try:
                assert await running == wanted(llama)
            finally:
                await asyncio.to_thread(holding.__exit__, None, None, None)
            assert engine.stats()["recoveries"] == []
        assert {(one.lost, one.span) for one in far.recoveries} == {(dying.name, "2-6")}

    story(llama, authority, tell)


# ---- What a device may not do ----


def hello(**changes: Any) -> pb.ToHolder:
    return pb.ToHolder(
        user=pb.UserHello(**({"job": JOB, "first": 2, "digest": "digest-2", "sequences": 2, "session": "s"} | changes))
    )


AGREED = pb.ToHolder(agreed=pb.Agreed(codec="none", seed=1))


def batch(
    rows: Sequence[tuple[int, int, int]] = ((0, 0, 3),), *, id: int = 1, values: Any = None, codec: str = "none"
) -> pb.ToHolder:
    """rows: sequence, position, count. values: that the hidden states have in the place of ones."""
    hidden = torch.ones(max(1, min(sum(count for _, _, count in rows), 9000)), 32)
    if values is not None:
        hidden = hidden * values
    return pb.ToHolder(
        batch=pb.Batch(
            id=id,
            rows=[pb.Row(sequence=sequence, position=position, count=count) for sequence, position, count in rows],
            hidden=HiddenCoder(codec, 1, hidden.shape[1]).encode(hidden),
        )
    )


def changed(message: pb.ToHolder, **tensor: Any) -> pb.ToHolder:
    for name, value in tensor.items():
        if name == "shape":
            message.batch.hidden.shape[:] = value
        else:
            setattr(message.batch.hidden, name, value)
    return message


BAD_HELLOS = [
    ([AGREED], "has to be its hello"),
    ([batch()], "has to be its hello"),
    ([pb.ToHolder()], "has to be its hello"),
    ([hello(job="other")], "may not use job other"),
    ([hello(first=1)], "no span begins at block 1: choose 0, 2"),
    ([hello(digest="wrong")], "are not the coordinator's"),
    ([hello(sequences=0)], "a hello without sequences"),
    ([hello(session="")], "'' is not a session's id"),
    ([hello(session="s" * 64)], "is not a session's id"),
    ([hello(session="../s")], "'../s' is not a session's id"),
    ([hello(sequences=4)], "too few sequences for devices are free (2; 4 asked for)"),
]
BAD_FRAMES = [
    ([batch()], "batch out of turn"),
    ([AGREED, AGREED], "agreed out of turn"),
    ([AGREED, hello()], "user out of turn"),
    ([AGREED, pb.ToHolder()], "None out of turn"),
    ([pb.ToHolder(agreed=pb.Agreed(codec="float16"))], "codec 'float16': this model is served with none"),
    ([AGREED, batch([])], "a batch of 0 tokens"),
    ([AGREED, batch(id=0)], "batch 0 after batch 0"),
    ([AGREED, batch(), batch(id=1)], "batch 1 after batch 1"),
    ([AGREED, batch(), batch(id=2)], "sequence 0 is under way already"),
    ([AGREED, batch(), pb.ToHolder(forget=pb.Forget(sequences=[0]))], "sequence 0 is under way already"),
    ([AGREED, pb.ToHolder(forget=pb.Forget(sequences=[2]))], "sequence 2 of 2"),
    ([AGREED, pb.ToHolder(forget=pb.Forget(sequences=[0, 0, 0]))], "3 sequences to forget, of 2"),
    ([AGREED, batch([(2, 0, 3)])], "sequence 2 of 2"),
    ([AGREED, batch([(2**32 - 1, 0, 3)])], "sequence 4294967295 of 2"),
    ([AGREED, batch([(0, 0, 1), (0, 0, 1)])], "a sequence twice"),
    ([AGREED, batch([(0, 0, 1)] * 3)], "3 rows for 2 sequences"),
    ([AGREED, batch([(0, 0, 1), (1, 0, 0)])], "not in 80"),
    ([AGREED, batch([(0, 40, 41)])], "tokens 40 to 81: not in 80"),
    ([AGREED, batch([(0, 2**32 - 1, 1)])], "not in 80"),
    ([AGREED, batch([(0, 0, 65)])], "a batch of 65 tokens; 64 can be"),
    ([AGREED, batch([(0, 0, 2**32 - 1)])], "a batch of 4294967295 tokens"),
    ([AGREED, batch(values=torch.nan)], "NaN or infinity"),
    ([AGREED, batch(values=torch.inf)], "NaN or infinity"),
    ([AGREED, batch(values=1e16)], "hidden states beyond 1e+15"),
    ([AGREED, batch(codec="float16")], "codec 'float16' was not agreed on"),
    ([AGREED, changed(batch(), shape=[3, 31])], "was not agreed on"),
    ([AGREED, changed(batch(), shape=[4, 32])], "was not agreed on"),
    ([AGREED, changed(batch(), shape=[96])], "dimensions"),
    ([AGREED, changed(batch(), dtype="int32")], "dtype 'int32' was not agreed on"),
    ([AGREED, changed(batch(), payload=b"1234")], "4 bytes of payload"),
    ([AGREED, changed(batch(), payload=b"")], "0 bytes of payload"),
]


async def refused(it: Served, messages: Sequence[pb.ToHolder], name: str = "laptop") -> str:
    """The line with which a stream of these messages ends."""
    async with it.stub(name) as stub:

        async def outgoing() -> AsyncIterator[pb.ToHolder]:
            for message in messages:
                yield message
            await asyncio.Event().wait()

        call = stub.Use(outgoing())
        with pytest.raises(grpc.aio.AioRpcError) as told:
            async for _ in call:
                pass
        return f"{told.value.code().name}: {told.value.details()}"


def test_a_malformed_frame_ends_its_own_stream_alone(llama: Path, authority: Authority) -> None:
    async def tell(it: Served) -> None:
        holders = [span.holders for span in it.spans]
        api = Engine(Ends(it.source, CHOICE), it.spans, context=80, sequences=2, chunk=16)
        async with api, it.user(0, "phone", 1) as engine:
            running = [asyncio.create_task(answers(one, requests())) for one in (api, engine)]
            for messages, line in BAD_HELLOS:
                assert line in await refused(it, messages)
            for messages, line in BAD_FRAMES:
                told = await refused(it, [hello(), *messages])
                assert line in told
                assert told.startswith("INVALID_ARGUMENT")
            assert [await task for task in running] == [wanted(llama)] * 2
            await until(lambda: it.load == {"streams": 1, "free": 2}, "the sequences are free")
        assert [span.holders for span in it.spans] == holders
        assert not any(span.recoveries for span in it.spans)

    story(llama, authority, tell)


def test_great_values_cost_no_holder_its_stream(tmp_path: Path, authority: Authority) -> None:
    folder = make_model(tmp_path, "gpt2")  # the norms of which subtract a mean

    async def tell(it: Served) -> None:
        holders = [span.holders for span in it.spans]
        async with it.stub() as stub:
            values = torch.cat([torch.full((3, 16), 1e15), torch.full((3, 16), -1e15)], dim=1)
            call = stub.Use()
            for message in (hello(first=0, digest="digest-0"), AGREED, batch(values=values)):
                await call.write(message)
            assert (await call.read()).HasField("hello")
            assert (await call.read()).result.HasField("hidden")
        assert [span.holders for span in it.spans] == holders

    story(folder, authority, tell)


def test_what_the_gateway_lacks_is_asked_for_and_not_made_up(llama: Path, authority: Authority) -> None:
    async def tell(it: Served) -> None:
        async with it.stub() as stub:
            call = stub.Use()
            for message in (hello(), AGREED, batch([(0, 0, 3)], id=1)):
                await call.write(message)
            assert (await call.read()).hello.sequences == 2
            assert (await call.read()).result.HasField("hidden")
            steps = [([(0, 3, 1)], False), ([(0, 5, 1)], True), ([(0, 2, 1), (1, 1, 1)], True), ([(0, 2, 1)], False)]
            for number, (rows, bad) in enumerate(steps, start=2):
                await call.write(batch(rows, id=number))
                result = (await call.read()).result
                assert (result.id, result.bad_position) == (number, bad)
            await call.write(pb.ToHolder(forget=pb.Forget(sequences=[0, 1])))
            await call.write(batch([(0, 1, 1)], id=9))
            assert (await call.read()).result.bad_position

    story(llama, authority, tell)


def test_batches_are_answered_in_their_order(llama: Path, authority: Authority) -> None:
    async def tell(it: Served) -> None:
        async with it.stub() as stub:
            call = stub.Use()
            for message in (hello(sequences=3), AGREED, *(batch([(i, 0, 60 - 29 * i)], id=7 + i) for i in range(3))):
                await call.write(message)
            assert (await call.read()).HasField("hello")
            assert [(await call.read()).result.id for _ in range(3)] == [7, 8, 9]

    story(llama, authority, tell)


def test_a_device_that_may_not_use_the_chain_is_told_so(llama: Path, authority: Authority) -> None:
    async def tell(it: Served) -> None:
        with pytest.raises(NotAllowed, match="device stranger may not use job job"):
            async with it.user(0, "stranger"):
                pass
        it.revoked.add("phone")
        with pytest.raises(NotAllowed, match="phone has no part in job job, or is revoked"):
            async with it.user(0, "phone"):
                pass
        certificate, key = authority.issue_stage(JOB)
        async with aio_channel(it.address, Credentials(authority.ca_pem, certificate, key)) as opened:
            with pytest.raises(grpc.aio.AioRpcError, match="may not use job"):
                await chain_pb2_grpc.ChainStub(opened).Use(iter([hello()])).read()

    story(llama, authority, tell)


def test_a_device_that_is_revoked_in_the_middle_gets_no_further_token(llama: Path, authority: Authority) -> None:
    async def tell(it: Served) -> None:
        async with it.user(0, sequences=1) as engine, it.user(2, "phone", sequences=2) as other:
            answer = engine.submit(requests()[1])
            running = asyncio.create_task(answers(other, requests()))
            await anext(aiter(answer))
            it.revoked.add("laptop")
            it.servicer.drop("laptop")
            with pytest.raises(NotAllowed, match=r"laptop (was revoked|has no part in job job, or is revoked)"):
                await ids_of(answer)
            assert await running == wanted(llama)

    story(llama, authority, tell)


def test_a_device_that_does_not_read_loses_its_sequences_when_it_is_sent_away(
    llama: Path, authority: Authority
) -> None:
    async def tell(it: Served) -> None:
        async with it.stub() as stub:
            call = stub.Use()
            for message in (hello(sequences=3), AGREED):
                await call.write(message)
            await until(lambda: bool(it.servicer.guests._open), "the stream")
            (guest,) = it.servicer.guests._open.values()
            hop = it.spans[-1].holders[0].cost
            for number in range(1, 5000):  # until what is not read fills the way, and a sequence stays under way
                before = hop.batches
                await call.write(batch([(number % 3, 0, 60)], id=number))
                await until(lambda before=before: hop.batches > before or guest.error is not None, "a batch")
                if guest.error is not None:
                    break
            assert guest.error is not None
            assert it.load["streams"] == 1  # the way is full: it has not heard of it
            await until(lambda: it.load == {"streams": 0, "free": 3}, "its sequences are free")
        async with it.user(0) as engine:
            assert await answers(engine, requests()) == wanted(llama)

    story(llama, authority, tell)


def test_a_stream_that_is_silent_ends(llama: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.coordinator.gateway.guests._IDLE", 0.2)

    async def tell(it: Served) -> None:
        async with it.stub() as stub:
            call = stub.Use()
            await call.write(hello(sequences=3))
            assert (await call.read()).HasField("hello")
            with pytest.raises(grpc.aio.AioRpcError, match="nothing came for"):
                await call.read()
            assert it.load == {"streams": 0, "free": 3}

    story(llama, authority, tell)


def test_a_model_that_is_not_served_any_more_says_so(llama: Path, authority: Authority) -> None:
    async def tell(it: Served) -> None:
        async with it.user(0) as engine:
            answer = engine.submit(requests()[1])
            await anext(aiter(answer))
            it.servicer.close()
            with pytest.raises(IsthmusError, match="not served any more"):
                await ids_of(answer)

    story(llama, authority, tell)


def test_nobody_at_the_gateways_address_is_one_line(llama: Path, authority: Authority) -> None:
    async def tell(it: Served) -> None:
        with pytest.raises(LinkLost, match=r"127\.0\.0\.1:1 \(the model's gateway\) cannot be reached"):
            async with it.user(0, address="127.0.0.1:1"):
                pass

    story(llama, authority, tell)


@pytest.mark.parametrize(
    ("stages", "name", "asked", "blocks"),
    [
        ("laptop:0-2,cloud:2-6", "laptop", None, 2),
        ("laptop:0-2,cloud:2-6", "phone", None, 0),
        ("cloud:0-2,laptop:2-6", "laptop", None, 0),
        ("laptop:0-6", "laptop", None, 0),
        ("cloud:0-2,cloud:2-6", "phone", 2, 2),
    ],
)
def test_by_default_a_device_computes_the_first_span_if_it_holds_it(
    stages: str, name: str, asked: int | None, blocks: int
) -> None:
    assert blocks_of(SERVING.but(spans=parse_stages(stages)), name, asked) == blocks


@pytest.mark.parametrize("asked", [1, 6, -1])
def test_blocks_that_end_inside_a_span_are_refused(asked: int) -> None:
    with pytest.raises(BadRequest, match=f"--blocks {asked}: no span of m begins there; choose 0, 2"):
        blocks_of(SERVING, "phone", asked)
