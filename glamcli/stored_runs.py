"""A run at a URL, to be read: its small files as a folder on this machine, which every reader of
run folders reads. Arrays stay where they are; nothing is locked and nothing written there.

The folder is in the cache folder of the user and is kept: only what has changed is fetched again.
"""

import errno
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from glamcli import atomic
from glamcli.data.cache import ANOTHER_CACHE, json_digest, user_cache_dir
from glamcli.errors import CheckpointError, name_folder
from glamcli.hosts.lock import hold
from glamcli.step_folders import ARRAYS_URL, SET_ASIDE
from glamcli.storage import Listed, Remote, place
from glamcli.untrusted import MAX_FILE_BYTES, parse_as, read_file

STEPS = "steps.json"
"""the object that has all files below `checkpoints`, small as they are, by name: which steps there
are, and which are set aside, changes as a whole, and after all other files."""
MOVED = "moved to"
"""what is in it instead while `--fresh` moves the run: the URL where all of it is by then."""
WRITTEN = "written"
"""what each write of it makes anew, so that it has another version (`conditional.py`) even when all
else is as before."""
STEPS_FOLDER = "checkpoints"
OWNER = "lock.json"
"""the object that names who writes to the run (`hosts/lease.py`)."""
RESULTS_FOLDER, BIAS_FOLDER, OVERLAP_FOLDER = RESULTS = ("eval", "bias", "overlap")
"""folders of a run that others than its owner write to."""
UNFINISHED = "unfinished-"
"""how the names of files begin by which an evaluation goes on."""
_METRICS = "metrics.jsonl"
_LATER_METRICS = re.compile(r"metrics\.after-.*")
_COMPARED_BYTES = 4096
"""at the end of metrics, to see whether a longer object goes on where they end."""
_INDEX = ".versions.json"
PATIENCE_SECONDS = 60.0
"""how long a reader waits for another one that fetches the same run."""
_STEP_FILE = re.compile(rf"(?P<step>({SET_ASIDE}/)?\d+(\.\d+)?)/(?P<name>\w[\w.-]*(/\w[\w.-]*)?)")
_STEP_URL = re.compile(rf"(?P<run>.+)/{STEPS_FOLDER}(/({SET_ASIDE}/)?\d+(\.\d+)?)?")
_ARRAYS = re.compile(r"(.*/)?(?P<place>arrays/\d+(/[\w-]+)+)")


def local(run: Path, *, metrics: bool = True, results: bool = False) -> Path:
    """The folder to read a run from, or one of its steps: the path itself or, for a URL, an
    up-to-date copy, which all texts call by the URL. With `metrics` and with `results` of
    evaluations only where they are asked for.

    Raises: CheckpointError when no run is there, or it cannot be read or copied.
    """
    if not isinstance(run, Remote):
        return run
    copy = Copy(run_of(run))
    copy.refresh(metrics=metrics, results=results)
    return copy.folder / run.relative_to(copy.url)


def run_of(url: Path) -> Path:
    """The URL of the run that a URL is of, or of a step of."""
    found = _STEP_URL.fullmatch(str(url))
    return place(found["run"]) if found else url


def parse_steps(data: bytes, run: Remote) -> dict[str, str]:
    """The files below `checkpoints` of the run at this URL by name. Their arrays are below the URL
    as well, also where the run was copied from elsewhere.

    Raises: ValueError for what is no steps.json; CheckpointError for a run that was being moved.
    """
    files = parse_as(dict[str, str], data)
    if MOVED in files:
        what = f"`--fresh` was interrupted when it had copied {run} to {files[MOVED]}"
        raise CheckpointError(what, "go on with the run there, or start anew with `--fresh` again")
    files.pop(WRITTEN, None)
    for name, text in files.items():
        if not _STEP_FILE.fullmatch(name):
            raise ValueError(f"not a file of a step: `{name[:80]}`")
        if name.endswith(f"/{ARRAYS_URL}"):
            if not (found := _ARRAYS.fullmatch(text)):
                raise ValueError(f"`{name}` does not say where its arrays are")
            files[name] = f"{run}/{found['place']}"
    return files


def is_plain(name: str) -> bool:
    """Whether the name of an object, relative to a run, can be that of a file below a folder, and
    of none that is hidden."""
    return not any(part.startswith(".") or not part for part in name.split("/"))


