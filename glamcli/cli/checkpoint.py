"""`glam checkpoint`: the saved steps of a run: list, verify, go back to one, compare two."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli import render
from glamcli.cli.options import RunFolder, json_option, run_argument
from glamcli.config.sizes import bytes_text
from glamcli.errors import CheckpointError, DamagedCheckpoint, printable
from glamcli.saved_steps import SavedStep, saved_steps
from glamcli.step_folders import CHECKPOINT_FORMAT, find_step, step_meta
from glamcli.storage import Remote
from glamcli.stored_runs import local
from glamcli.train.rewind import Rewind, rewind, rewinds

if TYPE_CHECKING:
    from glamcli.progress import Progress
    from glamcli.step_diff import ArrayDifference

VERIFIABLE_FORMAT = 4
LISTED: tuple[str, ...] = (">step", "status", ">size", ">saved", ">tokens", ">loss", ">format",
                           "skipped batches")  # fmt: skip
USUAL = {">format": str(CHECKPOINT_FORMAT), "skipped batches": "-"}
"""A column in which all steps have this is left out, to leave room for the others."""
LISTED_ARRAYS = 10
VALUE_CHARS = 48
STOP_FIRST = "stop it first: on SIGTERM it saves and ends"
UPLOAD_SECONDS = 300.0
"""that a change of a run in a bucket may take."""


@click.group()
def command() -> None:
    """Look at the saved steps of a run, verify them, go back to one, compare two."""


@command.command("list")
@run_argument
@json_option
def _list(run: Path, as_json: bool) -> None:
    """List the saved steps of RUN.

    Only descriptions are read, so a step that is called good may have damaged arrays: `glam
    checkpoint verify` reads those. From a step saved in a bad streak, while updates were refused, a
    run continues as from any other; `glam eval` and `glam generate` warn of it.
    """
    folder = local(run)
    steps, records = saved_steps(folder), rewinds(folder)
    if as_json:
        for each in steps:
            render.emit("checkpoint", **{**asdict(each), "folder": str(each.folder)})
        for record in records:
            render.emit("rewind", **asdict(record))
        return
    rows = [dict(zip(LISTED, _row(each), strict=True)) for each in steps]
    shown = [name for name in LISTED if any(row[name] != USUAL.get(name) for row in rows)]
    note = "loss: on held-out text, mean over sources, nats per token"
    render.print_table(
        shown,
        [[row[name] for name in shown] for row in rows],
        note=note if _has_losses(steps) else None,
    )
    for record in records:
        click.echo(printable(_record_text(record)))


def _has_losses(steps: list[SavedStep]) -> bool:
    return any(each.heldout_nats for each in steps)


def _row(each: SavedStep) -> list[str]:
    losses = each.heldout_nats.values()
    detail = each.reason or (each.folder.name if each.folder.name != str(each.step) else None)
    return [
        f"{each.step:,}",
        printable(each.status + (f": {detail}" if detail else "")),
        bytes_text(each.num_bytes),
        "-" if each.unix_seconds is None else _clock(each.unix_seconds),
        "-" if each.tokens_seen is None else f"{each.tokens_seen:,}",
        f"{sum(losses) / len(losses):.3f}" if losses else "-",
        "-" if each.format is None else str(each.format),
        ", ".join(f"{first + 1} to {end}" for first, end in each.skipped_batches) or "-",
    ]


def _record_text(record: Rewind) -> str:
    went = f"{_clock(record.unix_seconds)}: from step {record.from_step} to {record.to_step}"
    skipped = f", {record.skip_batches} batches skipped" if record.skip_batches else ""
    return f"rewound {went}{skipped}" + (f" ({record.reason})" if record.reason else "")


def _clock(unix_seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_seconds))
    except (ValueError, OverflowError, OSError):  # a record may hold any number
        return "-"


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Arrays are read into host memory: a run that is training may need the accelerators.

    Raises: PlanError when memory runs short.
    """
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
    from glamcli.memory import explaining_memory

    with explaining_memory(lambda: "arrays are read whole: use a machine with more memory"):
        yield


@command.command("verify")
@run_argument
@click.option("--step", type=click.IntRange(0), help="Only this step.  [default: all]")
@json_option
def _verify(run: Path, step: int | None, as_json: bool) -> int:
    """Check every array of the saved steps of RUN.

    Each is read and compared with its digest. Exits with 4 when a step is damaged; the array or
    file is named. Steps of formats 2 and 3 have no digests: they are read, but not compared. Arrays
    are read into host memory, one at a time; accelerators are not used.
    """
    folder = local(run, metrics=False)
    steps = [each for each in saved_steps(folder) if each.status != "set aside"]
    steps = [each for each in steps if step in (None, each.step)]
    progress, results = render.make_progress(as_json), []
    for each in steps:
        if reason := each.reason or _damage(each, progress):
            local(run, metrics=False)
            if not os.path.lexists(each.folder):  # the run that is training has deleted it
                continue
        result = "damaged" if reason else "verified" if _has_digests(each) else "without digests"
        results.append(result)
        if as_json:
            render.emit("verified", step=each.step, result=result, reason=reason)
        else:
            click.echo(printable(f"step {each.step}: {result}" + (f": {reason}" if reason else "")))
    if not results:
        find_step(folder, step)  # raises, with the steps there are
    return CheckpointError.exit_code if "damaged" in results else 0


