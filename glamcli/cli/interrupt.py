"""Work that Ctrl-C leaves at once, though a compiler takes minutes to react to it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

_T = TypeVar("_T")


def interruptible(run: Callable[[], _T]) -> _T:
    """`run()` in another thread: a compiler takes minutes to react to Ctrl-C, this thread does not.
    `main.run` then ends the process without waiting for the other one."""
    future = ThreadPoolExecutor(1).submit(run)
    while not future.done():
        wait([future], timeout=0.2)
    return future.result()
