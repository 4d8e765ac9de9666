"""`isthmus link`: a link as a process of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
from typer.testing import CliRunner

from isthmus.coordinator.emulation import Address, Cut, LinkSpec, link_process

ANY: Address = ("127.0.0.1", 0)
COMMAND = [sys.executable, "-m", "isthmus.coordinator.cli.link"]
LIMIT = 60.0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT, check=False)


def test_a_process_carries_bytes_and_tells_how_many_when_it_ends() -> None:
    spec = LinkSpec(up_rate=8e6, delay=0.005, jitter=0.001, loss=1e-6, cuts=(Cut(600.0, 1.5, reset=True),), seed=3)
    with socket.create_server(ANY) as server:
        server.settimeout(LIMIT)
        with link_process(spec, [(ANY, server.getsockname()), (ANY, server.getsockname())]) as link:
            assert len(link.addresses) == 2
            for address in link.addresses:
                with socket.create_connection(address, LIMIT) as near, server.accept()[0] as far:
                    near.sendall(b"hello")
                    assert far.recv(5, socket.MSG_WAITALL) == b"hello"
                    far.sendall(b"hi")
                    assert near.recv(2, socket.MSG_WAITALL) == b"hi"
    assert (link.bytes_up, link.bytes_down) == (10, 4)
    assert not psutil.pid_exists(link.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_runs_until_it_is_told_to_end_and_then_prints_the_totals(number: signal.Signals) -> None:
    arguments = ["--listen", "127.0.0.1:0", "--to", "127.0.0.1:9", "--rate", "20mbit", "--delay", "20ms"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("link: 127.0.0.1:")
        process.send_signal(number)
        rest, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert "0 B up" in rest
    assert "0 B down" in rest


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--rate", "fast"], "'fast' is not a rate above 0 such as 20mbit"),
        (["--delay=-5ms"], "'-5ms' is not a time such as 20ms"),
        (["--loss", "100%"], "loss 1 is not a share of packets below 1"),
        (["--cut", "at=3"], "cut 'at=3' is not at=TIME,for=TIME"),
        (["--to", "127.0.0.1:10"], "1 --listen and 2 --to: give one --to for each --listen"),
        (["--to", "here", "--listen", "127.0.0.1:0"], "'here' is not HOST:PORT"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(arguments: list[str], line: str) -> None:
    done = run("--listen", "127.0.0.1:0", "--to", "127.0.0.1:9", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("isthmus: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_one_line_too() -> None:
    with socket.create_server(ANY) as taken:
        port = taken.getsockname()[1]
        done = run("--listen", f"127.0.0.1:{port}", "--to", "127.0.0.1:9")
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_it_is_a_command_of_isthmus_and_its_help_has_an_example() -> None:
    from isthmus.coordinator.cli.main import app

    assert "Example: isthmus link --listen" in CliRunner().invoke(app, ["link", "--help"]).stdout


def test_it_starts_without_torch_and_ray() -> None:
    script = "import isthmus.coordinator.cli.link, json, sys; print(json.dumps(list(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    assert "isthmus.coordinator.emulation" in loaded
    assert not {"torch", "ray", "transformers"} & set(loaded)


def test_a_spec_survives_its_command_line() -> None:
    spec = replace(LinkSpec.parse_short("1.5mbit,1ms"), cuts=(Cut(0.25, 1e-3),))
    with socket.create_server(ANY) as server, link_process(spec, [(ANY, server.getsockname())]) as link:
        command = psutil.Process(link.pid).cmdline()
    assert "--up-rate=1500000.000bit" in command
    assert "--cut=at=0.250000000s,for=0.001000000s" in command
