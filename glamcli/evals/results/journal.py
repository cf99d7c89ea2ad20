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
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glamcli.untrusted import parse_json, read_file


@dataclass
class Journal:
    """Batches by their digest. Without a file it keeps nothing."""

    path: Path | None = None
    warn: Callable[[str], None] = lambda text: None
    """is called when the file can no longer be written to; the evaluation continues."""
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    """batches of an earlier start."""

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
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"unfinished-{name}.jsonl"
        kept = b"" if fresh or not os.path.exists(path) else read_file(path)
        lines = kept.splitlines(keepends=True)
        if not lines or lines[0] != head + b"\n":
            path.write_bytes(head + b"\n")
            lines = [head + b"\n"]
        journal = cls(path, warn)
        size = len(lines[0])
        for line in lines[1:]:
            entry: Any = None
            with contextlib.suppress(ValueError):
                entry = parse_json(line)
            digest = entry.pop("sha256", None) if isinstance(entry, dict) else None
            if not line.endswith(b"\n") or digest != inputs_digest([entry]):
                break  # torn by what ended that run, or damaged since
            journal.known[entry["key"]] = entry
            size += len(line)
        os.truncate(path, size)
        return journal

    def add(self, key: str, found: Mapping[str, Any]) -> None:
        """Keeps a batch; it is in the file when this returns."""
        if self.path is None:
            return
        try:
            with self.path.open("ab") as file:
                entry = {"key": key, **found}
                line = json.dumps({**entry, "sha256": inputs_digest([entry])})
                file.write(line.encode() + b"\n")
        except OSError as error:
            self.warn(f"later batches are not stored for resuming: {error.strerror}: {self.path}")
            self.path = None

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
