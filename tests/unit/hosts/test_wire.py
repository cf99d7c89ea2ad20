"""Whatever comes over the connections between processes, a run goes on or ends in clear words."""

import contextlib
import json
import random
import socket
import threading

import pytest

from glamcli.errors import DataError, HostError
from glamcli.hosts import wire
from glamcli.hosts.wire import Connection, Wire

NAMES = ["process 0 (a)", "process 1 (b)"]
PUT = {"put": "0 first", "value": 1}
ALL = {"all": "0 first", "values": [1, 2]}
FAILED = {"failed": 1, "what": "no disk", "hint": None, "code": 3}
STRANGE = (None, True, -1, 2, 2**70, 1.5, "", "x", [], [1], [1, 2, 3], {}, {"failed": 1})


def changed(message):
    """The message with one meaning changed: a part missing, or of another value."""
    for key, value in message.items():
        yield {k: v for k, v in message.items() if k != key}
        for strange in STRANGE:
            if key != "value" and (strange, type(strange)) != (value, type(value)):
                yield message | {key: strange}


def means_something(message, index):
    """Whether a process may send this after all."""
    if "bye" in message:
        return True
    if "put" in message:
        return index == 0 and isinstance(message["put"], str) and "value" in message
    if "all" in message:
        values = message.get("values")
        return isinstance(values, list) and len(values) == 2 and message["all"] == "0 first"
    named = message.get("failed") in range(2) and (index or message.get("failed") == 1)
    texts = all(
        message.get(key, 0) is None or isinstance(message.get(key, 0), str)
        for key in ("what", "hint")
    )
    return named and texts and message.get("code") in range(256)


def pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = socket.create_connection(server.getsockname())
        return server.accept()[0], other


def heard(index, said):
    """What ends process `index` of two when the other one says this and no more: (what, hint, code)
    of every end."""
    mine, other = pair()
    with mine, other:
        line = Wire(index, NAMES, {1 - index: Connection(mine)})
        line._awaited = "0 first"
        ended = []
        over = threading.Event()

        def end(*what):
            ended.append(what)
            over.set()

        line.start(end)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wire, "GONE_SECONDS", 0.0)
            with contextlib.suppress(OSError):  # it may have been closed in the middle
                other.sendall(said)
                other.shutdown(socket.SHUT_WR)
            assert over.wait(10), said
            for thread in line._threads:
                thread.join(10)
        return ended, line


def lines(*messages):
    return b"".join(json.dumps(message).encode() + b"\n" for message in messages)


@pytest.mark.parametrize("index", [0, 1])
def test_a_message_with_one_meaning_changed_ends_the_run_in_clear_words(index):
    told = 0
    for message in (PUT, ALL, FAILED):
        for strange in changed(message):
            if means_something(strange, index):
                continue
            ended, line = heard(index, lines(strange))
            ((what, hint, code),) = ended
            start = f"{NAMES[1 - index]} failed: it sent something that no process of a run sends: "
            assert what.startswith(start), strange
            assert (hint, code) == (None, 134)
            assert not line._values
            told += 1
    assert told > 50


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "said",
    [
        *(b"\n", b"[" * 10**5 + b"\n", b'{"a":' * 10**5 + b"\n", b"1e999\n", b"\xff\xfe\n"),
        lines({}),
        *(random.Random(seed).randbytes(500) + b"\n" for seed in range(20)),
    ],
)
def test_what_is_no_message_ends_the_run_in_clear_words(index, said):
    ((what, _, code),), _ = heard(index, said)
    assert what.startswith(f"{NAMES[1 - index]} failed: it sent something that no process")
    assert len(what) < 250
    assert code == 134


@pytest.mark.parametrize("said", [b"", lines(PUT)[:-1], lines(PUT)])
def test_half_a_message_is_a_process_that_is_gone(said):
    ((what, hint, code),), _ = heard(0, said)
    assert what.startswith(f"{NAMES[1]} is gone")
    assert hint
    assert code == 134


def test_a_process_that_sends_values_without_waiting_is_stopped(monkeypatch):
    ((what, _, _),), line = heard(0, lines(*({"put": f"{n} x", "value": n} for n in range(100))))
    assert "it sent something that no process of a run sends: `put`, `value`" in what
    assert line._values == {"0 x": {1: 0}}


@pytest.mark.parametrize("is_heard_last", [True, False])
def test_processes_that_wait_at_different_places_end_in_clear_words(monkeypatch, is_heard_last):
    """Whichever is there first: each would wait for the other without end."""
    monkeypatch.setattr(wire, "GONE_SECONDS", 0.0)
    apart = "processes wait for each other at different places: `0 deleted`, `0 first`"
    mine, other = pair()
    with mine, other:
        line, ended, over = Wire(0, NAMES, {1: Connection(mine)}), [], threading.Event()

        def end(*what):
            ended.append(what)
            over.set()

        line.start(end)
        if is_heard_last:
            line._add("0 first", {0: 1})
            other.sendall(lines({"put": "0 deleted", "value": False}))
            assert over.wait(10)
            assert ended == [(f"{NAMES[1]} failed: {apart}", None, 134)]
        else:
            other.sendall(lines({"put": "0 deleted", "value": False}))
            while not line._values:
                over.wait(0.01)
            with pytest.raises(HostError, match=apart):
                line.gather("first", 1)
        other.shutdown(socket.SHUT_WR)


def test_a_message_without_end_is_not_kept(monkeypatch):
    monkeypatch.setattr(wire, "MESSAGE_BYTES", 1000)
    ((what, _, _),), _ = heard(0, b"x" * 100_000)
    assert "more than 1,000 bytes at once" in what


def test_a_long_error_of_another_process_is_cut():
    ended, _ = heard(0, lines(FAILED | {"what": "x" * 10**6}))
    assert len(ended[0][0]) < wire.ERROR_CHARACTERS + 100


def test_values_too_large_to_send_are_an_error_where_they_are_made(monkeypatch):
    monkeypatch.setattr(wire, "MESSAGE_BYTES", 1000)
    mine, other = pair()
    with mine, other, pytest.raises(DataError, match=r"^`0 journal`: 1,0.. bytes, and processes"):
        Wire(1, NAMES, {0: Connection(mine)}).gather("journal", "x" * 1000)
