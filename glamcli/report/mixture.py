"""Which sources a run read: what was planned, and what its rows were, by the arithmetic of their
order (`data/mixture.py`): nothing of it is in the metrics."""

from dataclasses import dataclass
from pathlib import Path

from glamcli import step_folders
from glamcli.config.mixtures import load_mixture, tokens_by_source
from glamcli.config.schema import Recipe
from glamcli.config.sizes import tokens_per_step
from glamcli.data.mixture import Schedule
from glamcli.errors import GlamError

WINDOWS = 24
"""points of the curves of shares."""


@dataclass(frozen=True)
class ReadRows:
    """What a run read up to `step`."""

    step: int
    rows: dict[str, int]
    """by source; those that rewinds left out are not counted."""
    shares: dict[str, list[tuple[int, float]]]
    """by source: (step, share of the rows since the point before)."""
    epochs: dict[str, list[tuple[int, float]]]
    """by source: (step, passes over its rows)."""
    stages: list[tuple[int, dict[str, float]]]
    """(first step, planned share of every source)."""


def planned_shares(recipe: Recipe) -> dict[str, float]:
    """The planned share of every source over the whole run, stages included.

    Raises: GlamError when the mixture is not there any more.
    """
    steps, size = recipe.train.steps, tokens_per_step(recipe)
    seen = tokens_by_source(load_mixture(recipe.data.mixture), steps, size)
    return {name: tokens / (steps * size) for name, tokens in seen.items()}


def rows_read(run_dir: Path, batch_rows: int) -> ReadRows:
    """Shares and epochs up to the newest saved step, from the history of rows that it carries.

    Raises: GlamError when there is no saved step, or it has no such history.
    """
    meta = step_folders.step_meta(step_folders.find_step(run_dir))
    try:
        history, step = meta["data"]["history"], int(meta["step"])
        starts = [(int(first), dict(parts)) for first, parts in history["stages"]]
        sizes = {str(name): int(rows) for name, rows in history["num_rows"].items()}
        unread = {name: 1 for _, parts in starts for name in parts if name not in sizes}
        schedule = Schedule(int(history["seed"]), starts, sizes | unread)
        left_out = [(int(first), int(end)) for first, end in meta.get("skipped_batches", [])]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise GlamError(f"the newest saved step has no history of rows: {error!r}") from None
    ends = sorted({round(step * part / WINDOWS) for part in range(1, WINDOWS + 1)} - {0})
    shares: dict[str, list[tuple[int, float]]] = {name: [] for name in schedule.names}
    epochs: dict[str, list[tuple[int, float]]] = {name: [] for name in sizes}
    total, before = dict.fromkeys(schedule.names, 0), 0
    for end in ends:
        read = _trained_on(schedule, before, end, left_out, batch_rows)
        num = sum(read.values())
        for name, rows in read.items():
            total[name] += rows
            shares[name] += [(end, rows / num)] if num else []
            if name in epochs:
                epochs[name].append((end, total[name] / max(sizes[name], 1)))
        before = end
    return ReadRows(step, total, shares, epochs, _stage_shares(starts, batch_rows))


def _trained_on(
    schedule: Schedule, start: int, end: int, left_out: list[tuple[int, int]], batch_rows: int
) -> dict[str, int]:
    """Rows of every source in the batches of these steps, without those that rewinds left out."""
    read = schedule.counts(start * batch_rows, end * batch_rows)
    for first, last in left_out:
        first, last = max(first, start), min(last, end)
        if first < last:
            gone = schedule.counts(first * batch_rows, last * batch_rows)
            read = {name: rows - gone[name] for name, rows in read.items()}
    return read


def _stage_shares(
    starts: list[tuple[int, dict[str, float]]], batch_rows: int
) -> list[tuple[int, dict[str, float]]]:
    """From which step on which shares hold."""
    return [
        (first // batch_rows, {name: part / sum(parts.values()) for name, part in parts.items()})
        for first, parts in starts
    ]
