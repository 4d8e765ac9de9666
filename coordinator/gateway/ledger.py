"""What a served model uses of the five resources: at the gateway, at each holder, and for each guest.

Bytes are those of messages really sent; memory and energy are what each holder's process says of itself. FLOPs are
calculated from the tokens that were computed, since one token's matrix products and attention are the same in every
runtime; the arithmetic of LoRA adapters and of a draft model is not in them. What nobody has measured is None, or
`unknown`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from isthmus.protos.v1 import chain_pb2 as pb
from isthmus.split.inference.remote import RemoteHolder
from isthmus.split.models.stage import StageSpec, skeleton
from isthmus.split.resources.energy import UNKNOWN
from isthmus.split.resources.ledger import Ledger
from isthmus.split.resources.prices import Prices
from isthmus.split.resources.traffic import Traffic

CALCULATED = "calculated"
_PATIENCE = 2.0  # seconds for holders to say what they have spent
_SUMS = ("batches", "tokens", "attended", "seconds", "computing", "coding")  # sums that a Cost has


@dataclass
class _HolderAccount:
    """The account of one holder of one span, over all of its streams."""

    device: str  # empty for an actor at the coordinator
    blocks: int
    traffic: Traffic = field(default_factory=Traffic)
    present: RemoteHolder | None = None
    ended: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))  # sums of earlier streams
    spent: dict[int, pb.Spent] = field(default_factory=dict)  # by process, which may be another after a restart
    process: int = 0
    untold: bool = False  # whether a process has gone without having said what it had spent

    def sums(self) -> dict[str, float]:
        now = {} if self.present is None else vars(self.present.cost)
        return {name: before + now.get(name, 0) for name, before in self.ended.items()}

    def heard(self) -> None:
        if self.present is not None and self.present.spent is not None:
            self.spent[self.process] = self.present.spent

    def end(self) -> None:
        self.heard()
        self.ended, self.present = self.sums(), None
        self.untold |= self.process not in self.spent


@dataclass(frozen=True)
class _Flops:
    """Operations that one token takes.

    per_token: matrix products of one token in one block.
    per_pair: attention of one pair of tokens in one block.
    per_logits: the head, for one token.
    """

    per_token: float
    per_pair: float
    per_logits: float

    @classmethod
    def of(cls, config: PreTrainedConfig) -> _Flops:
        block = skeleton(config, StageSpec(0, 1, embeds=False, head=False))
        linear = sum(value.numel() for value in block.parameters() if value.ndim == 2)
        heads = int(config.num_attention_heads)
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(2.0 * linear, 4.0 * heads * head_size, 2.0 * config.vocab_size * config.hidden_size)


class ServedLedger:
    """The resources of one served model, from its gateway's start on.

    config: the whole model's configuration.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._flops, self._prices = _Flops.of(config), Prices()
        self._own = Ledger()
        self._holders: dict[tuple[str, str], _HolderAccount] = {}  # by span and name
        self._guests: dict[str, Traffic] = {}  # by device

    # ---- what the chain's servicer tells ----

    def joined(self, span: str, holder: RemoteHolder, device: str, hello: pb.Hello) -> Traffic:
        """Notes that a holder's stream has begun; returns what its messages are counted in."""
        new = _HolderAccount(device, hello.last - hello.first)
        account = self._holders.setdefault((span, holder.name), new)
        account.present, account.process = holder, hello.process
        return account.traffic

    def left(self, span: str, holder: RemoteHolder) -> None:
        account = self._holders.get((span, holder.name))
        if account is not None and account.present is holder:  # else it has already come by another stream
            account.end()

    def guest(self, device: str) -> Traffic:
        """What the messages of a guest are counted in."""
        return self._guests.setdefault(device, Traffic())

    # ---- what a report shows ----

    async def ask(self) -> None:
        """Brings up to date what holders have spent, as far as they answer soon."""
        present = [one.present for one in self._holders.values() if one.present is not None]
        await asyncio.gather(*(holder.ask_spent(_PATIENCE) for holder in present))
        for account in self._holders.values():
            account.heard()

    def report(self, rows_scored: int) -> dict[str, Any]:
        """The report, as JSON has it.

        rows_scored: number of hidden states that the gateway's head has made into logits.
        """
        holders = [self._holder_row(*key, account) for key, account in sorted(self._holders.items())]
        guests = [self._guest_row(name, traffic) for name, traffic in sorted(self._guests.items())]
        return {"gateway": self._gateway_row(rows_scored, holders), "holders": holders, "guests": guests}

    def _gateway_row(self, rows_scored: int, holders: Iterable[dict[str, Any]]) -> dict[str, Any]:
        traffic = Traffic()
        for one in [*(account.traffic for account in self._holders.values()), *self._guests.values()]:
            traffic.add(one)
        self._own.traffic = traffic
        unmeasured = dict.fromkeys(("compute_seconds", "encode_seconds", "decode_seconds", "codec_memory_bytes"))
        return {
            **self._own.summary(),
            **unmeasured,
            "flops": rows_scored * self._flops.per_logits,
            "flops_source": CALCULATED,
            "wait_seconds": None,  # meanwhile the gateway goes on with other sequences
            "link_seconds": sum(row["link_seconds"] for row in holders),
        }

    def _holder_row(self, span: str, name: str, account: _HolderAccount) -> dict[str, Any]:
        sums, blocks, flops = account.sums(), account.blocks, self._flops
        row = {
            "name": name,
            "device": account.device,
            "span": span,
            "batches": int(sums["batches"]),
            "tokens": int(sums["tokens"]),
            "flops": blocks * (sums["tokens"] * flops.per_token + sums["attended"] * flops.per_pair),
            "flops_source": CALCULATED,
            "compute_seconds": sums["computing"],
            "coding_seconds": sums["coding"],
            "link_seconds": max(0.0, sums["seconds"] - sums["computing"] - sums["coding"]),
            **_bytes_of(account.traffic),
        }
        return {**row, **self._spent_row(account, row["bytes_sent"])}

    def _spent_row(self, account: _HolderAccount, sent: int) -> dict[str, Any]:
        """Memory, energy and money of a holder; None where one of its processes has not told."""
        spent = list(account.spent.values())
        silent = account.present is not None and account.process not in account.spent
        if silent or account.untold:
            energy = {"energy_joules": None, "energy_source": UNKNOWN}
            accelerator = {"accelerator_energy_joules": None, "accelerator_energy_source": UNKNOWN}
            memory = dict.fromkeys(("peak_bytes", "accelerator_peak_bytes"))
            return {**memory, **energy, **accelerator, "money": None, "currency": self._prices.currency}
        joules = _sum(one.energy_joules if one.HasField("energy_joules") else None for one in spent)
        accelerator_joules = _sum(
            one.accelerator_energy_joules if one.HasField("accelerator_energy_joules") else None for one in spent
        )
        known = (joules or 0.0) + (accelerator_joules or 0.0)
        return {
            "peak_bytes": max(one.peak_bytes for one in spent),
            "accelerator_peak_bytes": max(one.accelerator_peak_bytes for one in spent),
            "energy_joules": joules,
            "energy_source": spent[-1].energy_source[:16],
            "accelerator_energy_joules": accelerator_joules,
            "accelerator_energy_source": spent[-1].accelerator_energy_source[:16],
            "money": self._prices.cost(sum(one.seconds for one in spent) / 3600, known, sent),
            "currency": self._prices.currency,
        }

    def _guest_row(self, device: str, traffic: Traffic) -> dict[str, Any]:
        """The row of a guest, which computes its own blocks for itself and tells nobody what that takes."""
        unknown = dict.fromkeys(("flops", "peak_bytes", "energy_joules", "link_seconds", "money"))
        return {"name": device, **unknown, "energy_source": UNKNOWN, **_bytes_of(traffic)}


def _bytes_of(traffic: Traffic) -> dict[str, Any]:
    """Bytes of the other side, which sent what the gateway received; the rows are as the gateway counted."""
    return {
        "bytes_sent": traffic.total_bytes("received"),
        "bytes_received": traffic.total_bytes("sent"),
        "traffic": traffic.rows(),
    }


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def count(traffic: Traffic, direction: str, message: pb.FromHolder | pb.ToHolder) -> None:
    """Counts a message of the chain's streams that has crossed the wire.

    direction: "sent" or "received".
    """
    kind = message.WhichOneof("kind") or "unknown"
    inside = getattr(message, kind) if kind in ("batch", "result") else None
    payload, codec = (len(inside.hidden.payload), inside.hidden.codec) if inside is not None else (0, "")
    traffic.crossed(direction, kind, codec, payload, message.ByteSize())
