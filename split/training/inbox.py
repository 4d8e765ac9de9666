"""One thread that does, in order, what others put into it. What only this thread touches needs no lock."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

from isthmus.split.errors import BadRequest, IsthmusError

_LOOK_EVERY = 1.0  # seconds


class Inbox:
    """A thread and its queue of work.

    look: is called about once a second.
    fail: is called with the error of a piece of work.

    Both are called in the thread.
    """

    def __init__(self, name: str, *, look: Callable[[], None], fail: Callable[[IsthmusError], None]) -> None:
        self._look, self._fail = look, fail
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def post(self, work: Callable[[], None], refused: Callable[[BadRequest], None]) -> Future[None]:
        """Puts work in that may refuse what it was given; `refused` then gets the error.

        The future is done when the work is.
        """
        taken: Future[None] = Future()

        def guarded() -> None:
            try:
                work()
            except BadRequest as error:
                refused(error)
            finally:
                if taken.set_running_or_notify_cancel():  # false if whoever waited has cancelled meanwhile
                    taken.set_result(None)

        self._queue.put(guarded)
        return taken

    def close(self) -> None:
        """Ends the thread once all work put in is done."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.get_num_threads()  # takes up the process's setting, for new threads of a Ray worker compute with one
        looked = time.monotonic()
        while True:
            try:
                work = self._queue.get(timeout=_LOOK_EVERY)
            except queue.Empty:
                work = self._look
            if work is None:
                return
            try:
                work()
                if time.monotonic() - looked > _LOOK_EVERY:
                    looked = time.monotonic()
                    self._look()
            except IsthmusError as error:
                self._fail(error)
            except Exception as error:  # a bug, or no memory left: every device is told, so that none waits for ever
                self._fail(IsthmusError(f"the stage failed: {type(error).__name__}: {error}"))
                raise
