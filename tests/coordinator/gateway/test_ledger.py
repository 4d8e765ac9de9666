"""What a served model has taken, as its gateway tells it: counted, told by holders, or said to be unknown."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from isthmus.coordinator.control.authority import Authority
from isthmus.coordinator.gateway.ledger import ServedLedger
from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.split.inference.chain import Cost
from isthmus.split.inference.ends import Ends
from isthmus.split.inference.engine import Engine
from isthmus.split.inference.remote import RemoteHolder
from isthmus.split.models.source import open_model
from isthmus.split.models.stage import StageSpec, build_stages
from isthmus.split.resources.flops import FlopMeter
from isthmus.split.runtime.base import Row
from tests.coordinator.gateway.test_device_users import CHOICE, Served, authority, llama, requests, story, until  # noqa: F401
from tests.split.inference.whole import answers
from tests.split.tiny_models import make_model


def test_every_holder_and_every_device_that_uses_the_model_has_its_figures(llama: Path, authority: Authority) -> None:  # noqa: F811
    async def tell(it: Served) -> None:
        ends = Ends(it.source, CHOICE)
        async with Engine(ends, it.spans, context=80, sequences=2, chunk=16) as engine, it.user(2, "phone") as phone:
            await asyncio.gather(answers(engine, requests()), answers(phone, requests()))
            hops = {hop["span"]: hop for hop in engine.stats()["hops"]}
        ledger = it.servicer.ledger
        unasked = ledger.report(ends.rows_scored)["holders"][0]
        assert (unasked["peak_bytes"], unasked["energy_joules"], unasked["money"]) == (None, None, None)
        assert unasked["energy_source"] == "unknown"
        await ledger.ask()
        report = ledger.report(ends.rows_scored)
        first, second = report["holders"]
        assert [row["span"] for row in (first, second)] == ["0-2", "2-6"]
        for row in (first, second):
            hop = hops[row["span"]]
            assert (row["batches"], row["tokens"]) == (hop["batches"], hop["tokens"])
            sizes = {(one["direction"], one["kind"]): one for one in row["traffic"]}
            batches, results = sizes["sent", "batch"], sizes["received", "result"]
            assert batches["messages"] == results["messages"] == hop["batches"]
            assert batches["codec"] == results["codec"] == "none"
            assert (
                batches["payload_bytes"] == results["payload_bytes"] == 4 * hop["tokens"] * it.source.config.hidden_size
            )
            assert row["bytes_received"] > batches["payload_bytes"]
            assert row["compute_seconds"] > 0
            assert row["link_seconds"] > 0
            assert row["flops"] > 0
            assert row["peak_bytes"] > 2**20
            assert row["energy_joules"] > 0
            assert row["energy_source"] in ("rapl", "estimated")
            assert row["money"] > 0
        assert second["tokens"] > first["tokens"]  # the device has the first blocks itself
        gateway = report["gateway"]
        assert gateway["flops"] == ends.rows_scored * 2 * it.source.config.vocab_size * it.source.config.hidden_size > 0
        assert gateway["compute_seconds"] is None
        (guest,) = report["guests"]
        assert (guest["name"], guest["flops"], guest["peak_bytes"], guest["energy_source"]) == (
            "phone", None, None, "unknown",
        )  # fmt: skip
        assert guest["bytes_sent"] > 0
        everybody = [first, second, guest]
        assert gateway["bytes_sent"] == sum(row["bytes_received"] for row in everybody)
        assert gateway["bytes_received"] == sum(row["bytes_sent"] for row in everybody)
        before = second["flops"]
        it.servicer.drop(next(iter(it.servicer._open)))
        await until(lambda: not any(span.holders for span in it.spans), "the holders leave")
        again = ledger.report(ends.rows_scored)["holders"][1]
        assert (again["flops"], again["peak_bytes"]) == (before, second["peak_bytes"])  # what it did is not forgotten

    story(llama, authority, tell)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_calculated_flops_are_those_that_torch_runs(tmp_path: Path, model_type: str) -> None:
    source = open_model(str(make_model(tmp_path / "model", model_type, layers=2)))
    (stage,) = build_stages(source, [StageSpec(0, 2, embeds=False, head=False)])
    meter, tokens = FlopMeter(), 7
    with meter.counting("batch"):
        stage(torch.zeros(1, tokens, source.config.hidden_size))
    flops = ServedLedger(source.config)._flops
    assert meter.total == 2 * (tokens * flops.per_token + tokens**2 * flops.per_pair)  # torch's count has no mask


def test_each_token_attends_to_those_before_it_and_to_itself() -> None:
    cost = Cost()
    cost.attend([Row(0, 0, 3), Row(1, 10, 2)])
    assert cost.attended == (1 + 2 + 3) + (11 + 12)


def hello(process: int) -> pb.Hello:
    return pb.Hello(first=0, last=2, process=process)


def told(holder: RemoteHolder, joules: float) -> None:
    holder.heard(pb.FromHolder(spent=pb.Spent(seconds=3600, peak_bytes=10, energy_joules=joules, energy_source="rapl")))


def test_a_holder_that_was_started_again_has_the_energy_of_both_and_one_that_said_nothing_is_unknown(
    tmp_path: Path,
) -> None:
    async def go() -> None:
        ledger = ServedLedger(open_model(str(make_model(tmp_path / "model", "llama", layers=2))).config)
        for process, joules in ((7, 2.0), (7, 5.0), (8, 1.0)):  # the second stream is of the first process still
            holder = RemoteHolder("edge", "none", 1, 16)
            holder.tells_spent = True
            ledger.joined("0-2", holder, "edge", hello(process))
            told(holder, joules)
            holder.cost.add(3, 2.0, 0.5)
            ledger.left("0-2", holder)
        (row,) = ledger.report(0)["holders"]
        assert (row["energy_joules"], row["energy_source"], row["peak_bytes"]) == (6.0, "rapl", 10)
        assert (row["tokens"], row["compute_seconds"], row["link_seconds"]) == (9, 1.5, 4.5)
        silent = RemoteHolder("edge", "none", 1, 16)
        ledger.joined("0-2", silent, "edge", hello(9))
        await silent.ask_spent(0.01)
        assert ledger.report(0)["holders"][0]["energy_joules"] is None  # not 6: this process has taken some, too
        ledger.left("0-2", silent)
        (row,) = ledger.report(0)["holders"]
        assert (row["energy_joules"], row["energy_source"], row["peak_bytes"]) == (None, "unknown", None)
        assert row["tokens"] == 9

    asyncio.run(go())


def test_what_a_holder_says_unasked_of_a_version_that_does_not_know_the_question_is_refused() -> None:
    async def go() -> None:
        holder = RemoteHolder("edge", "none", 1, 16)
        with pytest.raises(Exception, match="out of turn"):
            told(holder, 1.0)

    asyncio.run(go())
