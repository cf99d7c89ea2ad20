"""Folders of saved steps: which are complete, why others are not, and where the newest one is.

Needs neither jax nor orbax. `checkpoint.py` writes and reads the arrays in them.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from glamcli.errors import CheckpointError, DamagedCheckpoint
from glamcli.untrusted import parse_json, read_file

CHECKPOINT_FORMAT = 4
"""4 since a step holds digests of its arrays and a checksum of its description (2 and 3 are read
without a proof); 3 since Adafactor takes attention's heads and their width as one dimension (format
2 is read, but for those statistics); 2 since experts' `w_out` is stored as [E, M, H], like `w_in`.
"""
OLDEST_FORMAT = 2
NEWER = f"written by a newer version, of a format after {CHECKPOINT_FORMAT}"
"""the fault of a step that is not damaged: every format has `step`, `format` and `checksum`."""
SET_ASIDE = "set-aside"
"""where in a checkpoints folder the step folders go that a run must not continue from."""
TRASH = "trash"
"""where they go that are being deleted: a folder half deleted must not look like a step."""
FEWEST_KEPT = 2
"""good steps that stay whatever happens."""

ARRAYS_URL = "arrays.url"
"""a file of a step folder: the URL of the arrays, when they are in a bucket and not in `state`."""
_ARRAYS_URL = re.compile(r"(gs|s3)://[^?#\s]+/arrays/\d+(/[\w-]+)+")

Meta = dict[str, Any]


def complete_steps(folder: Path, but: Container[str] = ()) -> list[int]:
    """The complete steps of a checkpoints folder, newest first, but for those with these names."""
    return [*_complete(folder, but)]


def good_steps(folder: Path, but: Container[str] = ()) -> list[int]:
    """Those of them that were not saved in a bad streak."""
    return _good(_complete(folder, but))


def surplus_steps(folder: Path, keep: int, but: Container[str] = ()) -> list[int]:
    """The complete steps that need not stay, oldest first: not the newest, nor the newest `keep`
    good ones, at least two."""
    complete = _complete(folder, but)
    staying = {*list(complete)[:1], *_good(complete)[: max(keep, FEWEST_KEPT)]}
    return sorted(complete.keys() - staying)


def damaged_steps(folder: Path) -> dict[str, str]:
    """Step folders that cannot be used, with the reason."""
    return {p.name: reason for p in _folders(folder) if (reason := fault(p)) is not None}


def find_step(path: Path, step: int | None = None) -> Path:
    """The folder of one complete step under a run, checkpoints or step folder; the newest if `step`
    is None.

    Raises: CheckpointError when there is none, with the steps there are.
    """
    path = path.absolute()
    if step is None and path.name.isdecimal() and fault(path) is None:
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = complete_steps(folder)
    if steps and step is None:
        return folder / str(steps[0])
    if step in steps:
        return folder / str(step)
    damaged, hint = damaged_steps(folder), None
    if steps:
        reason, hint = damaged.get(str(step)), f"has {steps}"
    elif (folder / "state").exists() or (folder / "meta").exists():  # a step's own folder
        reason = fault(folder)
    else:
        reason = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
        if not damaged and (aside := steps_aside(folder)):
            reason = f"all are set aside: {', '.join(aside)}"
    what = f"complete checkpoint of step {step}" if steps else "complete checkpoint"
    raise CheckpointError(f"{path}: no {what}" + (f" ({reason})" if reason else ""), hint=hint)


def find_steps(path: Path, step: int | None = None) -> list[Path]:
    """The step folders to read a model from, the first that can be read: of a run all, newest
    first, complete or not; else the one that `path` or `step` names.

    Raises: CheckpointError when none is complete.
    """
    newest = find_step(path, step)
    if step is not None or newest == path.absolute():
        return [newest]
    return newest_first(newest.parent)


def newest_first(folder: Path) -> list[Path]:
    """All step folders of a checkpoints folder, complete or not."""
    return [folder / name for _, name in sorted(step_names(folder), reverse=True)]


def fault(folder: Path) -> str | None:
    """Why a step folder is not a complete checkpoint of the step in its name; None when it is."""
    found = examined(folder)
    return found if isinstance(found, str) else None


def refusal(folder: Path, fault: str) -> CheckpointError:
    """What to raise for the `fault` of a step folder: DamagedCheckpoint, for which an older step
    may be taken, or for a newer version's, which is whole, CheckpointError."""
    what = f"checkpoint {folder} cannot be used: {fault}"
    if fault != NEWER:
        return DamagedCheckpoint(what)
    older = "go back to a step of this one (`glam checkpoint rewind`)"
    return CheckpointError(what, hint=f"use the version that wrote it, or {older}")


def complete_meta(folder: Path) -> Meta:
    """The description of a step folder that is complete.

    Raises: DamagedCheckpoint when it is not; CheckpointError when a newer version wrote it.
    """
    found = examined(folder)
    if isinstance(found, str):
        raise refusal(folder, found)
    return found


