"""The data of tasks: what is there, what exactly is missing, and how it gets there.

A task reads a file of its own (JSONL in the dataset's field names) or, instead, a prepared TFDS
directory. The file is made from what the authors publish (`convert.py`); the directory by TFDS,
where the network allows it.
"""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glamcli import atomic
from glamcli.data.examples import prepare_directory
from glamcli.errors import DataError, GlamError, redacted
from glamcli.evals.asking.question import ask
from glamcli.evals.tasks import template
from glamcli.evals.tasks.convert import records
from glamcli.evals.tasks.items import Library, task_paths
from glamcli.evals.tasks.schema import ItemSource, OriginalFile, Records, Task
from glamcli.evals.tasks.suites import TaskFile

READY = "ready"
_REACH_SECONDS = 5.0
_TFDS_NAME = re.compile(r"[a-z]\w*(/\w[\w.+-]*)?/\d+\.\d+\.\d+", re.ASCII)


@dataclass(frozen=True)
class Need:
    """One file or directory that a task reads."""

    task: str
    part: str
    """`items` or `demonstrations`."""
    source: ItemSource
    """of which the first form that is whole is read."""
    folder: Path
    """what their paths are relative to."""
    fields: tuple[str, ...]
    """that every record has to have, by their names in the first form."""
    files: tuple[OriginalFile, ...]
    """of the authors, from which the first form is made."""

    @property
    def missing(self) -> tuple[Path, ...]:
        """Files of the first form that are not there or empty; none when any form is whole."""

        def has_content(path: Path) -> bool:
            return os.path.isdir(path) or (os.path.isfile(path) and path.stat().st_size > 0)

        forms = [form.paths(self.folder) for form in self.source.forms]
        if any(all(map(has_content, paths)) for paths in forms):
            return ()
        return tuple(path for path in forms[0] if not has_content(path))

    @property
    def prepared(self) -> str | None:
        """The TFDS directory that would do as well, for example `piqa/1.0.0`."""
        names = (form.path for form in self.source.forms if form.kind == "tfds")
        return next((name for name in names if isinstance(name, str)), None)

    def convert(self, given: Path) -> list[tuple[Path, int]]:
        """Makes the missing files from those of the authors below `given`; (file, records in it).

        Files whose originals are not there are left out.

        Raises:
            DataError: an original cannot be read, several files could be it, or a file that the
                task names is outside of its data folder, where nothing is written.
        """
        made = []
        for path in self.missing:
            for original in self.files:
                if original.to == path.name and (found := _originals(original, given)):
                    _refuse_outside(path, self.folder)
                    lines = [each for one in found for each in records(original.shape, one)]
                    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in lines)
                    atomic.write(path, text.encode(errors="surrogatepass"))
                    made.append((path, len(lines)))
                    break
        return made

    def prepare(self) -> None:
        """Lets TFDS download and prepare what is missing.

        Raises:
            DataError: TFDS does not have it in this form, or could not.
        """
        if self.prepared is None:
            raise DataError(
                f"task `{self.task}`: TFDS does not have this data in a form that keeps all of it"
            )
        if not _TFDS_NAME.fullmatch(self.prepared):
            raise DataError(
                f"task `{self.task}`: `{self.prepared}` is not the name of a dataset of TFDS",
                hint="names look like `piqa/1.0.0` or `super_glue/boolq/1.0.2`",
            )
        prepare_directory(self.prepared, self.folder)


def needs(file: TaskFile, folder: Path) -> list[Need]:
    """What a task reads; nothing for questions about a run's own held-out documents.

    Raises:
        GlamError: the task file cannot be read.
    """
    task = file.at(0)
    if task.data.kind == "heldout":
        return []
    found = []
    for part, source in (("items", task.data), ("demonstrations", file.at(1).shots.data)):
        if source is not None:
            names = {path.name for path in source.paths(folder)}
            files = task.origin.files if task.origin else ()
            files = tuple(each for each in files if each.to in names)
            fields = _record_fields(task, source)
            found.append(Need(file.name, part, source, folder, fields, files))
    return found


