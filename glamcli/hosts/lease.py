"""A run in a bucket, held by one process at a time: an object that its owner renews.

On disks `lock.py` does this. Here nobody is told when an owner dies, so one that has not renewed
the object for `STALE_SECONDS` loses it to who waits for it. The clocks of two machines are never
compared: who waits looks whether the object changes.

A process may sleep through all of that (SIGSTOP, a laptop's lid) and wake in the middle of a write.
So what counts is written with `Remote.write_at`, on the condition that it is as this owner left it.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from glamcli.errors import CheckpointError
from glamcli.storage import Remote
from glamcli.untrusted import parse_json

RENEW_SECONDS = 10.0
STALE_SECONDS = 60.0
RELEASED = "nobody"


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

    `waiting` is called, with the words for it, before it waits to see whether its owner lives.

    Raises: CheckpointError when another process holds it, or it cannot be written.
    """

    def __init__(
        self, path: Remote, waiting: Callable[[str], object], lost: Callable[[str], object]
    ):
        self._path, self._lost = path, lost
        self._me = f"process {os.getpid()} on {socket.gethostname()}"
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._over = threading.Event()
        try:
            holder, generation = self._holder()
            if holder != RELEASED:
                generation = self._await_stale(holder, generation, waiting)
            self._renewed = time.monotonic()
            self._generation = path.write_at(self._content(self._me), generation)
        except FileExistsError:
            raise self._in_use(self._holder()[0]) from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives it back, if it is still held."""
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            self._path.write_at(self._content(RELEASED), self._generation)

    def _holder(self) -> tuple[str, int]:
        data, generation = self._path.read_at()
        return described_owner(data)[0] or RELEASED, generation

    def _content(self, holder: str) -> bytes:
        self._beat += 1
        return json.dumps({"holder": holder, "token": self._token, "beat": self._beat}).encode()

    def _await_stale(self, holder: str, seen: int, waiting: Callable[[str], object]) -> int:
        """The generation that can be taken over."""
        waiting(f"{self._path.parent} was held by {holder}: looking whether it still is")
        until = time.monotonic() + STALE_SECONDS
        while time.monotonic() < until:
            time.sleep(RENEW_SECONDS / 2)
            holder, generation = self._holder()
            if holder == RELEASED:
                return generation
            if generation != seen:
                raise self._in_use(holder)
        return seen

    def _in_use(self, holder: str) -> CheckpointError:
        return CheckpointError(
            f"run folder {self._path.parent} is in use by {holder}",
            hint="choose another folder with `--run`",
        )

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            start = time.monotonic()
            try:
                content = self._content(self._me)
                self._generation = self._path.write_at(content, self._generation)
                self._renewed = start  # others may count from then
            except FileExistsError:
                self._lost(f"{self._path.parent} was taken over by {self._last_holder()}")
                return
            except OSError as error:
                if time.monotonic() > self._renewed + STALE_SECONDS:
                    self._lost(f"{self._path} could not be renewed: {error.strerror}")
                    return

    def _last_holder(self) -> str:
        with suppress(OSError):
            return self._holder()[0]
        return "another process"
