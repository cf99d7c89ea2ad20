"""What is in the working folder of a run in a bucket, and which objects of the bucket are its."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from glamcli import atomic
from glamcli.errors import CheckpointError
from glamcli.step_folders import TRASH
from glamcli.storage import Listed, Remote
from glamcli.stored_runs import OWNER, RESULTS, STEPS, STEPS_FOLDER, WRITTEN, parse_steps
from glamcli.untrusted import parse_as

ELSEWHERE = ("arrays/", "launch/", "profile/", *(f"{folder}/" for folder in RESULTS), OWNER)
"""not the mirror's: what others write (arrays, a launch, traces, scores), and the owner."""
_NOT_FILES = (*ELSEWHERE, f"{STEPS_FOLDER}/")
_NOT_STEPS = (TRASH, ".orbax-checkpoint-tmp")


def objects_of_run(url: Remote) -> dict[str, Listed]:
    """All objects of the run at `url`. Raises: OSError; CheckpointError for a folder of runs."""
    found = url.tree()
    for name in found:
        run, _, last = name.rpartition("/")
        if run and last in (STEPS, OWNER) and not name.startswith(ELSEWHERE):
            what = f"{url} is no run, but a folder of runs such as {url / run}"
            raise CheckpointError(what, hint="give the URL of one run with `--run`")
    return found


def refuse_run_of_disk(url: Remote, names: Iterable[str]) -> None:
    """Raises: CheckpointError when step folders are among the objects of a run."""
    if any(name.startswith(f"{STEPS_FOLDER}/") for name in names):
        what = f"{url} was copied from a disk: its steps are in {url / STEPS_FOLDER}"
        hint = "train it on a disk, or give another URL with `--run`, or `--fresh`"
        raise CheckpointError(what, hint)


def packed_steps(working: Path) -> bytes:
    """All small files of the steps of a working folder as they were at one time: a step that is
    renamed meanwhile might be missed under both names."""
    folder = working / STEPS_FOLDER
    seen, texts = None, {}
    while folder.is_dir() and (seen is None or seen != texts.keys()):
        seen = texts.keys()
        try:
            found = _files(folder, lambda name: not any(part in name for part in _NOT_STEPS))
            texts = {name: path.read_text() for name, path in found.items()}
        except FileNotFoundError:
            seen = None
    return json.dumps(texts).encode()


def as_written(packed: bytes) -> bytes:
    """What is written to `STEPS`, so that the object changes each time."""
    return json.dumps({**json.loads(packed), WRITTEN: uuid.uuid4().hex}).encode()


def as_packed(written: bytes) -> bytes:
    """What `packed_steps` gave; of an object that is not there, no steps.

    Raises: ValueError for something else than steps.
    """
    files = parse_as(dict[str, str], written or b"{}")
    return json.dumps({name: text for name, text in files.items() if name != WRITTEN}).encode()


def write_steps(working: Path, packed: bytes, url: Remote) -> None:
    """Makes these the steps of a working folder, of the run at `url`.

    Raises: OSError; ValueError for something else than steps.
    """
    folder = working / STEPS_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in parse_steps(packed, url).items():
        atomic.write(folder / path, text)


def small_files(working: Path) -> dict[str, Path]:
    """All files of a working folder that are objects of their own, by name, sorted.

    Raises: OSError.
    """
    return _files(working, lambda name: not name.startswith(_NOT_FILES))


def _files(folder: Path, is_kept: Callable[[str], bool]) -> dict[str, Path]:
    """The files below a folder that are not hidden, by their name relative to it.

    Raises: OSError, also when a folder in it cannot be listed: what is not seen is not gone.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: dict[str, Path] = {}
    for here, folders, names in os.walk(folder, onerror=refuse):
        place = Path(here).relative_to(folder)
        kept = [n for n in folders if n[0] != "." and is_kept(f"{(place / n).as_posix()}/")]
        folders[:] = sorted(kept)
        for name in (place / n for n in names if n[0] != "."):
            if is_kept(name.as_posix()) and (folder / name).is_file():
                found[name.as_posix()] = folder / name
    return dict(sorted(found.items()))