def _record_fields(task: Task, source: Records) -> tuple[str, ...]:
    """The fields of a record that the task reads, by their names in the file."""
    names = task_paths(task, *_READING) | ({source.where} if source.where else set())
    found: set[str] = set()
    for name in names:
        root, dot, rest = name.partition(".")
        at: str = source.fields.get(root, root)
        found |= set(template.paths(at)) if "{" in at else {at + dot + rest}
    return tuple(sorted(found))


_READING = ("history", "prompt", "contexts", "continuation", "options", "option_text", "label",
            "labels", "right", "answers", "shown_answer", "group", "by")  # fmt: skip


def _refuse_outside(path: Path, folder: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"{path} is outside of the data folder {folder}, where nothing is written",
            hint="`--data-dir` names the folder, and the task file what is in it",
        )


def _originals(original: OriginalFile, given: Path) -> list[Path]:
    parts = original.name.split("/")
    if any(part in ("", ".", "..") or ("**" in part and part != "**") for part in parts):
        raise DataError(f"`{original.name}` is not the name of a file below the folder of `--from`")
    if given.is_file():
        pattern = original.name.removeprefix("**/")
        return [given] if given.match(pattern) else []
    found = sorted(given.glob(original.name))
    if len(found) > 1 and original.shape != "race":  # RACE has a file per article
        raise DataError(
            f"several files could be `{original.name}`: {', '.join(map(str, found[:3]))}",
            hint="give a folder with one of them to `--from`",
        )
    return found


def is_reachable(url: str) -> bool:
    """Whether a server answers at all, within seconds."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_REACH_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False


def _count_items(file: TaskFile, folder: Path) -> tuple[int, int]:
    """Reads all that a task would read; the numbers of its items and demonstrations.

    Raises:
        GlamError: something cannot be read or asked, with its file and line.
    """
    task = file.at(1)
    library = Library(folder)
    found = library.items(task, file.path)
    for item in found:
        ask(task, item)
    if task.shots.source == "self":
        return len(found), len(found)
    pool = library.pool(task, file.path, found)
    for item in pool:
        ask(task, item, shown=True)
    return len(found), len(pool)


def data_state(file: TaskFile, folder: Path) -> dict[str, Any]:
    """What a task has by now: counts, or what is wrong or missing, for JSON."""
    found: dict[str, Any] = {"task": file.name, "items": None, "demonstrations": None}
    if file.error is not None:
        return {**found, "state": "unreadable", "why": [file.error.what]}
    needed = needs(file, folder)
    if not needed:
        return {**found, "state": READY, "why": ["made from the run's own held-out documents"]}
    missing = [each for each in needed if each.missing]
    if missing:
        present = {each.part: "there" for each in needed if not each.missing}
        return {**found, **present, "state": "missing", "why": _advice(file.at(0), missing)}
    try:
        items, demonstrations = _count_items(file, folder)
    except GlamError as error:
        return {**found, "state": "bad", "why": [error.what]}
    return {**found, "items": items, "demonstrations": demonstrations, "state": READY, "why": []}


def _advice(task: Task, missing: Sequence[Need]) -> list[str]:
    """What is missing, in which field names, and where it comes from, line by line."""
    lines = []
    for need in missing:
        for path in need.missing:
            lines.append(f"no {path} ({need.part})")
            lines += [
                f"  from `{each.name.removeprefix('**/')}` of {each.url}"
                for each in need.files
                if each.to == path.name
            ]
    shapes = {each.shape for need in missing for each in need.files}
    if shapes:
        same = " (or rename them: they are in this form)" if shapes == {"jsonl"} else ""
        lines.append(f"`--from FOLDER` makes them from the authors' files{same}")
    lines.append(
        "each line is a JSON object with " + ", ".join(f"`{n}`" for n in missing[0].fields)
    )
    if missing[0].prepared is not None:
        lines.append(f"or TFDS (array_record): {missing[0].folder / missing[0].prepared}")
    if task.origin is not None:
        note = f"; {task.origin.note}" if task.origin.note else ""
        lines.append(f"home: {task.origin.page} ({task.origin.licence}){note}")
    return list(map(redacted, lines))
