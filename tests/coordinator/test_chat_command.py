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
