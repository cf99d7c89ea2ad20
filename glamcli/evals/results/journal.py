"""Batches that an unfinished evaluation has scored, so that the same command can resume.

A line of the file is one batch: a digest of everything that went into it besides the model, what
came out, and a digest of both. The file's name and first line identify the evaluation; another
model, suite or seed has another file. A second run plans the same batches and computes those that
are missing; as long as batches are computed in the same way its results are those of an
uninterrupted run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glamcli import atomic
from glamcli.storage import Remote
from glamcli.stored_runs import UNFINISHED
from glamcli.untrusted import parse_json, read_file


@dataclass
class Journal:
    """Batches by their digest. Without a file it keeps nothing."""

    path: Path | None = None
    warn: Callable[[str], None] = lambda text: None
    """is called when the file cannot be written to; the evaluation continues."""
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    """batches of an earlier start."""
    _lines: atomic.Lines | None = None
    _is_late: bool = False

    @classmethod
    def open(
        cls,
        folder: Path,
        conditions: Mapping[str, Any],
        *,
        fresh: bool = False,
        warn: Callable[[str], None] = lambda text: None,
    ) -> Journal:
        """The journal of these conditions in a folder; with `fresh` an empty one.

        Raises:
            OSError: the folder cannot be written to.
        """
        head = json.dumps(conditions, sort_keys=True, default=str).encode()
        name = hashlib.sha256(head).hexdigest()[:16]
        path = folder / f"{UNFINISHED}{name}.jsonl"
        kept = b""
        if not fresh:
            with contextlib.suppress(FileNotFoundError):
                kept = read_file(path)
        whole = [head + b"\n"]
        journal = cls(path, warn)
        lines = kept.splitlines(keepends=True)
        for line in lines[1:] if lines[:1] == whole else ():
            entry: Any = None
            with contextlib.suppress(ValueError):
                entry = parse_json(line)
            digest = entry.pop("sha256", None) if isinstance(entry, dict) else None
            if not line.endswith(b"\n") or digest != inputs_digest([entry]):
                break  # torn by what ended that run, or damaged since
            journal.known[entry["key"]] = entry
            whole.append(line)
        journal._lines = atomic.Lines(path, b"".join(whole))
        return journal

    def add(self, key: str, found: Mapping[str, Any]) -> None:
        """Keeps a batch; on a disk it is in the file when this returns."""
        entry = {"key": key, **found}
        line = json.dumps({**entry, "sha256": inputs_digest([entry])})
        self._try(lambda lines: lines.add(line.encode() + b"\n"))

    def flush(self) -> None:
        """Every batch is in the file when this returns."""
        self._try(lambda lines: lines.flush())

    def _try(self, write: Callable[[atomic.Lines], None]) -> None:
        if self._lines is None:
            return
        try:
            write(self._lines)
        except OSError as error:
            reason = f"{error.strerror}: {self.path}"
            if not isinstance(self.path, Remote):
                self.warn(f"later batches are not stored for resuming: {reason}")
                self.path = self._lines = None
            elif not self._is_late:  # a bucket may answer again, and then gets all of them
                self.warn(f"batches are not yet stored for resuming, and tried again: {reason}")
                self._is_late = True

    def finish(self) -> None:
        """Removes the file: the results are written, there is nothing to resume."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def inputs_digest(given: Iterable[Any]) -> str:
    """SHA-256 of arrays (with their shapes) and of JSON values."""
    sha = hashlib.sha256()
    for each in given:
        if isinstance(each, np.ndarray):
            sha.update(f"{each.dtype}{each.shape}".encode())
            sha.update(each.tobytes())
        else:
            sha.update(json.dumps(each, sort_keys=True).encode())
    return sha.hexdigest()
