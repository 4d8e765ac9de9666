"""The ledger counts what really ran and what really was sent."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from isthmus.split.resources.ledger import Ledger
from isthmus.split.resources.prices import Prices
from isthmus.split.resources.tcp import Counted
from isthmus.split.resources.traffic import Traffic
from isthmus.split.training.frames import numbers_of


def test_flops_are_those_of_the_matrix_products_and_are_counted_each_time() -> None:
    ledger = Ledger()
    layer = nn.Linear(32, 64, bias=False)
    for _ in range(3):
        with ledger.computing("forward"):
            layer(torch.zeros(8, 32))
    assert ledger.flops == 3 * 2 * 8 * 32 * 64
    assert ledger.compute_seconds > 0


def test_the_backward_pass_and_attention_on_a_processor_are_counted() -> None:
    ledger = Ledger()
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    with ledger.computing("attention"):
        out = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    forward = ledger.flops
    assert forward == 2 * 2 * (2 * 16 * 16 * 8)  # two products for each of two heads
    with ledger.computing("backward"):
        out.sum().backward()
    assert ledger.flops - forward >= 2 * forward


def test_several_ledgers_count_in_threads_of_their_own() -> None:
    ledgers = [Ledger() for _ in range(3)]

    def work(ledger: Ledger, width: int) -> None:
        for _ in range(5):
            with ledger.computing("product"):
                torch.zeros(4, width) @ torch.zeros(width, 4)

    threads = [threading.Thread(target=work, args=(ledger, 8 * (i + 1))) for i, ledger in enumerate(ledgers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ledger.flops for ledger in ledgers] == [5 * 2 * 4 * 8 * (i + 1) * 4 for i in range(3)]


def test_traffic_keeps_directions_kinds_codecs_and_overhead_apart() -> None:
    traffic = Traffic()
    traffic.crossed("sent", "forward", "none", payload=100, total=120)
    traffic.crossed("sent", "forward", "none", payload=100, total=110)
    traffic.crossed("sent", "forward", "int8", payload=25, total=30)
    traffic.crossed("received", "forward", "int8", payload=50, total=50)
    traffic.crossed("received", "close", "", payload=0, total=7)
    assert (traffic.total_bytes("sent"), traffic.total_bytes("received")) == (260, 57)
    assert (traffic.received("forward"), traffic.received("backward")) == (1, 0)
    assert [tuple(row.values()) for row in traffic.rows()] == [
        ("received", "close", "", 1, 0, 7),
        ("received", "forward", "int8", 1, 50, 0),
        ("sent", "forward", "int8", 1, 25, 5),
        ("sent", "forward", "none", 2, 200, 30),
    ]
    assert list(traffic.rows()[0]) == ["direction", "kind", "codec", "messages", "payload_bytes", "overhead_bytes"]


def test_what_the_protocols_below_took_is_a_row_of_its_own_where_the_kernel_told() -> None:
    traffic = Traffic()
    traffic.crossed("sent", "forward", "int8", payload=100, total=120)
    traffic.crossed("received", "forward", "int8", payload=100, total=120)
    traffic.connections[7] = Counted(sent=150)
    rows = [tuple(row.values()) for row in traffic.rows() if row["kind"] == "protocols"]
    assert rows == [("sent", "protocols", "", 0, 0, 30)]
    whole = sum(row["payload_bytes"] + row["overhead_bytes"] for row in traffic.rows() if row["direction"] == "sent")
    assert whole == 150


def test_the_traffic_of_several_runs_adds_up() -> None:
    first, second = Traffic(), Traffic()
    for traffic in (first, second):
        traffic.crossed("sent", "forward", "int8", payload=100, total=120)
        traffic.connections[id(traffic)] = Counted(sent=130)
    second.crossed("sent", "step", "", payload=0, total=9)
    first.add(second)
    assert first.total_bytes("sent") == 249
    assert (first.on_the_wire("sent"), first.on_the_wire("received")) == (260, 0)
    assert [row["messages"] for row in first.rows()] == [2, 1, 0]


def test_waiting_for_the_link_is_a_part_of_waiting() -> None:
    ledger = Ledger()
    ledger.waited(1.0, 0.25)
    ledger.waited(0.5, 3.0)  # the question was sent long before anyone waited for its answer
    ledger.waited(0.5, -0.1)  # two clocks that do not agree
    assert (ledger.wait_seconds, ledger.link_seconds) == (2.0, 0.75)
    summary = ledger.summary()
    assert summary["link_seconds"] == 0.75
    assert summary["wait_seconds"] == 2.0


def test_what_codecs_took_is_added_up_and_their_memory_is_the_most_that_there_was() -> None:
    ledger = Ledger()
    ledger.coded("int8", "encode", 1000, 0.25, memory_bytes=10)
    ledger.coded("klt,uniform", "encode", 1000, 0.5, memory_bytes=400)
    ledger.coded("int8", "decode", 500, 0.125, memory_bytes=20)
    summary = ledger.summary()
    assert (summary["encode_seconds"], summary["decode_seconds"]) == (0.75, 0.125)
    assert summary["codec_memory_bytes"] == 400
    assert (ledger.coding["int8"].encode_values, ledger.coding["int8"].decode_values) == (1000, 500)


def test_the_summary_says_where_its_energy_is_from() -> None:
    summary = Ledger().summary()
    assert summary["energy_source"] in ("rapl", "estimated")
    assert summary["peak_bytes"] > 0


def test_the_energy_of_an_accelerator_without_a_meter_is_unknown_and_not_0(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ledger().summary()["accelerator_energy_source"] == ("none" if not torch.cuda.is_available() else "nvml")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 0)
    monkeypatch.setattr("isthmus.split.resources.energy._nvml", lambda: None)
    summary = Ledger().summary()
    assert (summary["accelerator_energy_joules"], summary["accelerator_energy_source"]) == (None, "unknown")
    assert "accelerator_energy_joules" not in numbers_of(summary)


def test_money_is_for_time_energy_and_bytes_sent() -> None:
    prices = Prices(device_hour=1.0, kilowatt_hour=0.5, gigabyte_sent=0.25)
    assert prices.cost(hours=2.0, joules=7.2e6, bytes_sent=4 * 10**9) == 2.0 + 1.0 + 1.0


def test_a_slower_machine_is_emulated_by_waiting_after_each_piece_of_computing() -> None:
    ledger, quick = Ledger(slow_down=4.0), Ledger()
    x = torch.ones(300, 300)
    for one in (ledger, quick):
        with one.computing("work"):
            before = time.thread_time()
            for _ in range(40):
                x @ x
            took = time.thread_time() - before
    assert ledger.compute_seconds >= 3 * took > 0  # it is the same work, at another moment
    assert ledger.compute_by_work["work"] == ledger.compute_seconds
    assert ledger.slowed(10.0, 0.0) == 10.0  # the machine was busy with something else: nothing is added
    assert quick.slowed(0.5, 0.5) == 0.5
