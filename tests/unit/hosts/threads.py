"""The processes of a run as threads of one process, which meet at a port of this machine."""

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor

from glamcli.hosts import greeting

HERE = socket.gethostname()
SECRET = b"known"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def cut(line):
    """Breaks a process's connections, as its death does."""
    line._closing = True
    for each in line.connections.values():
        with contextlib.suppress(OSError):
            each.socket.shutdown(socket.SHUT_RDWR)
    line._close_all()


def meet(address, index, count, seconds=10, secret=SECRET, warn=lambda text: None):
    return greeting.meet(address, address, index, count, seconds, secret, warn)


def names(index, count, address, seconds=10, warn=lambda text: None):
    """Meets and leaves again."""
    line = meet(address, index, count, seconds, warn=warn)
    cut(line)
    return line.names


def together(count, do, host="127.0.0.1"):
    """Runs `do(index, address)` of every process; results or exceptions in order."""
    address = f"{host}:{free_port()}"

    def one(index):
        try:
            return do(index, address)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
