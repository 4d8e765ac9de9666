"""`isthmus chat` with a server and without: long conversations, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.cluster.house import run_cli
from tests.coordinator.gateway.generators import Script, saying, served_model, serving, tokenizer

LIMIT = 120.0


@contextlib.contextmanager
def server_of(script: Script) -> Iterator[str]:
    """The URL of its API, which a thread serves."""
    urls: list[str] = []
    ready, done = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serving({"m": served_model(script)}, stats=lambda: {"hops": []}) as url:
            urls.append(f"{url}/v1")
            ready.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(LIMIT)
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()


def test_an_answer_has_a_quarter_of_the_context_unless_it_is_said() -> None:
    script = saying(" yes.", context=512)
    with server_of(script) as url:
        assert run_cli("chat", "--url", url, text="hello\n\n")[:2] == (0, ">  yes.\n> ")
        assert run_cli("chat", "--url", url, "--max-tokens", "7", text="hello\n")[0] == 0
        assert run_cli("chat", "--url", url, "--max-tokens", "5000", text="hello\n")[0] == 0
    assert [answer.request.max_tokens for answer in script.answers] == [128, 7, 256]


def test_a_conversation_that_becomes_too_long_forgets_its_oldest_turns() -> None:
    script = saying(" yes, that is so.", context=120)
    questions = [f"Is bridge number {number} closed?" for number in range(12)]
    with server_of(script) as url:
        status, out, error = run_cli("chat", "--url", url, text="\n".join(questions))
    assert (status, error, out.count("that is so")) == (0, "", 12)
    prompts = [str(tokenizer().decode(answer.request.prompt)) for answer in script.answers]
    assert all(question in prompt for question, prompt in zip(questions, prompts, strict=True))
    assert "number 0 closed" in prompts[1]
    assert "number 10 closed" in prompts[-1]
    assert "number 0 closed" not in prompts[-1]


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_message_that_is_too_long_by_itself_does_not_end_the_conversation(where: str) -> None:
    lines, script = f"hello\n{'bridge ' * 2000}\nhello again\n", saying(" yes.", context=512)
    if where == "here":
        status, out, error = run_cli("chat", "--local", "--runtime", "torch", "--max-tokens", "3", text=lines)
    else:
        with server_of(script) as url:
            status, out, error = run_cli("chat", "--url", url, text=lines)
        last = str(tokenizer().decode(script.answers[-1].request.prompt))
        assert [part in last for part in ("hello\n", " yes.", "bridge", "hello again")] == [True, True, False, True]
    assert (status, out.count("> ")) == (0, 4)
    assert error.count("\n") == 1
    assert "context" in error


# What a shell does around a command: the terminal is its own, and what the command leaves there is its next line.
SHELL = """
import fcntl, os, select, signal, subprocess, sys, termios, tty
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, lambda *_: None)
before = termios.tcgetattr(0)
status = subprocess.call(sys.argv[1:])
same = termios.tcgetattr(0) == before
tty.setcbreak(0, termios.TCSANOW)  # to see a part of a line, too
left = b""
while select.select([0], [], [], 1)[0]:
    left += os.read(0, 65536)
