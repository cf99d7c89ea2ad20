"""Strangers at the port where the processes of a run meet cost the run nothing."""

import contextlib
import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glamcli.errors import HostError, RecipeError
from glamcli.hosts import door, greeting
from glamcli.hosts.secret import proof, run_secret
from unit.hosts.threads import HERE, SECRET, cut, free_port, meet, names, together

ALL = [f"process {index} ({HERE})" for index in range(3)]


def hello(challenge, secret=SECRET, **changed):
    """What process 1 of three says, or something like it."""
    said = {"process": 1, "of": 3, "host": "old", "reply": "r"} | changed
    what = f"hello {said['of']} {said['host']}"
    given = proof(secret, challenge, str(said["reply"]), said["process"], what)
    return json.dumps({**said, "proof": given, **changed}).encode() + b"\n"


VALUES = (
    *(None, True, -1, 0, 2, 2**70, 1.5, 1e999, float("nan"), "", "\ud800", "x" * 500, "\x1b[2J"),
    *([], [[]], {}, {"process": 1}),
)


def told_by_strangers(rng):
    """What strangers say, as functions of the challenge: noise, and what is nearly right."""
    fixed = (b"", b"GET / HTTP/1.1\r\n\r\n", b"[" * 4096, b"[" * 1000 + b"\n", b"x" * 10**6)
    fixed += (b'{"process": 1e999}\n', b'{"process": ' + b"9" * 1500 + b"}\n", b"null\n", b"{}\n")
    for said in fixed:
        yield lambda challenge, said=said: said
    for _ in range(40):
        noise = rng.randbytes(rng.randrange(1, 3000)) + b"\n" * rng.randrange(2)
        yield lambda challenge, said=noise: said
    yield lambda challenge: hello(challenge, b"guessed")
    yield lambda challenge: hello("of another connection")
    yield lambda challenge: hello(challenge)[: rng.randrange(1, 60)]
    for key in ("process", "of", "host", "reply", "proof"):
        for value in VALUES:
            # The proof is that of the message before it was changed.
            yield (
                lambda challenge, change={key: value}: (
                    json.dumps(json.loads(hello(challenge)) | change).encode() + b"\n"
                )
            )
        yield (
            lambda challenge, key=key: (
                json.dumps(
                    {k: v for k, v in json.loads(hello(challenge)).items() if k != key}
                ).encode()
                + b"\n"
            )
        )


def connected(address):
    """A connection to process 0, as soon as it listens, and its challenge."""
    sock = greeting._connect(address, 20, greeting.time.monotonic() + 20)
    return sock, json.loads(sock.makefile("rb").readline())["glam"]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_strangers_say_the_run_meets(seed, monkeypatch):
    # Those who fall silent would keep process 0 longer than it waits, if it waited for them.
    monkeypatch.setattr(door, "HELLO_SECONDS", 1000.0)
    rng = random.Random(seed)
    warned = []
    unheard = threading.Event()

    def one(index, address):
        if index == 2:
            strangers = list(told_by_strangers(rng))
            rng.shuffle(strangers)
            kept = []
            for said in strangers:
                sock, challenge = connected(address)
                with contextlib.suppress(OSError):
                    sock.sendall(said(challenge))
                    if rng.random() < 0.3:
                        sock.shutdown(rng.choice([socket.SHUT_WR, socket.SHUT_RDWR]))
                kept.append(sock)
            unheard.set()
            found = names(2, 3, address)
            for sock in kept:
                sock.close()
            return found
        if index == 1:
            unheard.wait(60)
        return names(index, 3, address, 60, warned.append)

    assert together(3, one) == [ALL] * 3
    assert 0 < len(warned) <= door.SHOWN
    assert all(text.isprintable() for text in warned)


def test_a_flood_of_silent_connections_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr(door, "HELLO_SECONDS", 1000.0)

    def one(index, address):
        with contextlib.ExitStack() as stack:
            silent = [
                stack.enter_context(connected(address)[0]) for _ in range(200 if index else 0)
            ]
            if index:
                assert silent[0].recv(1) == b""  # room was made for later ones
            return names(index, 2, address, 60)

    assert together(2, one) == [ALL[:2]] * 2


def test_a_hello_in_pieces_is_heard_while_others_are_silent():
    def one(index, address):
        if index == 0:
            line = meet(address, 0, 2, 60)
            cut(line)
            return line.names
        silent, _ = connected(address)
        sock, challenge = connected(address)
        said = hello(challenge, of=2)
        for place in range(len(said)):
            sock.sendall(said[place : place + 1])
        file = sock.makefile("rb")
        assert "welcome" in json.loads(file.readline())
        found = json.loads(file.readline())["names"]
        sock.close()
        silent.close()
        return found

    assert together(2, one) == [[ALL[0], "process 1 (old)"]] * 2


