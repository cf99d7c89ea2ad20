"""Ends a process that gets no further: says where it is, shows its stacks, exits with 86.

A process whose peer hangs waits in a collective for ever, and so does the peer's heartbeat say
that all is well. No thread of Python can help when the interpreter itself is stuck (a library that
keeps its lock), and `faulthandler`, whose own thread needs no lock, can only exit with 1. So the
message and the exit are timers of the C library, which call one of its functions with one
argument each: `warnx(text)` and `_exit(86)`. Setting all of it again costs a step about 0.1 ms.
"""

from __future__ import annotations

import ctypes
import faulthandler
import time
from contextlib import AbstractContextManager
from types import TracebackType

from glamcli.errors import EXIT_WATCHDOG

STACKS_AFTER_SECONDS = 0.2
EXIT_AFTER_SECONDS = 1.5
# Process 0 last: when the coordinator is gone, jax aborts the others.
FIRST_EXITS_AFTER_SECONDS = 4.0
LONG = 10
"""Compiling, restoring and saving may take so many times as long as a step."""


class Watchdog(AbstractContextManager["Watchdog"]):
    """Bites when `seconds` pass without a `beat`; None never does."""

    def __init__(self, seconds: float | None, name: str, *, is_first: bool = True):
        self.seconds = seconds
        self.name = name
        """of this process, for the message."""
        self._exit_after = FIRST_EXITS_AFTER_SECONDS if is_first else EXIT_AFTER_SECONDS
        self._text = ctypes.create_string_buffer(512)
        self._timers: tuple[_Timer, _Timer] | None = None

    def beat(self, where: str, times: float = 1) -> None:
        """All is well; `where` goes on from here, for `times` as long as a step."""
        if self.seconds is None:
            return
        seconds = self.seconds * times
        text = f"{self.name} got no further for {seconds:g} s, {where}; its stacks:"
        self._text.value = text.replace("%", "%%").encode(errors="replace")[:511]
        if self._timers is None:
            self._timers = _make_timers(self._text)
        if self._timers is not None:
            message, leave = self._timers
            message.set(seconds)
            leave.set(seconds + self._exit_after)
        # Without the C library's timers (not on Linux) it exits with 1.
        alone = self._timers is None
        faulthandler.dump_traceback_later(seconds + STACKS_AFTER_SECONDS, exit=alone)

    def rest(self) -> None:
        """Nothing is expected until the next beat."""
        faulthandler.cancel_dump_traceback_later()
        for timer in self._timers or ():
            timer.set(0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, error, trace
        self.rest()


class _Event(ctypes.Structure):
    """`struct sigevent` for SIGEV_THREAD, on 64-bit Linux."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _TimerSpec(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = tuple(
        (name, ctypes.c_long) for name in ("every_s", "every_ns", "after_s", "after_ns")
    )


SIGEV_THREAD = 2
PREFIX = b"error"  # the C library keeps its address


class _Timer:
    """Calls a function of the C library with one argument, in a thread of that library."""

    def __init__(self, libc: ctypes.CDLL, function: str, argument: int):
        self._libc = libc
        self._id = ctypes.c_void_p()
        address = ctypes.cast(getattr(libc, function), ctypes.c_void_p).value
        event = _Event(value=argument, notify=SIGEV_THREAD, function=address)
        if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def set(self, seconds: float) -> None:
        """In so many seconds from now, and no longer when it was set before; 0 is never."""
        whole = int(seconds)
        spec = _TimerSpec(after_s=whole, after_ns=int((seconds - whole) * 1e9))
        self._libc.timer_settime(self._id, 0, ctypes.byref(spec), None)


def _make_timers(text: ctypes.Array[ctypes.c_char]) -> tuple[_Timer, _Timer] | None:
    """Those of the message and of the exit; None where the C library has no such timers."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        message = _Timer(libc, "warnx", ctypes.addressof(text))
        leave = _Timer(libc, "_exit", EXIT_WATCHDOG)
        # What `warnx` writes before the text.
        ctypes.c_char_p.in_dll(libc, "program_invocation_short_name").value = PREFIX
    except (OSError, AttributeError, ValueError):
        return None
    return message, leave
