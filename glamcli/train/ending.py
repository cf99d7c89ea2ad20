"""What is done about the error that ends a run: the other processes hear of it, running out of
memory is explained, and a run that keeps failing is not started again and again.

A launcher that restarts whatever ends would spend days on a run that fails at the same step each
time. So an error is noted in the run folder, and after three in a row from the same step, by the
same recipe and code, the next start is refused, for an hour. Signals, kills, lost machines and the
ends of other processes are no errors and never count: a run that is preempted before its first
checkpoint, however often, goes on. Nor do failed saves and other errors of the system, as of a full
disk: their cause is outside the run and may be gone at the next start.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from glamcli import atomic
from glamcli.checkpoint import Checkpoints
from glamcli.config.schema import Recipe
from glamcli.data.cache import json_digest
from glamcli.errors import CrashLoop, DamagedRecord, GlamError, HostError, Preempted, SaveFailed
from glamcli.hosts.join import Host
from glamcli.memory import explaining_memory
from glamcli.train import identity
from glamcli.train.failures import FAILURES, noted_failures
from glamcli.train.rewind import rewind_command

MAX_FAILURES = 3
LAPSE_SECONDS = 3600.0
"""A launcher starts a failed run again sooner; who comes later may have mended the cause."""


@contextmanager
def ending(
    run_dir: Path, recipe: Recipe, start: int, checkpoints: Checkpoints, host: Host
) -> Iterator[None]:
    """Around all that a run from step `start` computes. Enter it last (`Host.failing_together`).

    Raises:
        CrashLoop: the last three starts from this step failed.
        PlanError: out of memory.
    """

    def what_to_change() -> str:
        latest = checkpoints.latest()
        kept = "" if latest is None else f"; step {latest} is complete and goes on from there"
        return (
            "lower `batch.row_tokens`, raise `batch.accumulate`, set `train.remat` to `full`, or "
            f"use more devices (`glam plan` says what each takes){kept}"
        )

    program = [recipe.model_dump(mode="json"), identity.versions(), identity.code_digest()]
    asked = {"step": start, "program": json_digest(program)}
    known = _failures(run_dir / FAILURES, asked) if host.is_first else []
    try:
        with host.failing_together():
            _refuse_a_fourth(run_dir, start, known)
            with explaining_memory(what_to_change), _leaving_out(run_dir, checkpoints):
                yield
    except (Preempted, HostError, OSError, SaveFailed, CrashLoop):
        raise
    except Exception as error:
        # Only here: while processes fail together, one that failed because another is gone ends.
        if host.is_first and not isinstance(error.__cause__, OSError):
            failures = {"time": time.time(), "failures": [*known, _described(error)]}
            _note(run_dir / FAILURES, asked | failures)
        raise


@contextmanager
def _leaving_out(run_dir: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Adds to the error of a damaged record how to go on without its batch."""
    try:
        yield
    except DamagedRecord as error:
        if (saved := checkpoints.latest()) is not None:
            back = rewind_command(run_dir, saved, error.step - saved)
            error.hint = f"{error.hint}, or go on without it: {back}"
        raise


def _refuse_a_fourth(run_dir: Path, start: int, known: list[Any]) -> None:
    if len(known) < MAX_FAILURES:
        return
    what, code = known[-1]
    raise CrashLoop(
        f"the last {len(known)} starts from step {start} all failed before another checkpoint: "
        f"{what}",
        hint="mend that; a changed recipe is tried again at once, the same one after "
        f"deleting {run_dir / FAILURES}, or in an hour",
        exit_code=code,
    )


def _failures(path: Path, asked: dict[str, Any]) -> list[Any]:
    """The failures in a row of just this: (text, exit code) of each."""
    try:
        of, when, found = noted_failures(path)
    except (OSError, ValueError):
        return []
    return found if of == asked and 0 <= time.time() - when <= LAPSE_SECONDS else []


def _described(error: Exception) -> tuple[str, int]:
    if isinstance(error, GlamError):
        return error.what, error.exit_code
    return f"{type(error).__name__}: {error}".split("\n")[0][:240], 1


def _note(path: Path, failures: dict[str, Any]) -> None:
    with suppress(OSError):  # a full disk may be the failure
        atomic.write(path, json.dumps(failures) + "\n")
