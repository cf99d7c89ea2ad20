"""A run in a bucket, held by one process at a time: an object that its owner renews.

On disks `lock.py` does this. Here nobody is told when an owner dies, so one that has not renewed
the object for `STALE_SECONDS` loses it to who waits for it; one that provably died on this very
machine loses it at once. The clocks of two machines are never compared: who waits looks whether
the object changes.

A process may sleep through all of that (SIGSTOP, a laptop's lid, a store that is away for it alone)
and wake in the middle of a write. So what counts is written with `Remote.write_at`, on the
condition that it is as this owner left it, and an owner that cannot renew just goes on trying.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from glamcli.conditional import ABSENT
from glamcli.errors import CheckpointError
from glamcli.hosts.lock import ANOTHER_RUN
from glamcli.storage import Remote
from glamcli.untrusted import parse_json

RENEW_SECONDS = 10.0
STALE_SECONDS = 60.0
RELEASED = "nobody"
OTHER_STORE = "give a run folder on a disk, or in a bucket whose server knows conditional writes"


def described_owner(data: bytes) -> tuple[str | None, int]:
    """The process that an object names, such as `process 12 on its-machine`, None where it was
    released; and how often it has written the object."""
    try:
        found = parse_json(data) if data else {"holder": RELEASED}
        holder, beat = str(found["holder"]), int(found.get("beat", 0))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return "another process", 0
    return (None if holder == RELEASED else holder), beat


class Lease:
    """The object at `path`, held from the end of the constructor until `release` or until `lost` is
    called, from a thread and once, with the reason: then this process must not write any more.

    `waiting` is called, with the words for it, before it waits to see whether its owner lives;
    `hint` says what to do when another process holds it.

    Raises: CheckpointError when another process holds it, or it cannot be written.
    """

    def __init__(
        self,
        path: Remote,
        waiting: Callable[[str], object],
        lost: Callable[[str], object],
        hint: str = ANOTHER_RUN,
    ):
        self._path, self._lost, self._hint = path, lost, hint
        self._me = f"process {os.getpid()} on {socket.gethostname()}"
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._over = threading.Event()
        try:
            holder, version, process = self._holder()
            if holder != RELEASED and not is_dead(process):
                version = self._await_stale(holder, version, waiting)
            self._version = path.write_at(self._content(self._me), version)
            self._refuse_ignored_conditions()
        except FileExistsError:
            raise self._in_use(self._holder()[0]) from None
        except OSError as error:
            what = f"{path} cannot be written: {error.strerror}"
            raise CheckpointError(what, _advice(error)) from error
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _refuse_ignored_conditions(self) -> None:
        """Raises: CheckpointError when the server writes whatever the condition says, as some do
        that are like Amazon's; OSError."""
        for version in (ABSENT, '"0"') if str(self._path).startswith("s3://") else ():
            with suppress(FileExistsError):
                self._path.write_at(self._content(RELEASED), version)
                what = f"{self._path}: its server ignores `If-{'' if version else 'None-'}Match`"
                raise CheckpointError(f"{what}, so two processes could train one run", OTHER_STORE)

    def release(self, seconds: float) -> None:
        """Gives it back, if it is still held and the store answers in so many seconds."""
        self._over.set()
        self._thread.join(seconds)

    def holds(self) -> bool:
        """Whether it is still held, as the store says now. Raises: OSError."""
        with suppress(ValueError, AttributeError):
            return parse_json(self._path.read_at()[0]).get("token") == self._token
        return False

    def _holder(self) -> tuple[str, str, Any]:
        """Its name, the version of the object, and what `this_process` was there."""
        data, version = self._path.read_at()
        process = None
        with suppress(ValueError, AttributeError):
            process = parse_json(data).get("process")
        return described_owner(data)[0] or RELEASED, version, process

    def _content(self, holder: str) -> bytes:
        self._beat += 1
        content = {"holder": holder, "token": self._token, "beat": self._beat}
        return json.dumps({**content, "process": this_process()}).encode()

    def _await_stale(self, holder: str, seen: str, waiting: Callable[[str], object]) -> str:
        """The version that can be taken over."""
        waiting(f"{self._path.parent} was held by {holder}: looking whether it still is")
        until = time.monotonic() + STALE_SECONDS
        while time.monotonic() < until:
            time.sleep(RENEW_SECONDS / 2)
            holder, version, _ = self._holder()
            if holder == RELEASED:
                return version
            if version != seen:
                raise self._in_use(holder)
        return seen

    def _in_use(self, holder: str) -> CheckpointError:
        what = f"run folder {self._path.parent} is in use by {holder}"
        return CheckpointError(what, self._hint)

    def _renew(self) -> None:
        content, limit = self._content(self._me), STALE_SECONDS / 2
        while not self._over.wait(RENEW_SECONDS):
            try:
                # The same again after a failure: it may have been written all the same.
                self._version = self._path.write_at(content, self._version, limit)
                content = self._content(self._me)
            except FileExistsError:
                self._lost(f"{self._path.parent} was taken over by {self._last_holder()}")
                return
            except OSError:
                continue  # others say that the store is away
        with suppress(OSError, ValueError, AttributeError):
            self._give_back()

    def _give_back(self) -> None:
        content = self._content(RELEASED)
        try:
            self._path.write_at(content, self._version)
        except FileExistsError:  # perhaps of this one, when an answer to it got lost
            data, version = self._path.read_at()
            if parse_json(data).get("token") != self._token:
                raise
            self._path.write_at(content, version)

    def _last_holder(self) -> str:
        with suppress(OSError):
            return self._holder()[0]
        return "another process"


def _advice(error: OSError) -> str | None:
    if isinstance(error, FileNotFoundError):
        return "make the bucket, or correct its name in `--run`"
    if isinstance(error, PermissionError):
        return "log in, with an account that may read and write there (docs/storage.md)"
    return None


def this_process() -> list[Any] | None:
    """What no other process has, here or elsewhere, now or later: where its number counts (boot and
    namespace), the number, and when it began. None where the system does not say."""
    with suppress(OSError):
        return [_where(), os.getpid(), _began(os.getpid())]
    return None


def is_dead(process: Any) -> bool:
    """Whether a process, as it described itself, has certainly ended; False when it may live."""
    try:
        where, number, began = process
        if where != _where():
            return False
    except (OSError, TypeError, ValueError):
        return False
    try:
        return _began(int(number)) != began
    except FileNotFoundError:
        return _has_ended(int(number))
    except (OSError, TypeError, ValueError):
        return False


def _has_ended(number: int) -> bool:
    """Where /proc shows processes to their users alone, it lacks those that live as well."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _where() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"


def _began(number: int) -> str | None:
    """In ticks since the boot; None of one that has ended and waits for its parent."""
    state, *fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
