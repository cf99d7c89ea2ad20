"""Changes that make a good file hostile: of its bytes, of one meaning in it, of what it is."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEEP = "@deep@"
"""stands for a hundred thousand lists in each other, which `json.dumps` does not write."""
ESCAPE = "\x1b[31m\u202e<script>alert(1)</script>[red]"
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 10**30, 1.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "text", "5", "../../up", "/dev/zero", "a" * 5000, "\0", "\ud800", ESCAPE, "\n", "{x"),
    *([], {}, [[]], [None], {"": 1}, DEEP),
)
SPECIAL = (
    *("folder", "pipe", "/dev/zero", "/dev/full", "loop", "nothing", "empty", "bom", "utf-16"),
    *("deep list", "deep object", "long line", "zeros"),
)
"""What stands in place of a file."""
SECONDS, MORE_BYTES = 180, 3 << 30
"""What one command may take; memory beyond what the process has."""


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The data with a few bytes changed, inserted or removed."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        where = rng.randrange(len(found) or 1)
        kind = rng.randrange(5)
        if kind == 0 and found:
            found[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[where : where + 1] = rng.choices(b"\x00\x1b\xff\x80:{}[]&*!|>'\"%@`#-,\t\n09")
        elif kind == 2:
            del found[where : where + rng.randrange(1, 20)]
        elif kind == 3:
            del found[where:]
        else:
            found[where:where] = bytes(rng.choices(b"\n :-[{&*'\"\\e9\xc3", k=3))
    return bytes(found)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a tree of JSON, the whole first."""
    yield at
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(child, (*at, key))


def changed(value: Any, rng: random.Random) -> tuple[Any, bool]:
    """A tree of JSON in which one meaning is another: a value, a key, a number of entries; and
    whether its keys should be there twice."""
    tree = copy.deepcopy({"": value})
    at = rng.choice(list(paths(value)))
    above, key = tree, ""
    for part in at:
        above, key = above[key], part
    kind = rng.randrange(8)
    if kind == 0 and isinstance(above, dict) and at:
        above[key + "x"] = above.pop(key)
    elif kind == 1 and at:
        del above[key]
    elif kind == 2:
        above[key] = [above[key]] * rng.choice((1, 2, 50))
    elif kind == 3 and isinstance(above[key], dict):
        above[key][rng.choice(("more", "", "\x1b", "a" * 300, "../up"))] = rng.choice(VALUES)
    else:
        above[key] = rng.choice(VALUES)
    return tree[""], kind == 4


def as_json(value: Any, twice: bool = False) -> str:
    """A line of JSON, every key of it `twice`."""
    text = json.dumps(value)
    if twice and isinstance(value, dict) and value:
        text = text[:-1] + ", " + text[1:]
    return _deep(text)


def as_yaml(value: Any, twice: bool = False) -> str:
    """YAML with a line for every key, each of them `twice`."""
    if not isinstance(value, dict):
        return as_json(value)
    lines = [f"{json.dumps(key)}: {json.dumps(each)}" for key, each in value.items()]
    return _deep("\n".join(lines * (1 + twice)))


def _deep(text: str) -> str:
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)


def replace(path: Path, by: str) -> None:
    """Puts something else in place of a file."""
    path.unlink()
    if by == "folder":
        path.mkdir()
    elif by == "pipe":
        os.mkfifo(path)
    elif by.startswith("/dev/"):
        path.symlink_to(by)
    elif by == "loop":
        path.symlink_to(path.name)
    elif by != "nothing":
        path.write_bytes(
            {
                "empty": b"",
                "bom": b"\xef\xbb\xbf",
                "utf-16": '{"a": 1}'.encode("utf-16"),
                "deep list": b"[" * 100_000,
                "deep object": b'{"a":' * 100_000,
                "long line": b'{"a": "' + b"x" * 10_000_000 + b'"}',
                "zeros": bytes(1 << 20),
            }[by]
        )


def remove(path: Path) -> None:
    """Takes away what `replace` has put there."""
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextmanager
def bounded() -> Iterator[None]:
    """An error in the block after `SECONDS`, or when it takes more than `MORE_BYTES`."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"still running after {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


Glam = Callable[..., tuple[int, str, str]]


def check(glam: Glam, arguments: tuple[object, ...], tried: object) -> int:
    """Runs a command on a hostile file: done, or refused in words that a person can use."""
    with bounded():
        code, out, err = glam(*arguments)
    said = f"{tried}\n{' '.join(map(str, arguments))}\n{code}\n{out[-2000:]}\n{err[-4000:]}"
    assert code in (0, 2, 3, 4, 5, 6), said
    assert code == 0 or "error: " in err or "warning: " in err or out, said
    for sign in ("Traceback", "bug in glam", "\x1b", "\u202e", "<bound method"):
        assert sign not in out + err, said
    return code
