"""What there is to know of the saved steps of a run without reading their arrays.

Read from the descriptions beside the arrays and from the metrics; needs neither jax nor orbax.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glamcli import step_folders
from glamcli.errors import CheckpointError
from glamcli.step_folders import ARRAYS_URL, SET_ASIDE, arrays_of
from glamcli.storage import Remote
from glamcli.train.metric_files import metric_lines
from glamcli.untrusted import open_regular

HELDOUT = "heldout/"


@dataclass(frozen=True)
class SavedStep:
    """A step folder. `status` is `good`, `bad streak` (saved while updates were refused), `damaged`
    or `set aside`; `reason` says what is damaged."""

    step: int
    folder: Path
    status: str
    reason: str | None
    num_bytes: int
    unix_seconds: float | None
    """when its description was written."""
    format: int | None
    tokens_seen: int | None
    """padding and batches that were left out included."""
    skipped_batches: list[list[int]]
    """ranges [first, end) that rewinds left out so far."""
    heldout_nats: dict[str, float] = field(default_factory=dict)
    """by source, as far as the metrics have this step."""


def saved_steps(run_dir: Path) -> list[SavedStep]:
    """Every saved step, by number, with those set aside behind.

    Raises: CheckpointError when the folder holds no saved step, or it cannot be looked at.
    """
    folder = run_dir.absolute() / "checkpoints"
    steps = [_described(folder / name, step) for step, name in step_folders.step_names(folder)]
    steps += [
        _described(folder / SET_ASIDE / name, int(name.split(".")[0]))
        for name in step_folders.steps_aside(folder)
    ]
    if not steps:
        raise CheckpointError(
            f"{run_dir} has no checkpoints",
            hint="give the folder of a run, such as runs/quickstart",
        )
    # The run that is training may have deleted some meanwhile.
    steps = [each for each in steps if os.path.lexists(each.folder)]
    losses = _heldout(run_dir / "metrics.jsonl", {each.step for each in steps})
    for each in steps:
        if each.status != "set aside":
            each.heldout_nats.update(losses.get(each.step, {}))
    return sorted(steps, key=lambda each: (each.status == "set aside", each.step, each.folder.name))


def _described(folder: Path, step: int) -> SavedStep:
    is_aside = folder.parent.name == SET_ASIDE
    found = "" if is_aside else step_folders.examined(folder)
    meta, seconds = {}, None
    # The step may be deleted, and its description damaged, while this looks at them.
    with contextlib.suppress(OSError, ValueError, TypeError):
        meta = dict(step_folders.step_meta(folder)) if isinstance(found, str) else found
        seconds = (folder / "meta" / "metadata").stat().st_mtime
    if isinstance(found, str):
        status, reason = ("set aside", None) if is_aside else ("damaged", found)
    else:
        status, reason = "good" if meta.get("good", True) else "bad streak", None
    version = meta.get("format")
    return SavedStep(
        step=step,
        folder=folder,
        status=status,
        reason=reason,
        num_bytes=_num_bytes(folder),
        unix_seconds=seconds,
        format=version if isinstance(version, int) else None,
        tokens_seen=_tokens(meta, step),
        skipped_batches=_ranges(meta),
    )


def _num_bytes(folder: Path) -> int:
    """Raises: CheckpointError when its arrays are in a bucket that does not answer."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    link = folder / ARRAYS_URL
    if not link.is_file():
        return total
    try:
        arrays = Remote(arrays_of(folder))
        total += sum(each.num_bytes for each in arrays.tree().values()) - link.stat().st_size
    except (FileNotFoundError, ValueError):  # deleted meanwhile; or of no bucket, told elsewhere
        pass
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror or error}") from error
    return total


def _tokens(meta: Mapping[str, Any], step: int) -> int | None:
    try:
        batch = meta["recipe"]["batch"]
        return step * int(batch["rows"]) * int(batch["row_tokens"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _ranges(meta: Mapping[str, Any]) -> list[list[int]]:
    try:
        return [[int(first), int(end)] for first, end in meta.get("skipped_batches", [])]
    except (TypeError, ValueError, OverflowError):
        return []


def _heldout(path: Path, steps: set[int]) -> dict[int, dict[str, float]]:
    """Held-out losses of these steps by source; lines that cannot be read are left out."""
    found: dict[int, dict[str, float]] = {}
    with contextlib.suppress(OSError), open_regular(path) as file:
        for _, values in metric_lines(file, f'"{HELDOUT}'.encode()):
            if values is not None and values["step"] in steps:
                losses = {
                    name.removeprefix(HELDOUT): value
                    for name, value in values.items()
                    if name.startswith(HELDOUT) and isinstance(value, float)
                }
                found.setdefault(values["step"], {}).update(losses)
    return found