print(f"STATUS {status} SAME {same} LEFT {left!r:.80} END")
"""


class Terminal:
    """Runs `isthmus chat ARGUMENTS` as a shell does, in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        command = [
            sys.executable,
            "-c",
            SHELL,
            sys.executable,
            "-m",
            "isthmus.coordinator.cli.main",
            "chat",
            *arguments,
        ]
        self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self._seen = b""
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def paste(self, text: bytes) -> None:
        """As a terminal's window does it: it goes on as the terminal takes it."""
        threading.Thread(target=self._write, args=(text,), daemon=True).start()

    def wait_for(self, text: str, times: int = 1) -> str:
        """All that was shown so far."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._seen.count(text.encode()) >= times, LIMIT), self._seen[-2000:]
        return self._seen.decode(errors="replace")

    def end(self) -> str:
        """What the shell says at the end."""
        line = self.wait_for(" END").rpartition("STATUS")[2]
        assert self._process.wait(LIMIT) == 0
        return line.partition(" END")[0].strip()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(LIMIT)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self._ours, 65536):
                with self._changed:
                    self._seen += data
                    self._changed.notify_all()

    def _write(self, text: bytes) -> None:
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(self._ours, text[:1000]) :]


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()


PASTED = b"rm -rf everything\nand a part of a line"
MORE = b"".join(b"echo line %d of a long paste\n" % number for number in range(5000)) + b"a part"


@pytest.mark.parametrize(
    ("how", "status"),
    [
        pytest.param(b"\n" + PASTED, 0, id="an empty line"),
        pytest.param(b"\n" + MORE, 0, id="an empty line in a long paste"),
        pytest.param(b"\x04" + PASTED, 0, id="Ctrl-D"),
        pytest.param(b"\x03" + PASTED, 130, id="Ctrl-C"),
    ],
)
def test_nothing_that_was_pasted_comes_to_the_shell(how: bytes, status: int) -> None:
    with server_of(saying(" yes.", context=512)) as url, terminal("--url", url) as window:
        window.wait_for("> ")
        window.paste(b"hello\n")
        window.wait_for("> ", 2)
        window.paste(how)
        assert window.end() == f"{status} SAME True LEFT b''"


def test_nothing_that_was_pasted_comes_to_the_shell_after_an_error() -> None:
    with terminal("--url", "http://127.0.0.1:9/v1") as window:
        window.paste(PASTED)
        assert window.end() == "1 SAME True LEFT b''"
        assert "http://127.0.0.1:9/v1 cannot be reached" in window.wait_for("isthmus: ")


@pytest.mark.parametrize("line", ["y" * 4095, "y" * 20_000, "\N{LATIN SMALL LETTER E WITH ACUTE}" * 3000])
def test_a_line_that_a_terminal_cuts_is_refused_and_the_conversation_goes_on(line: str) -> None:
    script = saying(" yes.", context=8192)
    with server_of(script) as url, terminal("--url", url) as window:
        window.wait_for("> ")
        window.paste(line.encode() + b"\n" + PASTED)
        window.wait_for("this line is left out, with what was pasted after it: a terminal keeps 4095 bytes")
        window.wait_for("> ", 2)
        window.paste(b"hello again\n")
        window.wait_for(" yes.")
        window.paste(b"\n")
        assert window.end() == "0 SAME True LEFT b''"
    (answer,) = script.answers
    prompt = str(tokenizer().decode(answer.request.prompt))
    assert "hello again" in prompt
    assert not any(part in prompt for part in ("yy", "rm -rf", "part of"))


def test_a_long_line_comes_whole_from_a_terminal_and_a_longer_one_from_a_pipe() -> None:
    script = saying(" yes.", context=100_000)
    lines = [" ".join(f"bridge {number}" for number in range(count)) for count in (380, 2000)]
    assert 4000 < len(lines[0]) < 4095 < len(lines[1])
    with server_of(script) as url:
        with terminal("--url", url) as window:
            window.wait_for("> ")
            window.paste(lines[0].encode() + b"\n")
            window.wait_for(" yes.")
            window.paste(b"\n")
            assert window.end() == "0 SAME True LEFT b''"
        assert run_cli("chat", "--url", url, text=f"{lines[1]}\n")[:2] == (0, ">  yes.\n> ")
    for line, answer in zip(lines, script.answers, strict=True):
        assert line in str(tokenizer().decode(answer.request.prompt))


def test_piped_bytes_that_are_no_text_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_text(_: str) -> str:
        return b"caf\xe9".decode()

    monkeypatch.setattr("builtins.input", no_text)
    with server_of(saying(" yes.", context=512)) as url:
        status, _, error = run_cli("chat", "--url", url)
    assert (status, error) == (1, "isthmus: standard input is no text in UTF-8: convert it first\n")


def test_ctrl_c_at_the_prompt_ends_it() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "isthmus.coordinator.cli.main", "chat", "--local", "--runtime", "torch"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        try:
            seen, end = b"", time.monotonic() + LIMIT
            while b"> " not in seen:
                assert select.select([ours], [], [], max(0.0, end - time.monotonic()))[0], seen
                seen += os.read(ours, 4096)
            heard = False
            while not heard:  # Python does not notice one that comes between a prompt and the reading after it
                assert time.monotonic() < end
                process.send_signal(signal.SIGINT)
                heard = bool(select.select([ours], [], [], 5)[0])
            assert process.wait(LIMIT) == 130
        finally:
            process.kill()
            os.close(ours)
