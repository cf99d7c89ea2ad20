"""Process 0 while it waits for the others: whoever connects has to prove that they know the secret.

Anybody may connect. Process 0 hears many at once, and until a proof was right it reads a few bytes
and believes nothing, so that strangers cost the run neither time nor its life.
"""

import errno
import functools
import math
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable

from glamcli.errors import GlamError, HostError, RecipeError, first_of
from glamcli.hosts.rendezvous import split_address
from glamcli.hosts.secret import SECRET_VARIABLE, is_equal, proof
from glamcli.hosts.wire import Connection, Wire

HELLO_SECONDS = 5.0
HELLO_BYTES = 2048
MOST_GUESTS = 128
"""connections without a proof; when one more comes, the oldest is closed. A process of the run
answers within moments; closed all the same, it comes again."""
MOST_PROCESSES = 2**20
RETRY_SECONDS = 0.2
SHOWN = 8
"""processes that an error or warnings name."""


class Door:
    """Process 0, while it waits for the others."""

    def __init__(self, listen: str, count: int, secret: bytes, warn: Callable[[str], None]):
        """Listens at the address `listen` for all but one of `count` processes.

        Raises: RecipeError when the address cannot be used.
        """
        self._server = server = _listen(listen, count)
        server.setblocking(False)
        self._count, self._secret, self._warn = count, secret, warn
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._guests: dict[socket.socket, tuple[Connection, str, float]] = {}
        """who has given no proof yet: the challenge, and until when they may; the oldest first."""
        self._connections: dict[int, Connection] = {}
        """the processes that have come."""
        self._odd: list[str] = []
        """processes that came with another secret, as they call themselves."""

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, *error: object) -> None:
        for sock in [*self._guests]:
            self._send_away(sock)
        self._selector.close()
        self._server.close()

    def receive_all(self, address: str, seconds: float) -> Wire:
        """Waits for all others.

        Raises:
            HostError: some did not come.
            RecipeError: one was started differently.
        """
        until = time.monotonic() + seconds
        while len(self._connections) < self._count - 1 or self._forget_gone():
            left = until - time.monotonic()
            if left <= 0:
                self._give_up(f"to {address} within {seconds:g} s")
            self._wait(left)
        others = [self._connections[k] for k in range(1, self._count)]
        names = [f"process 0 ({socket.gethostname()})", *(each.name for each in others)]
        for connection in others:
            connection.socket.settimeout(None)
            connection.send({"names": names})
        return Wire(0, names, self._connections)

    def _wait(self, seconds: float) -> None:
        """Hears whoever says something next, within `seconds`."""
        now = time.monotonic()
        first = min((until for _, _, until in self._guests.values()), default=math.inf)
        for key, _ in self._selector.select(min(seconds, max(first - now, 0))):
            if key.data is None:
                self._let_in()
            elif key.data in self._guests:  # it may have been sent away by now
                self._hear(key.data)
        now = time.monotonic()
        for sock in [sock for sock, (_, _, until) in self._guests.items() if until < now]:
            self._send_away(sock)

    def _let_in(self) -> None:
        if len(self._guests) >= MOST_GUESTS:
            self._send_away(next(iter(self._guests)))
        try:
            sock, _ = self._server.accept()
        except BlockingIOError:  # it has left again
            return
        except OSError:  # too many files are open
            time.sleep(RETRY_SECONDS)
            return
        sock.setblocking(False)
        challenge = secrets.token_hex(16)
        connection = Connection(sock)
        self._guests[sock] = connection, challenge, time.monotonic() + HELLO_SECONDS
        self._selector.register(sock, selectors.EVENT_READ, sock)
        connection.send({"glam": challenge})

    def _send_away(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._guests.pop(sock)[0].close()

    def _hear(self, sock: socket.socket) -> None:
        connection, challenge, _ = self._guests[sock]
        try:
            hello = connection.take(HELLO_BYTES) if connection.fill() else {}
        except BlockingIOError:
            return
        except ValueError:
            hello = {}
        match hello:
            case None:
                return  # the rest is on its way
            case {
                "process": int(index),
                "of": int(of),
                "host": str(host),
                "reply": str(reply),
                "proof": str(given),
            } if 0 <= index < MOST_PROCESSES and len(host) < 256 and host.isprintable():
                self._selector.unregister(sock)
                del self._guests[sock]
                connection.name = f"process {index} ({host})"
                prove = functools.partial(proof, self._secret, challenge, reply, index)
                connection.send({"welcome": prove("welcome")})
                if is_equal(given, prove(f"hello {of} {host}")):
                    self._admit(connection, index, of, host)
                else:
                    connection.close()
                    self._tell_odd(f"process {index} on {host}")
            case _:
                self._send_away(sock)  # a port scanner, say

    def _tell_odd(self, name: str) -> None:
        if name not in self._odd and len(self._odd) < SHOWN:
            self._odd.append(name)
            self._warn(f"{name} came with another secret and was sent away")

    def _admit(self, connection: Connection, index: int, of: int, host: str) -> None:
        """Adds a process that knows the secret. Raises: RecipeError when its numbers are wrong."""
        others = self._connections
        if of != self._count:
            refused = f"process {index} on {host} was started as one of {of}, "
            refused += f"process 0 as one of {self._count}"
            hint = "--num-processes must be the same"
            self._refuse_all(RecipeError(refused, hint=hint), connection)
        if index in others:
            self._forget_gone()  # it may have been restarted
        if index in others or not 0 < index < self._count:
            other = others[index].name if index in others else "process 0"
            refused = f"process {index} came twice: from {host} and as {other}"
            hint = "every --process-id is used once"
            self._refuse_all(RecipeError(refused, hint=hint), connection)
        others[index] = connection

    def _forget_gone(self) -> bool:
        """Whether processes that had come are gone again; they are removed."""
        gone = [index for index, each in self._connections.items() if each.is_gone()]
        for index in gone:
            self._connections.pop(index).close()
        return bool(gone)

    def _give_up(self, where: str) -> None:
        missing = [f"process {k}" for k in range(1, self._count) if k not in self._connections]
        what = f"{', '.join(first_of(missing, SHOWN))} of {self._count} did not come {where}"
        hint = "start them with the same command, or raise `runtime.join_seconds`"
        if self._odd:
            hint = f"start them with the same command, run folder and {SECRET_VARIABLE}: "
            hint += f"{', '.join(self._odd)} had another secret"
        self._refuse_all(HostError(what, hint=hint))

    def _refuse_all(self, error: GlamError, *more: Connection) -> None:
        for connection in (*self._connections.values(), *more):
            connection.send({"refused": error.what, "hint": error.hint, "code": error.exit_code})
            connection.close()
        raise error


def _listen(address: str, count: int) -> socket.socket:
    host, port = split_address(address)
    try:
        family, _, _, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(  # pyright: ignore
            resolved[:2], family=family, backlog=count + MOST_GUESTS
        )
    except OSError as error:
        hints = {
            errno.EADDRINUSE: "is process 0 started twice? else choose another port",
            errno.EADDRNOTAVAIL: "the address must be one of the machine of process 0",
        }
        number = error.errno or 0
        # Names that cannot be resolved have numbers below 0; `create_server` adds the address.
        reason = os.strerror(number) if number > 0 else error.strerror
        raise RecipeError(
            f"process 0 cannot listen on {address}: {reason}", hint=hints.get(number)
        ) from error
