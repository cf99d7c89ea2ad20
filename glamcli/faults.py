"""Faults on purpose, to rehearse and to test what a run does about them.

`GLAM_FAULT=kind@step[+][:process]`, several separated by commas, for `glam train --allow-faults`:
`kill@20` kills the process at the start of step 20, `enospc@7+:0` lets every save from step 7 on
fail in process 0. A fault without `+` happens once per start of the program, and one without a
process happens in all of them.

Nothing is armed by default; then every function here returns at once and the compiled step is the
same program. The places where faults happen call one function each.
"""

import errno
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glamcli.errors import RecipeError

FAULT_KINDS = {
    "kill": "SIGKILL at the start of the step",
    "term": "SIGTERM at the start of the step",
    "hup": "SIGHUP at the start of the step",
    "stop": "SIGSTOP at the start of the step; SIGCONT resumes it",
    "stall": "the step never starts, and the process lives",
    "nan_grad": "the loss of the step, and so its gradient, is NaN on this process's rows",
    "spike": "the loss of the step is 1,000 times as large on this process's rows",
    "bad_record": "a row of the step's batch cannot be read",
    "kill_save": "SIGKILL while the save of the step writes",
    "enospc": "the save of the step fails: no space left on device",
    "eio": "the save of the step fails: input/output error",
    "slow_save": "the save of the step takes 20 s longer",
    "flip": "one bit of the arrays saved at the step changes on disk once they are complete",
}
VARIABLE = "GLAM_FAULT"
LOSS_FACTOR = "loss_factor"
"""what a batch holds beside its tokens while a fault of the loss is armed: float32 [B]."""

_AT_START = {"kill": "SIGKILL", "term": "SIGTERM", "hup": "SIGHUP", "stop": "SIGSTOP"}
_FACTORS = {"nan_grad": float("nan"), "spike": 1000.0}
_SLOW_SAVE_SECONDS = 20.0
_FORM = re.compile(
    r"(?P<kind>\w+)@(?P<step>[0-9]{1,12})(?P<lasts>\+?)(?::(?P<process>[0-9]{1,6}))?"
)


@dataclass(frozen=True)
class Fault:
    """What is to happen, when, and where."""

    kind: str
    step: int
    lasts: bool = False
    """whether it happens at every step from `step` on, and not at `step` alone."""
    process: int | None = None
    """the index of the process; None is every one."""


_armed: list[Fault] = []
_scales_loss = False


def requested(text: str, allowed: bool) -> list[Fault]:
    """The faults that the value of `GLAM_FAULT` asks for; none when it is empty.

    Raises: RecipeError when the value is malformed, or faults are not allowed.
    """
    if not text.strip():
        return []
    if not allowed:
        raise RecipeError(
            f"{VARIABLE} is set, which breaks a run on purpose",
            hint=f"unset {VARIABLE}, or rehearse with --allow-faults",
        )
    faults = []
    for each in text.split(","):
        form = _FORM.fullmatch(each.strip())
        if form is None or form["kind"] not in FAULT_KINDS or int(form["step"]) < 1:
            raise RecipeError(
                f"{VARIABLE}: `{each.strip()[:60]}` is not kind@step[+][:process], with steps from "
                "1",
                hint=f"kinds: {', '.join(FAULT_KINDS)}",
            )
        process = None if form["process"] is None else int(form["process"])
        faults.append(Fault(form["kind"], int(form["step"]), bool(form["lasts"]), process))
    return faults


def arm(faults: list[Fault], process: int = 0) -> None:
    """From now on these faults, and no others, happen in this process, which has this index."""
    global _scales_loss
    _armed[:] = [fault for fault in faults if fault.process in (None, process)]
    # The same in all processes, because it changes the program of the step.
    _scales_loss = any(fault.kind in _FACTORS for fault in faults)


def due(kind: str, step: int) -> bool:
    """Whether a fault of this kind happens at this step; asked again, only if it lasts."""
    for fault in _armed:
        if fault.kind == kind and (fault.step == step or (fault.lasts and fault.step < step)):
            if not fault.lasts:
                _armed.remove(fault)
            return True
    return False


def start_step(step: int) -> None:
    """Sends this process the signals that are due at the start of a step, or stalls it."""
    for kind, name in _AT_START.items():
        if due(kind, step):
            os.kill(os.getpid(), getattr(signal, name))
    while due("stall", step):
        time.sleep(10**6)


def scales_loss() -> bool:
    """Whether the program of the step has to multiply the loss of every row by a factor."""
    return _scales_loss


def loss_factors(step: int, num_rows: int) -> dict[str, np.ndarray]:
    """The part of a step's batch that scales its loss; empty unless such a fault is armed."""
    if not _scales_loss:
        return {}
    factor = np.prod([factor for kind, factor in _FACTORS.items() if due(kind, step)])
    return {LOSS_FACTOR: np.full(num_rows, factor, np.float32)}


def read_row(step: int) -> None:
    """Raises: OSError when a row of this step's batch is to be unreadable."""
    if due("bad_record", step):
        raise OSError(errno.EIO, f"damaged on purpose ({VARIABLE})")


def in_save(step: int, description: dict[str, Any]) -> dict[str, Any]:
    """The description of a step; if a fault of its save is due, one that brings the fault about
    when the thread that writes the step reads it."""
    kinds = [k for k in ("slow_save", "kill_save", "enospc", "eio") if due(k, step)]
    return _Description(description, kinds) if kinds else description


class _Description(dict[str, Any]):
    def __init__(self, description: Mapping[str, Any], kinds: list[str]):
        super().__init__(description)
        self._kinds = kinds

    def items(self) -> Any:
        for kind in self._kinds:
            if kind == "slow_save":
                time.sleep(_SLOW_SAVE_SECONDS)
            elif kind == "kill_save":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                number = getattr(errno, kind.upper())
                raise OSError(number, os.strerror(number))
        return super().items()


def saved(folder: Path, step: int) -> None:
    """Flips a bit in the middle of the largest file of a complete step's arrays, if that is due."""
    if not due("flip", step):
        return
    files = (path for path in (folder / "state").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: (path.stat().st_size, path.name))
    with largest.open("r+b") as file:
        middle = largest.stat().st_size // 2
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 16]))
