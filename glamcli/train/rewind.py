"""Going back to an earlier step of a run, and going on from there, with other data if need be.

Nothing is deleted: later steps go to `checkpoints/set-aside`, the metrics of later steps to a file
beside `metrics.jsonl`, and a line of `rewinds.jsonl` says when, why and what. That line also tells
the next start how many batches to skip after the step.

The line comes first, then the metrics, then the steps from the newest down. So whenever the
process is killed, a run that is continued takes a step that is whole: only at the step that was
rewound to, with every later one out of the way, does the line count. A second call finishes what
the first began.
"""

import filecmp
import json
import math
import os
import shlex
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from glamcli import atomic, step_folders
from glamcli.errors import CheckpointError
from glamcli.train.metric_files import metric_lines, run_seconds
from glamcli.untrusted import open_regular, parse_as, parse_json, read_file

RECORDS = "rewinds.jsonl"


@dataclass(frozen=True)
class Rewind:
    """A line of `rewinds.jsonl`."""

    unix_seconds: float
    from_step: int
    """the newest step by then."""
    to_step: int
    skip_batches: int
    """how many after `to_step` are left out."""
    reason: str
    set_aside: dict[str, str]
    """by name of a step folder, where it is now, relative to the run."""
    checksum: str | None = None
    """of the description of `to_step`: a later save of a step of this number is another one, and
    nothing is left out after it. None where the format has none."""
    seconds: float = 0.0
    """what the run had taken by then, as far as its metrics tell."""
    automatic: bool = False
    """whether the run went back by itself."""


def rewind(
    run_dir: Path, to: int, skip_batches: int = 0, reason: str = "", *, automatic: bool = False
) -> Rewind:
    """Makes `to` the newest step of a run that nothing else is writing to, and which the caller has
    verified. The run continues from there without its next `skip_batches` batches. Returns the
    record that was added.

    Raises: CheckpointError when there is no such step, when skipping would leave nothing to train,
        or when something cannot be written or renamed; calling it again is then safe.
    """
    folder = run_dir / "checkpoints"
    checksum = step_folders.step_meta(step_folders.find_step(folder, to)).get("checksum")
    last = _last_step(run_dir)
    if skip_batches and last is not None and to + skip_batches >= last:
        raise CheckpointError(
            f"skipping {skip_batches} batches after step {to} leaves nothing of {last} steps",
            hint="skip fewer, or train for longer (`--set train.steps=N`) before going back",
        )
    steps = step_folders.step_names(folder)
    later = [name for step, name in sorted(steps, reverse=True) if step > to]
    places = {name: step_folders.place_aside(folder, name) for name in later}
    aside = {name: str(place.relative_to(run_dir)) for name, place in places.items()}
    metrics = run_dir / "metrics.jsonl"
    try:
        record = Rewind(
            unix_seconds=round(time.time(), 3),
            from_step=max(step for step, _ in steps),
            to_step=to,
            skip_batches=skip_batches,
            reason=reason,
            set_aside=aside,
            checksum=checksum,
            seconds=_seconds(metrics),
            automatic=automatic,
        )
        _append(run_dir / RECORDS, record)
        _move_metrics(metrics, to)
        for name in later:
            step_folders.move_aside(folder, name)
    except OSError as error:
        raise CheckpointError(
            f"{run_dir} cannot go back to step {to}: {error.filename}: {error.strerror or error}",
            hint="run the same command again once that is mended",
        ) from error
    return record


def rewind_command(run_dir: Path, to: int, skip_batches: int) -> str:
    """The command that does the same, for hints."""
    run = shlex.quote(str(run_dir))
    return f"`glam checkpoint rewind {run} --to {to} --skip-batches {skip_batches}`"


def skipped_at(run_dir: Path, step: int, checksum: str | None) -> int:
    """How many batches a run that continues from `step`, whose description has this checksum,
    leaves out first.

    Raises: CheckpointError when the records of rewinds cannot be read.
    """
    for record in reversed(rewinds(run_dir)):
        if record.to_step <= step:  # a run that went back further has saved this step anew
            is_meant = (record.to_step, record.checksum) == (step, checksum)
            return record.skip_batches if is_meant else 0
    return 0


def not_skipped(run_dir: Path, step: int) -> Rewind | None:
    """The newest rewind, if it leaves out batches after a later step than `step`, from which the
    run continues: that step cannot be used, and they are trained on.

    Raises: CheckpointError when the records of rewinds cannot be read.
    """
    newest = next(reversed(rewinds(run_dir)), None)
    return newest if newest and newest.skip_batches and newest.to_step > step else None


def seconds_before(run_dir: Path) -> float:
    """What a run had taken when it was rewound last; 0 for one that never was.

    Raises: CheckpointError when the records of rewinds cannot be read.
    """
    of_all = (record.seconds for record in rewinds(run_dir))
    return max(filter(math.isfinite, of_all), default=0.0)


def rewinds(run_dir: Path) -> list[Rewind]:
    """The records of a run, oldest first.

    Raises: CheckpointError naming the line that is none.
    """
    path = run_dir / RECORDS
    try:
        lines = read_file(path).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(path: Path, number: int, line: bytes) -> Rewind:
    try:
        return parse_as(Rewind, line)
    except ValueError as error:
        raise CheckpointError(
            f"{path}:{number}: not the record of a rewind: {error}",
            hint="restore the line, or delete it: then no batches are skipped",
        ) from None


def _last_step(run_dir: Path) -> int | None:
    """`train.steps` of the newest start; None where that is not known (training compares it)."""
    try:
        return int(parse_json(read_file(run_dir / "run.json"))["recipe"]["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _seconds(metrics: Path) -> float:
    if not metrics.is_file():
        return 0.0
    with open_regular(metrics) as file:
        timed = metric_lines(file, b'"seconds/')
        return max((run_seconds(values) for _, values in timed), default=0.0)


def _append(path: Path, record: Rewind) -> None:
    before = read_file(path) if path.exists() else b""
    atomic.write(path, before + json.dumps(asdict(record)).encode() + b"\n")


def _move_metrics(path: Path, step: int) -> None:
    """Moves the lines after `step`, which are the last ones, to `metrics.after-STEP.jsonl`."""
    if not path.is_file():
        return
    unfinished = path.with_name(f".{path.name}.later")
    with open_regular(path) as file:
        start = 0
        for _, values in metric_lines(file):
            if values is not None and values["step"] > step:
                break
            start = file.tell()
        else:
            return
        file.seek(start)
        with unfinished.open("wb") as later:
            shutil.copyfileobj(file, later)
    beside, number = path.with_name(f"metrics.after-{step}.jsonl"), 0
    # The same content is there when an earlier call was killed before the last line of this one.
    while beside.exists() and not filecmp.cmp(beside, unfinished, shallow=False):
        number += 1
        beside = path.with_name(f"metrics.after-{step}.{number}.jsonl")
    os.replace(unfinished, beside)
    os.truncate(path, start)
