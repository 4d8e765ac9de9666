"""`isthmus link`: an emulated network link between programs on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer

from isthmus.coordinator.cli.common import Json, console, human_bytes, print_json
from isthmus.coordinator.emulation import (
    Address,
    Cut,
    EmulatedLink,
    LinkSpec,
    Pair,
    parse_rate,
    parse_share,
    parse_time,
)
from isthmus.split.errors import BadRequest, IsthmusError
from isthmus.split.tls import split_address


def link(
    listen: Annotated[
        list[str], typer.Option(help="HOST:PORT to take connections on; port 0: any free one. May be repeated.")
    ],
    to: Annotated[list[str], typer.Option(help="HOST:PORT to which those of the --listen in the same place go.")],
    rate: Annotated[str, typer.Option(help="Of the payload, each way: 20mbit, 100kbit, 1gbit, ...")] = "unlimited",
    up_rate: Annotated[str, typer.Option(help="Another rate towards --to.")] = "",
    down_rate: Annotated[str, typer.Option(help="Another rate back from there.")] = "",
    delay: Annotated[str, typer.Option(help="One way: 20ms, 0.5s, 100us, ...")] = "0ms",
    jitter: Annotated[
        str, typer.Option(help="The delay varies by as much up and down; bytes keep their order.")
    ] = "0ms",
    loss: Annotated[str, typer.Option(help="Share of packets that come a retransmission later: 1%, 0.01, ...")] = "0%",
    cut: Annotated[
        list[str] | None,
        typer.Option(help="at=30s,for=5s: nothing passes; at=30s,for=5s,reset: connections break. May be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of jitter and loss.")] = 0,
    json_output: Json = False,
) -> None:
    """Stand between two programs as a slow, far, lossy or broken network would, until Ctrl-C or SIGTERM.

    All pairs of --listen and --to share one link, with one bottleneck each way.
    A lost packet (of 1448 bytes) and what follows on its connection come later by
    max(200 ms, one round trip). Times of cuts count from the start.

    Example: isthmus link --listen 127.0.0.1:7500 --to cloud.example:7443 --rate 20mbit --delay 20ms --cut at=30s,for=5s
    """
    if len(listen) != len(to):
        raise BadRequest(
            f"{len(listen)} --listen and {len(to)} --to: give one --to for each --listen, in the same order"
        )
    spec = LinkSpec(
        up_rate=parse_rate(up_rate or rate),
        down_rate=parse_rate(down_rate or rate),
        delay=parse_time(delay),
        jitter=parse_time(jitter),
        loss=parse_share(loss),
        cuts=tuple(Cut.parse(one) for one in cut or []),
        seed=seed,
    )
    pairs = [(_listen_address(here), split_address(there)) for here, there in zip(listen, to, strict=True)]
    asyncio.run(_serve(spec, pairs, json_output))


def _listen_address(text: str) -> Address:
    """Splits HOST:PORT, where port 0 stands for any free one. Raises BadRequest."""
    host, _, port = text.rpartition(":")
    return (split_address(f"{host}:1")[0], 0) if port == "0" else split_address(text)


async def _serve(spec: LinkSpec, pairs: list[Pair], json_output: bool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    emulated = EmulatedLink(spec)
    bound = await emulated.start(pairs)
    if json_output:
        print_json({"listen": bound})
    else:
        routes = [f"{here[0]}:{here[1]} -> {to[0]}:{to[1]}" for here, (_, to) in zip(bound, pairs, strict=True)]
        console.print(f"link: {', '.join(routes)}   Ctrl-C stops", soft_wrap=True)
    await stop.wait()
    await emulated.stop()
    if json_output:
        print_json({"bytes_up": emulated.bytes_up, "bytes_down": emulated.bytes_down})
    else:
        console.print(
            f"link ended: {human_bytes(emulated.bytes_up)} up ({emulated.bytes_up} bytes), "
            f"{human_bytes(emulated.bytes_down)} down ({emulated.bytes_down} bytes)"
        )


if __name__ == "__main__":  # starts in half a second, while the other commands import torch
    try:
        typer.run(link)
    except IsthmusError as error:
        typer.echo(f"isthmus: {error}", err=True)
        raise SystemExit(1) from None
