"""The ledger counts what really ran and what really was sent."""

from __future__ import annotations

import threading

import torch
from torch import nn

from split.ledger import Ledger, Traffic


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


def test_traffic_keeps_directions_kinds_and_overhead_apart() -> None:
    traffic = Traffic()
    traffic.crossed("sent", "forward", payload=100, total=120)
    traffic.crossed("sent", "forward", payload=100, total=110)
    traffic.crossed("received", "forward", payload=50, total=50)
    assert traffic.total_bytes("sent") == 230
    assert traffic.rows() == [
        {"direction": "received", "kind": "forward", "messages": 1, "payload_bytes": 50, "overhead_bytes": 0},
        {"direction": "sent", "kind": "forward", "messages": 2, "payload_bytes": 200, "overhead_bytes": 30},
    ]


def test_the_summary_says_where_its_energy_is_from() -> None:
    summary = Ledger().summary()
    assert summary["energy_source"] in ("rapl", "estimated")
    assert summary["peak_bytes"] > 0
