"""One TCP connection from every process of a run to process 0, for as long as the run lives: it
tells at once who died and why, and carries small values between all (docs/decisions/0008).

A message is one JSON object per line. Who is at the other end was proved in `greeting.py`; what it
sends is checked all the same, and a connection that carries anything else counts as failed.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from glamcli.errors import DataError, HostError
from glamcli.untrusted import parse_json

# When a run hangs, all processes should end by their own watchdogs, which show their stacks; one
# that ends first must not take the others along before that.
GONE_SECONDS = 10.0
# A machine that lost power or network sends nothing, so the kernel probes it.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
MESSAGE_BYTES = 2**26
"""of one message at most; what may be larger goes in parts (`Host.of_first`)."""
SHOWN_BYTES = 40
"""of something else that came instead of a message."""
ERROR_CHARACTERS = 10_000
"""of another process's error that are shown and passed on."""

Message = dict[str, Any]


class Connection:
    """Messages over one connection; several threads may send, one receives."""

    def __init__(self, sock: socket.socket, name: str = ""):
        self.name = name
        """of the process at the other end."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.socket = sock
        self._received = bytearray()
        self._num_searched = 0
        """of the bytes received, those that hold no end of a message."""
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Sends, unless the other side is gone; the thread that receives notices that.

        Raises: DataError when the message is larger than the other side accepts.
        """
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MESSAGE_BYTES:
            raise DataError(
                f"`{message.get('put') or message.get('all')}`: {len(line):,} bytes, and processes "
                f"exchange no more than {MESSAGE_BYTES:,} at once"
            )
        with self._lock, suppress(OSError):
            self.socket.sendall(line)

    def receive(self, limit: int, until: float | None = None) -> Message | None:
        """The next message; None when the other side is gone.

        Raises:
            ValueError: what came is no message, or has more than `limit` bytes.
            TimeoutError: no whole message came before `until`, of the monotonic clock.
        """
        while (message := self.take(limit)) is None:
            if until is not None:
                left = until - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self.socket.settimeout(left)
            if not self.fill():
                return None
        return message

    def fill(self) -> bool:
        """Receives some of what has come; False when the other side is gone.

        Raises: BlockingIOError or TimeoutError when nothing came for as long as the socket waits.
        """
        try:
            received = self.socket.recv(1 << 16)
        except (BlockingIOError, TimeoutError):
            raise
        except OSError:
            return False
        self._received += received
        return bool(received)

    def take(self, limit: int) -> Message | None:
        """The next message, if all of it has been received.

        Raises: ValueError when what was received is no message, or has more than `limit` bytes.
        """
        end = self._received.find(b"\n", self._num_searched)
        self._num_searched = len(self._received) if end < 0 else 0
        if max(end, self._num_searched) > limit:
            raise ValueError(f"more than {limit:,} bytes at once")
        if end < 0:
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = parse_json(line)
        except ValueError:
            raise ValueError(f"no JSON: {line[:SHOWN_BYTES]!r}") from None
        if not isinstance(message, dict):
            raise ValueError(f"no JSON object: {line[:SHOWN_BYTES]!r}")
        return message

    def is_gone(self) -> bool:
        """Whether the other side, from which no message is expected, has closed the connection."""
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        with suppress(OSError):
            self.socket.close()


