"""Going back to an earlier step of a run, and going on from there, with other data if need be.

Nothing is deleted: later steps go to `checkpoints/set-aside`, the metrics of later steps to a file
beside `metrics.jsonl`, and a line of `rewinds.jsonl` says when, why and what. That line also tells
the next start how many batches to skip after the step.

The line comes first, then the metrics, then the steps from the newest down. So whenever the
process is killed, a run that is continued takes a step that is whole: only at the step that was
rewound to, with every later one out of the way, does the line count. A second call finishes what
the first began.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from glamcli import atomic, step_folders
from glamcli.errors import CheckpointError

RECORDS = "rewinds.jsonl"


def rewind(run_dir: Path, to: int, skip_batches: int = 0, reason: str = "") -> dict[str, Any]:
    """Makes `to` the newest step of a run that nothing else is writing to. The run continues from
    there without its next `skip_batches` batches. Returns the record that was added.

    Raises: CheckpointError when there is no such step, when skipping would leave nothing to train,
        or when something cannot be written or renamed; calling it again is then safe.
    """
    folder = run_dir / "checkpoints"
    step_folders.find_step(run_dir, to)
    last = _last_step(run_dir)
    if skip_batches and last is not None and to + skip_batches >= last:
        raise CheckpointError(
            f"skipping {skip_batches} batches after step {to} leaves nothing of {last} steps",
            hint="skip fewer, or train for longer (`--set train.steps=N`) before going back",
        )
    steps = step_folders.step_names(folder)
    later = [name for step, name in sorted(steps, reverse=True) if step > to]
    record = {
        "unix_seconds": round(time.time(), 3),
        "from": max(step for step, _ in steps),
        "to": to,
        "skip_batches": skip_batches,
        "reason": reason,
        "set_aside": {
            name: str(step_folders.place_aside(folder, name).relative_to(run_dir)) for name in later
        },
    }
    try:
        _append(run_dir / RECORDS, record)
        _move_metrics(run_dir / "metrics.jsonl", to)
        for name in later:
            step_folders.move_aside(folder, name)
    except OSError as error:
        raise CheckpointError(
            f"{run_dir} cannot go back to step {to}: {error.filename}: {error.strerror or error}",
            hint="run the same command again once that is mended",
        ) from error
    return record


def skipped_at(run_dir: Path, step: int) -> int:
    """How many batches a run that continues from `step` leaves out first.

    Raises: CheckpointError when the records of rewinds cannot be read.
    """
    for record in reversed(rewinds(run_dir)):
        if record["to"] <= step:  # what was rewound to an earlier step has saved this one since
            return record["skip_batches"] if record["to"] == step else 0
    return 0


def rewinds(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first.

    Raises: CheckpointError naming the line that is none.
    """
    path = run_dir / RECORDS
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if all(type(record[key]) is int and record[key] >= 0 for key in ("to", "skip_batches")):
            return record
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(
        f"{path}:{number}: not a record of a rewind",
        hint="restore the line, or delete it: its rewind then skips no batches",
    )


def _last_step(run_dir: Path) -> int | None:
    """`train.steps` of the newest start; None where that is not known (training compares it)."""
    try:
        return int(json.loads((run_dir / "run.json").read_bytes())["recipe"]["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _append(path: Path, record: dict[str, Any]) -> None:
    before = path.read_bytes() if path.exists() else b""
    atomic.write(path, before + json.dumps(record).encode() + b"\n")


def _move_metrics(path: Path, step: int) -> None:
    """Moves the lines after `step`, which are the last ones, to `metrics.after-STEP.jsonl`."""
    if not path.is_file():
        return
    start = 0
    with path.open("rb") as file:
        for line in file:
            if _step_of(line) > step:
                break
            start += len(line)
        file.seek(start)
        if not (later := file.read()):
            return
    beside, number = path.with_name(f"metrics.after-{step}.jsonl"), 0
    # The same content is there when an earlier call was killed before the next line but one.
    while beside.exists() and beside.read_bytes() != later:
        number += 1
        beside = path.with_name(f"metrics.after-{step}.{number}.jsonl")
    atomic.write(beside, later)
    os.truncate(path, start)


def _step_of(line: bytes) -> float:
    """The step of a line; 0 for one that is damaged, which stays where it is."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return step if isinstance(step, int | float) else 0