def test_who_says_nothing_is_sent_away(monkeypatch):
    monkeypatch.setattr(door, "HELLO_SECONDS", 0.1)

    def one(index, address):
        if index == 0:
            return meet(address, 0, 2, 1.0)
        sock, _ = connected(address)
        with sock:
            return sock.recv(1)  # returns when the other side has closed it

    missing, closed = together(2, one)
    assert isinstance(missing, HostError)
    assert closed == b""


def test_a_restarted_process_takes_its_place():
    def one(index, address):
        if index == 2:
            sock, challenge = connected(address)
            sock.sendall(hello(challenge))
            assert b"welcome" in sock.recv(4096)
            sock.close()
            arrived.set()
        elif index == 1:
            arrived.wait(10)
        return names(index, 3, address)

    arrived = threading.Event()
    assert together(3, one) == [ALL] * 3


def test_another_secret_is_said_in_both_processes():
    warned = []

    def one(index, address):
        return meet(address, index, 2, 1.0, b"mine" if index else SECRET, warned.append)

    first, other = together(2, one)
    assert isinstance(other, RecipeError)
    assert other.what.endswith(f"has another secret than process 1 on {HERE}")
    assert other.hint == (
        "start all with the same command and GLAM_SECRET; without that, the run folders need the "
        "same name"
    )
    assert warned == [f"process 1 on {HERE} came with another secret and was sent away"]
    assert isinstance(first, HostError)
    assert first.what.startswith("process 1 of 2 did not come to")
    assert f"process 1 on {HERE} had another secret" in str(first.hint)


@pytest.mark.parametrize(
    ("said", "kind", "what"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n"], RecipeError, "another program than glam answers"),
        ([b"[" * 4096 + b"\n"], RecipeError, "another program than glam answers"),
        ([b"x" * 10**5], RecipeError, "another program than glam answers"),
        ([b"{}\n"], RecipeError, "another program than glam answers"),
        ([b'{"glam": "c"}\n', b'{"welcome": 7}\n'], RecipeError, "has another secret"),
        ([b'{"glam": "c"}\n', b'{"names": ["a", "b"]}\n'], RecipeError, "another program"),
        ([b"silence"], HostError, "did not answer as process 0 of this run does"),
        ([b'{"glam": "c"}\n', b"silence"], HostError, "did not answer as process 0"),
        ([], HostError, "did not answer as process 0"),
    ],
)
def test_a_process_does_not_join_a_stranger(said, kind, what):
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def strange():
            sockets = []
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = server.accept()
                    for each in said:
                        sock.sendall(each)
                    if b"silence" not in said:
                        sock.close()
                    sockets.append(sock)
            for sock in sockets:
                sock.close()

        done = pool.submit(strange)
        with pytest.raises(kind, match=what):
            meet(f"127.0.0.1:{server.getsockname()[1]}", 1, 2, 0.3)
        server.shutdown(socket.SHUT_RDWR)
        done.result()


def test_process_zero_that_leaves_before_all_have_come_is_said():
    def one(index, address):
        if index:
            return meet(address, 1, 3, 20)
        with door.Door(address, 3, SECRET, lambda text: None) as waiting:
            while not waiting._connections:
                waiting._wait(1)
            cut_off = list(waiting._connections.values())
        for connection in cut_off:
            connection.close()
        return None

    _, error = together(2, one)
    assert isinstance(error, HostError)
    assert "before the processes had agreed" in error.what


def test_the_secret_is_the_one_given_or_comes_from_the_name_of_the_run(monkeypatch, tmp_path):
    monkeypatch.delenv("GLAM_SECRET", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").mkdir()
    here = run_secret(Path("/mnt/a/big"))
    assert here == run_secret(Path("big")) == run_secret(tmp_path / "big")
    assert here != run_secret(Path("/mnt/a/other"))
    monkeypatch.chdir("big")
    assert run_secret(Path(".")) == here
    monkeypatch.setenv("GLAM_SECRET", "")
    assert run_secret(Path("big")) == here
    monkeypatch.setenv("GLAM_SECRET", "run big")
    given = run_secret(Path("big"))
    assert given == run_secret(Path("other")) != here


def test_it_listens_at_its_address_alone():
    with door.Door(f"127.0.0.1:{free_port()}", 2, SECRET, lambda text: None) as waiting:
        assert waiting._server.getsockname()[0] == "127.0.0.1"