class Copy:
    """The copy of the run at `url` on this machine."""

    def __init__(self, url: Path):
        self.url = Remote(url)
        self.folder = user_cache_dir() / "copies" / json_digest(str(url))[:16]
        name_folder(str(self.folder), str(url))

    def refresh(self, *, metrics: bool = True, results: bool = False) -> None:
        """Fetches what has changed.

        Raises: CheckpointError when no run is there, or it cannot be read or copied.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._held():
                self._refresh(metrics, results)
        except OSError as error:
            where, reason = str(error.filename or ""), error.strerror or str(error)
            is_here = where.startswith(str(self.folder))
            what = f"{self.url} cannot be copied to {self.folder.parent}" if is_here else where
            hint = ANOTHER_CACHE if is_here else None
            raise CheckpointError(f"{what or self.url}: {reason}", hint) from error
        except ValueError as error:
            raise CheckpointError(f"{self.url / STEPS} cannot be used: {error}") from error

    def _held(self) -> IO[str]:
        """Raises: CheckpointError when another reader of this machine has it for too long, such as
        one that was stopped (Ctrl-Z)."""
        until = time.monotonic() + PATIENCE_SECONDS

        def wait(holder: str) -> None:
            if time.monotonic() < until:
                raise BlockingIOError
            what = f"{self.url} cannot be read: its copy here is being fetched by {holder}"
            raise CheckpointError(what, "end it if it hangs")

        while True:
            with suppress(BlockingIOError):
                return hold(self.folder.with_suffix(".lock"), wait)
            time.sleep(0.1)

    def _refresh(self, metrics: bool, results: bool) -> None:
        found = self._listed()
        if not metrics:
            found.pop(_METRICS, None)
        if results:
            (self.folder / RESULTS_FOLDER).mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                tree = (self.url / RESULTS_FOLDER).tree()
                whole = {n: each for n, each in tree.items() if not n.startswith(UNFINISHED)}
                found |= {f"{RESULTS_FOLDER}/{name}": each for name, each in whole.items()}
        known = self._known()
        # Steps first: what was written by then is in the metrics, which are written before.
        for name in sorted(found, key=lambda name: name != STEPS):
            is_here = known.get(name) == found[name].version and (self.folder / name).exists()
            if not is_here and _is_copied(name):
                with suppress(FileNotFoundError):
                    self._fetch(name, found[name], name in known)
                known[name] = found[name].version
        kept = () if metrics else (_METRICS,)
        gone = [n for n in known if n not in found and n not in kept and (results or "/" not in n)]
        for name in gone:
            del known[name]
            (self.folder / name).unlink(missing_ok=True)
            if name == STEPS:
                self._unpack({})
        atomic.write(self.folder / _INDEX, json.dumps(known))

    def _listed(self) -> dict[str, Listed]:
        reason, found = "", {}
        try:
            found = {name: each for name, each in self.url.listed().items() if _is_copied(name)}
        except FileNotFoundError as error:
            reason = f": {error.strerror}"
        if OWNER not in found and STEPS not in found:
            hint = "give the URL that `glam train --run` was given"
            raise CheckpointError(f"no run at {self.url}{reason}", hint)
        return found

    def _known(self) -> dict[str, str]:
        with suppress(OSError, ValueError):
            return parse_as(dict[str, str], read_file(self.folder / _INDEX))
        return {}

    def _fetch(self, name: str, listed: Listed, is_here: bool) -> None:
        path, url = self.folder / name, self.url / name
        if listed.num_bytes > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MAX_FILE_BYTES:,} bytes", str(url))
        if name != _METRICS or not is_here or not _append(path, url, listed.num_bytes):
            data = url.read_from(0)
            if name == STEPS:
                self._unpack(parse_steps(data, self.url))
            atomic.write(path, data)
        os.utime(path, (listed.unix_seconds, listed.unix_seconds))

    def _unpack(self, files: Mapping[str, str]) -> None:
        """Makes the step folders those of these files, each of which appears whole."""
        folder = self.folder / STEPS_FOLDER
        steps: dict[str, dict[str, str]] = defaultdict(dict)
        for name, text in files.items():
            if parts := _STEP_FILE.fullmatch(name):
                steps[parts["step"]][parts["name"]] = text
        here = [path for path in folder.glob("*") if path.name != SET_ASIDE]
        for path in (*here, *(folder / SET_ASIDE).glob("*")):
            if str(path.relative_to(folder)) not in steps:
                shutil.rmtree(path, ignore_errors=True)
        for step, contents in steps.items():
            if _texts(folder / step) != contents:
                unfinished = folder / f".{step.replace('/', '.')}"
                shutil.rmtree(unfinished, ignore_errors=True)
                for name, text in contents.items():
                    atomic.write(unfinished / name, text)
                _set_time(unfinished / "meta" / "metadata", contents.get(ARRAYS_URL))
                shutil.rmtree(folder / step, ignore_errors=True)
                (folder / step).parent.mkdir(exist_ok=True)
                unfinished.rename(folder / step)


def _is_copied(name: str) -> bool:
    return is_plain(name) and _LATER_METRICS.fullmatch(name) is None


def _append(path: Path, url: Remote, num_bytes: int) -> bool:
    """Adds what an object has more than a file; False when it does not begin with the file."""
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if not 0 < size < num_bytes:
                return False
            start = file.seek(max(0, size - _COMPARED_BYTES))
            end, new = file.read(), url.read_from(start)
            if new.startswith(end):
                file.write(new[len(end) :])
                return True
    except FileNotFoundError:
        pass
    return False


def _texts(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def _set_time(description: Path, arrays: str | None) -> None:
    """Gives a description the time at which the arrays of its step were complete."""
    if arrays is not None and description.is_file():
        with suppress(OSError):
            seconds = Remote(arrays).listed()["_METADATA"].unix_seconds
            os.utime(description, (seconds, seconds))