def examined(folder: Path) -> Meta | str:
    """The description of a step folder that is complete, or why it is not; read once, because the
    step may be deleted meanwhile."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            return "not a folder"
        if any((folder / item).is_symlink() for item in ("state", "meta")):
            return "a part of it is a link to elsewhere"
        has_state = (folder / "state" / "_METADATA").is_file() or (folder / ARRAYS_URL).is_file()
        if not has_state:
            return "the state is missing or half written"
        meta = step_meta(folder)
        step, version = meta["step"], meta["format"]
        if not isinstance(version, int):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        return "its description (meta/metadata) cannot be read"
    if (version >= 4 or "checksum" in meta) and meta.get("checksum") != checksum(meta):
        return "its description (meta/metadata) is not as saved"
    if version > CHECKPOINT_FORMAT:
        return NEWER
    if version < OLDEST_FORMAT:
        return f"written by an older version (format {version}, this one reads {CHECKPOINT_FORMAT})"
    if not _is_tree(meta.get("tree")):
        return "its description (meta/metadata) cannot be read"
    if str(step) != folder.name:
        return f"it holds step {step}"
    return meta


def arrays_of(folder: Path) -> str:
    """The path or URL of the arrays of a step folder.

    Raises: OSError when it cannot be read; ValueError for what no run in a bucket has written.
    """
    try:
        url = read_file(folder / ARRAYS_URL).decode()
    except FileNotFoundError:
        return str(folder / "state")
    if not _ARRAYS_URL.fullmatch(url):
        raise ValueError(f"not the URL of arrays: `{url[:80]}`")
    return url


def step_meta(folder: Path) -> Meta:
    """The JSON object that the run wrote beside the arrays of a step."""
    return parse_json(read_file(folder / "meta" / "metadata"))


@contextlib.contextmanager
def describing(folder: Path) -> Iterator[None]:
    """While the description of a step folder is used, which has what its version of the program
    wrote, unless somebody changed it before there were checksums.

    Raises: DamagedCheckpoint when it lacks something.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"its description (meta/metadata) cannot be used ({type(error).__name__}: {error})"
        raise DamagedCheckpoint(f"checkpoint {folder}: {what}") from error


def checksum(meta: Mapping[str, Any]) -> str:
    """SHA-256 over a description, whose own `checksum` does not count."""
    content = {name: value for name, value in meta.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_tree(tree: Any) -> bool:
    return isinstance(tree, dict) and all(
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], list)
        and all(type(size) is int and size >= 0 for size in entry[1])
        for entry in tree.values()
    )


def step_names(folder: Path) -> list[tuple[int, str]]:
    """Number and name of every step folder of a checkpoints folder, complete or not."""
    return [(int(path.name), path.name) for path in _folders(folder)]


def steps_aside(folder: Path) -> list[str]:
    """Names of the step folders of a checkpoints folder that are set aside."""
    aside = folder / SET_ASIDE
    names = [path.name for path in aside.iterdir()] if aside.is_dir() else []
    return sorted(name for name in names if name.split(".")[0].isdecimal())


def place_aside(folder: Path, name: str) -> Path:
    """Where a step folder of a checkpoints folder would be set aside: under a name not in use."""
    place, number = folder / SET_ASIDE / name, 0
    while place.exists():
        number += 1
        place = place.with_name(f"{name}.{number}")
    return place


def move_aside(folder: Path, name: str) -> None:
    """Sets a step folder aside: nothing continues from it, and nothing is deleted."""
    place = place_aside(folder, name)
    place.parent.mkdir(exist_ok=True)
    (folder / name).rename(place)


def delete_step(folder: Path, step: int) -> None:
    """Moves a step folder to the trash, which `empty_trash` empties.

    Raises: OSError.
    """
    (folder / TRASH).mkdir(exist_ok=True)
    (folder / str(step)).rename(folder / TRASH / str(step))


def empty_trash(folder: Path) -> None:
    """Deletes, while nothing is being saved, what a failed or killed save left behind and what
    waits to be deleted: both would keep a full disk full."""
    for left in (*folder.glob("*.orbax-checkpoint-tmp*"), folder / TRASH):
        shutil.rmtree(left, ignore_errors=True)


def _complete(folder: Path, but: Container[str]) -> dict[int, Meta]:
    found = {int(path.name): examined(path) for path in _folders(folder) if path.name not in but}
    complete = {step: meta for step, meta in found.items() if not isinstance(meta, str)}
    return dict(sorted(complete.items(), reverse=True))


def _good(complete: Mapping[int, Meta]) -> list[int]:
    return [step for step, meta in complete.items() if meta.get("good", True)]


def _folders(folder: Path) -> list[Path]:
    """Raises: CheckpointError when they cannot be listed."""
    try:
        return [p for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