class Wire:
    """The connections of this process: to all others in process 0, to process 0 in the others."""

    def __init__(self, index: int, names: list[str], connections: dict[int, Connection]):
        self.index = index
        self.names = names
        """`process 1 (its machine)` of every process."""
        self.connections = connections
        self._changed = threading.Condition()
        self._values: dict[str, dict[int, Any]] = {}
        """of every gathering under way, by process."""
        self._num_gathered = 0
        self._awaited = ""
        """the gathering whose values process 0 has to send next."""
        self._closing = False
        self._over = False
        self._threads = [
            threading.Thread(target=self._read, args=(peer, connection), name=f"wire {peer}")
            for peer, connection in connections.items()
        ]

    def start(self, ended: Callable[[str, str | None, int], None]) -> None:
        """Begins to listen to the others.

        `ended(what, hint, code)` is called once, by a thread of its own, when another process
        failed (`what` contains its error) or is gone.
        """
        self._ended = ended
        for thread in self._threads:
            thread.start()

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values (for JSON) of all processes, in their order, once all have called this.

        Raises: DataError when they are too large to be sent; HostError, in one of the processes,
            when others gather something else.
        """
        key = f"{self._num_gathered} {name}"
        self._num_gathered += 1
        if self.index:
            self._awaited = key
            self._send_all({"put": key, "value": value})
        else:
            self._add(key, {0: value})
        with self._changed:
            self._changed.wait_for(lambda: len(self._values.get(key, ())) == len(self.names))
            values = self._values.pop(key)
        ordered = [values[index] for index in range(len(self.names))]
        if self.index == 0:
            self._send_all({"all": key, "values": ordered})
        return ordered

    def fail(self, what: str, hint: str | None, code: int) -> None:
        """Tells all others that this process failed and why."""
        with self._changed:
            self._closing = True  # the others leave because of this
        self._send_all({"failed": self.index, "what": what, "hint": hint, "code": code})

    def wait_for_others(self, seconds: float) -> None:
        """Returns when all others have closed their connections, at the latest after `seconds`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(x.is_gone() for x in self.connections.values()):
            time.sleep(0.02)

    def close(self, first: Callable[[], object]) -> None:
        """Closes the connections once every process has called this, after calling `first`."""
        self.gather("close", None)
        with self._changed:
            self._closing = True
        self.gather("closing", None)  # from here on, a closed one is not an error
        first()
        self._send_all({"bye": self.index})
        self._close_all()

    def _close_all(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for connection in self.connections.values():
            connection.close()

    def _read(self, peer: int, connection: Connection) -> None:
        what = None
        try:
            while (message := connection.receive(MESSAGE_BYTES)) is not None:
                if "bye" in message:
                    return
                self._hear(peer, message)
            if self.index == 0 and not self._closing:
                time.sleep(GONE_SECONDS)
        except HostError as error:
            what = error.what
        except ValueError as error:
            what = f"it sent something that no process of a run sends: {error}"
        self._end({"failed": peer, "what": what, "hint": None, "code": HostError.exit_code})

    def _hear(self, peer: int, message: Message) -> None:
        """Raises: ValueError when no process sends this, or not now; HostError from `_add`."""
        match message:
            case {"put": str(key), "value": value} if self.index == 0 and not self._has_put(peer):
                self._add(key, {peer: value})
            case {"all": str(key), "values": [*values]} if key == self._awaited and len(
                values
            ) == len(self.names):
                self._add(key, dict(enumerate(values)))
            case {
                "failed": int(k),
                "what": str() | None,
                "hint": str() | None,
                "code": int(code),
            } if peer in (0, k) and k in range(len(self.names)) and code in range(256):
                self._end(message)
            case _:
                raise ValueError(", ".join(f"`{key}`" for key in message)[:SHOWN_BYTES])

    def _has_put(self, peer: int) -> bool:
        """Whether the process has sent a value that is still being gathered: it sends no other."""
        with self._changed:
            return any(peer in values for values in self._values.values())

    def _add(self, key: str, values: dict[int, Any]) -> None:
        """Raises: HostError when something else is being gathered: both would wait without end."""
        with self._changed:
            if len(keys := sorted({*self._values, key})) > 1:
                at = ", ".join(f"`{each}`" for each in keys)
                raise HostError(
                    f"processes wait for each other at different places: {at}",
                    hint="start them with the same command, and on the same files",
                )
            self._values.setdefault(key, {}).update(values)
            self._changed.notify_all()

    def _end(self, message: Message) -> None:
        with self._changed:
            if self._closing or self._over:
                return
            self._over = True
        message = {key: _short(value) for key, value in message.items()}
        if self.index == 0:
            self._send_all(message)
        name = self.names[message["failed"]]
        if message["what"] is None:
            what = f"{name} is gone: it was killed, or its machine or network failed"
            hint = "see the last lines of its output; rerun the same command on every machine"
        else:
            what, hint = f"{name} failed: {message['what']}", message["hint"]
        self._ended(what, hint, message["code"])

    def _send_all(self, message: Message) -> None:
        for connection in self.connections.values():
            connection.send(message)


def _short(value: Any) -> Any:
    return value[:ERROR_CHARACTERS] if isinstance(value, str) else value
