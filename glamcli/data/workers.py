"""Processes that make parts: started with the first part, ended with the `with` block."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from glamcli.data.parts import Part, make_part
from glamcli.data.tokenizer import Tokenizer
from glamcli.errors import DataError

# Of the worker process: set once when it starts, so a tokenizer is sent once and not per part.
_tokenizer: Tokenizer | None = None


class Workers:
    """Makes parts in `processes` processes (0: one per core; 1: in this one)."""

    def __init__(self, tokenizer: Tokenizer, processes: int):
        self.tokenizer = tokenizer
        self.processes = processes or num_cores()
        self._pool: ProcessPoolExecutor | None = None
        self._pending: set[Future[None]] = set()

    def submit(self, part: Part) -> None:
        """Starts a part; waits first when every process has one to do and one to come.

        Raises: what a part raised.
        """
        if self.processes == 1:
            make_part(part, self.tokenizer)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.processes,
                # Not fork: the caller may have threads (JAX does), which a fork would cut off.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self.tokenizer,),
            )
        self.wait(2 * self.processes - 1)
        self._pending.add(self._pool.submit(_make, part))

    def wait(self, num_left: int = 0) -> None:
        """Returns when so few parts are left to make. Raises: what a part raised."""
        while len(self._pending) > num_left:
            done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                "a process that prepares rows ended unexpectedly (out of memory?)",
                hint="run again: finished parts are kept; fewer `data.prepare_processes` need "
                "less memory",
            ) from error


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start(tokenizer: Tokenizer) -> None:
    """Runs in every worker process before its first part."""
    global _tokenizer
    _tokenizer = tokenizer
    # Ctrl-C reaches the whole process group; only the parent reacts, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(part: Part) -> None:
    assert _tokenizer is not None
    make_part(part, _tokenizer)