def _damage(each: SavedStep, progress: Progress) -> str | None:
    with _on_cpu():
        from glamcli.stored_arrays import verify

        try:
            with progress.phase(f"verifying step {each.step}"):
                verify(each.folder)
        except DamagedCheckpoint as error:
            return error.what
    return None


def _has_digests(each: SavedStep) -> bool:
    return each.format is not None and each.format >= VERIFIABLE_FORMAT


@contextmanager
def _writing(run: Path, progress: Progress) -> Iterator[Path]:
    """The folder of a run to which nothing else writes. Of a run in a bucket it is a copy, and what
    was changed in it is in the bucket when the block ends.

    Raises: CheckpointError when another process writes to it, or the bucket does not answer.
    """
    if not isinstance(run, Remote):
        from glamcli.hosts.lock import locked

        with locked(run, STOP_FIRST):
            yield run
        return
    from glamcli.train.bucket import owned

    with owned(run, progress, hint=STOP_FIRST) as bucket:
        yield bucket.folder
        is_uploaded = bucket.uploaded(UPLOAD_SECONDS)
    if not is_uploaded:
        what = f"{run} may not be changed: its files could not be uploaded in time"
        look = f"once the bucket answers, look at it with `glam checkpoint list {run}`"
        raise CheckpointError(what, f"{look}; where it is as before, run the same command again")


@command.command("rewind")
@run_argument
@click.option("--to", type=click.IntRange(1), required=True, help="The saved step to go back to.")
@click.option(
    "--skip-batches",
    type=click.IntRange(0),
    default=0,
    help="Leave out this many batches after it.",
)
@click.option("--reason", default="", help="A note for the record.", show_default=False)
@json_option
def _rewind(run: Path, to: int, skip_batches: int, reason: str, as_json: bool) -> None:
    """Go back to a saved step of RUN.

    `glam train` then continues from there. Later steps move to RUN/checkpoints/set-aside and later
    lines of the metrics to a file of their own; nothing is deleted. RUN/rewinds.jsonl keeps the
    record. With --skip-batches the run goes on with other data than the first time; batches that
    are left out count as consumed.
    """
    progress = render.make_progress(as_json)
    find_step(local(run, metrics=False) / "checkpoints", to)
    with _writing(run, progress) as folder, _on_cpu():
        from glamcli.stored_arrays import verify

        step = find_step(folder / "checkpoints", to)
        try:
            with progress.phase(f"verifying step {to}"):
                verify(step)
        except DamagedCheckpoint as error:
            hint = f"`glam checkpoint verify {run}` finds the steps that are not damaged"
            raise DamagedCheckpoint(error.what, hint) from error
        if not step_meta(step).get("good", True):
            progress.warn(f"step {to} was saved in a bad streak: updates were refused at that time")
        record = rewind(folder, to, skip_batches, reason)
    if as_json:
        render.emit("rewind", **asdict(record))
        return
    for name, place in record.set_aside.items():
        click.echo(printable(f"step {name} is now {run / place}"))
    named = str(run) if "/" in str(run) else f"./{run}"  # a bare word is a shipped recipe
    click.echo(f"\nnext:\n  {shlex.join(['glam', 'train', named])}")


@command.command("diff")
@click.argument("first", metavar="A", type=RunFolder())
@click.argument("second", metavar="B", type=RunFolder())
@json_option
def _diff(first: Path, second: Path, as_json: bool) -> None:
    """Compare everything in two saved steps.

    Shown are settings, software and data that differ, and the arrays that differ most.

    A and B are folders of steps (RUN/checkpoints/1000), or runs, of which the newest step is taken.
    Where both have digests only the arrays whose digests differ are read.
    """
    first, second = (find_step(local(each, metrics=False)) for each in (first, second))
    with _on_cpu():
        from glamcli.step_diff import diff_steps
        from glamcli.train.metrics import finite

        found = diff_steps(first, second, render.make_progress(as_json))
    if as_json:
        values = asdict(found)
        for each in values["arrays"]:  # JSON has no NaN
            each |= {key: finite(each[key]) for key in ("max_abs", "relative")}
        render.emit("diff", a=str(first), b=str(second), **values)
        return
    click.echo(printable(f"A {first}\nB {second}"))
    facts = [(part, *entry) for part, entries in found.facts.items() for entry in entries]
    facts += [("array", *entry) for entry in found.others]
    if facts:
        click.echo()
        rows = [[part, key, _short(a), _short(b)] for part, key, a, b in facts]
        render.print_table(("", "differs", "A", "B"), rows)
    if found.arrays:
        click.echo()
        _print_arrays(found.arrays[:LISTED_ARRAYS])
    click.echo(f"\n{found.num_equal} arrays are equal, {len(found.arrays)} differ")


def _print_arrays(arrays: list[ArrayDifference]) -> None:
    render.print_table(
        ("array", ">shape", ">differ", ">largest", ">relative"),
        [
            [
                each.name,
                str(each.shape),
                f"{each.num_different / math.prod(each.shape):.1%}",
                f"{each.max_abs:.3g}",
                f"{each.relative:.3g}",
            ]
            for each in arrays
        ],
        note="differ: share of the elements; largest: absolute difference; relative: norm of the "
        "difference over the norm in A",
    )


def _short(value: Any) -> str:
    text = "-" if value is None else printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= VALUE_CHARS else text[: VALUE_CHARS - 3] + "..."
