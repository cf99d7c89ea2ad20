"""The process of one logger: gets lines through standard input, answers on standard output.

The first line says which logger and run, each other one has numbers of a step. At their end, also
when the run was killed, it finishes and ends, within `linger_seconds` whatever its package does.
"""

import importlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

MAX_LINES = 1000

_Message = Mapping[str, Any]


class _Logged(NamedTuple):
    """A run in a logger."""

    log: Callable[[int, dict[str, float]], object]
    finish: Callable[[], object]
    address: str | None


def main() -> None:
    """Logs until standard input ends."""
    answers = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # packages print

    def answer(kind: str, text: object) -> None:
        line = f"{kind} {text}".replace("\n", " ")[:300]
        with suppress(OSError):
            os.write(answers, line.encode(errors="replace") + b"\n")

    messages: queue.Queue[_Message | None] = queue.Queue(MAX_LINES)
    threading.Thread(target=_read, args=(messages, answer), daemon=True).start()
    about, lost = messages.get() or {}, 0
    try:
        logged = _OPEN[about["module"]](about)
        if logged.address is not None:
            answer("at", logged.address)
        while (message := messages.get()) is not None:
            try:
                logged.log(message["step"], message["numbers"])
            except Exception as error:
                answer("failed", f"{type(error).__name__}: {error}")
                lost += 1
        logged.finish()
    except BaseException as error:  # some packages exit
        answer("failed", f"{type(error).__name__}: {error}")
        while messages.get() is not None:
            lost += 1
    answer("lost", lost)


def _read(messages: "queue.Queue[_Message | None]", answer: Callable[[str, object], None]) -> None:
    """Fills the queue, and goes on to the end where that is full: a package may take forever. After
    the end time is limited."""
    linger_seconds, lost = 0.0, 0
    with suppress(ValueError):  # a line that was cut by the end of the run
        for line in sys.stdin.buffer:
            message = json.loads(line)
            linger_seconds = message.get("linger_seconds", linger_seconds)
            try:
                messages.put_nowait(message)
            except queue.Full:
                answer("failed", "too slow, lines are left out")
                lost += 1
    answer("lost", lost)
    end = threading.Timer(linger_seconds, os._exit, (1,))
    end.daemon = True
    end.start()
    for _ in range(2):  # for the loop that logs, and for the one that counts after a failure
        messages.put(None)


def _open_trackio(about: _Message) -> _Logged:
    trackio = importlib.import_module("trackio")
    trackio.init(
        project=about["project"], name=about["name"], resume="allow", config=about["config"]
    )
    return _Logged(lambda step, numbers: trackio.log(numbers, step=step), trackio.finish, None)


def _open_wandb(about: _Message) -> _Logged:
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=about["project"],
        id=about["name"],
        name=about["name"],
        resume="allow",
        dir=about["folder"],
        config=about["config"],
        settings={"console": "off", "disable_git": True, "disable_code": True},
    )
    # Its own step never goes back, as that of a resumed run does.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return _Logged(lambda step, numbers: run.log({"step": step, **numbers}), run.finish, run.url)


_OPEN = {"trackio": _open_trackio, "wandb": _open_wandb}
