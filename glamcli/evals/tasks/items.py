"""Items of a task, read from files or made from held-out documents.

Every item has its place (file:line), so that errors in it can be reported there. A record of a file
may hold several items (`each`: the questions of a story). What an item means is defined by the task
file (`asking/question.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from glamcli.data.cache import task_data_dir
from glamcli.data.examples import prepared_examples
from glamcli.errors import DataError
from glamcli.evals.tasks import template
from glamcli.evals.tasks.quick import questions
from glamcli.evals.tasks.schema import ItemSource, Records, Task
from glamcli.evals.tasks.suites import TASKS
from glamcli.storage import is_url
from glamcli.untrusted import parse_json, read_file


class MissingData(DataError):
    """None of the files or folders that a task reads is there."""


@dataclass(frozen=True)
class Item:
    """One item of a task, in the names that its templates use."""

    fields: Mapping[str, Any]
    place: str
    """file:line, or another name of where it was read."""
    earlier: tuple[Item, ...] = field(default=(), repr=False)
    """the items before it in the same record."""
    asked: tuple[str, ...] | None = field(default=None, repr=False)
    """paths of the fields that its question shows; None: all of them."""

    @cached_property
    def key(self) -> str:
        """A digest of what is asked: equal questions have equal keys, in whatever form the dataset
        was read. Of one record, the number of earlier items counts too."""
        content: Mapping[str, Any] = self.fields
        if self.asked is not None:
            content = {path: template.look_up(self.fields, path, None) for path in self.asked}
        if self.earlier:
            content = {**content, "": len(self.earlier)}
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Library:
    """Where the items of tasks are read or made."""

    data_dir: Path | None = None
    documents: Callable[[], Mapping[str, Sequence[str]]] | None = None
    """held-out documents by source; None when the model has no run folder."""

    def items(self, task: Task, task_path: Path) -> list[Item]:
        """The questions of a task."""
        return self._source(task, task.data, task_path, "items")

    def pool(self, task: Task, task_path: Path, items: list[Item]) -> list[Item]:
        """What its demonstrations are drawn from, in an order that does not depend on the form in
        which the dataset was read."""
        source = task.shots.data or task.data
        if task.shots.source == "pool":
            items = self._source(task, source, task_path, "pool")
        return items if source.kind == "heldout" else sorted(items, key=lambda item: item.key)

    def folder(self, task_path: Path) -> Path:
        """What the paths of a task are relative to."""
        if self.data_dir is not None:
            return self.data_dir
        # Where `glam eval data` puts what shipped tasks read.
        return task_data_dir() if task_path.parent == TASKS else task_path.parent

    def _source(self, task: Task, source: ItemSource, task_path: Path, part: str) -> list[Item]:
        records = _there(source, self.folder(task_path), task_path)
        if records.kind == "heldout" and records.build is not None:
            return self._heldout(records.build, records.items, part)
        asked = tuple(sorted(task_paths(task, *_ASKED)))
        files = records.paths(self.folder(task_path))
        found = [replace(item, asked=asked) for path in files for item in _read(records, path)]
        if not found:
            names = " and ".join(map(str, files))
            raise DataError(f"{names}: no items" + (" that match `where`" if records.where else ""))
        return found

    def _heldout(self, build: str, count: int, part: str) -> list[Item]:
        if self.documents is None:
            raise DataError(
                "this task asks about the run's held-out documents, and no run folder was given",
                hint="give the folder of the run instead of a bare checkpoint",
            )
        made = questions(self.documents(), build, count, part)
        if not made:
            raise DataError(f"no `{build}` question can be made from the held-out documents")
        noun = "question" if part == "items" else "demonstration"
        return [Item(fields, f"{build} {noun} {number}") for number, fields in enumerate(made)]


_ASKED = ("prompt", "contexts", "continuation", "options", "option_text")
# Holes of templates that are not fields of an item, see `Task`.
_OTHER_HOLES = {"history": "answer", "prompt": "history", "option_text": "option"}


def task_paths(task: Task, *keys: str) -> set[str]:
    """Paths of the fields that these keys of a task read, be they paths or templates."""
    found: set[str] = set()
    for key in keys:
        value = getattr(task, key)
        for text in (value,) if isinstance(value, str) else value or ():
            is_path = isinstance(value, str) and key in ("options", "answers", "labels")
            if is_path or key in ("label", "right", "by"):
                found.add(text)
            elif key != "labels":
                found |= set(template.paths(text)) - {_OTHER_HOLES.get(key)}
    return found


def _there(source: ItemSource, folder: Path, task_path: Path) -> Records:
    """The first form of a source whose files are there.

    Raises:
        MissingData: none is, with every file that is missing.
    """
    missing = []
    for form in source.forms:
        lacking = [path for path in form.paths(folder) if not _is_there(path)]
        if not lacking:
            return form
        missing.append(" and ".join(str(path) for path in lacking))
    if task_path.parent == TASKS:
        hint = f"`glam eval data {task_path.stem}` prepares it; `--data-dir` names another folder"
    else:
        hint = "`--data-dir` names the folder the data is in"
    raise MissingData(f"no file {', nor '.join(missing)}", hint=hint)


def _is_there(path: Path) -> bool:
    """Raises: DataError when the server of a URL does not say."""
    try:
        return path.exists() if is_url(path) else os.path.exists(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _read(records: Records, path: Path) -> Iterator[Item]:
    """The items of one file or prepared directory, in order."""
    is_jsonl = records.kind == "jsonl"
    for record in read_jsonl(path) if is_jsonl else _prepared(path, records.split or ""):
        yield from _items_of(records, record)


def _items_of(records: Records, record: Item) -> Iterator[Item]:
    """The items of one record: none when `where` excludes it, else by `fields` and `each`."""
    if records.where and not template.look_up(record.fields, records.where, record.place):
        return
    fields = {name: value for name, value in record.fields.items() if name not in records.drop}
    for name, source in records.fields.items():
        if "{" in source:
            fields[name] = template.render(source, record.fields, record.place)
        else:
            fields[name] = template.look_up(record.fields, source, record.place)
    item = Item(fields, record.place)
    yield from _expanded(records.each, item) if records.each else (item,)


def _expanded(each: Sequence[str], item: Item) -> Iterator[Item]:
    """One item for every entry of the lists at the paths `each`."""
    lists = {path: template.look_up(item.fields, path, item.place) for path in each}
    for path, value in lists.items():
        if not isinstance(value, list):
            raise DataError(f"{item.place}: `{path}` is {type(value).__name__}, not a list")
    lengths = {path: len(value) for path, value in lists.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"`{path}` has {count}" for path, count in lengths.items())
        raise DataError(f"{item.place}: lists of different lengths: {listed}")
    earlier: tuple[Item, ...] = ()
    for number in range(next(iter(lengths.values()))):
        fields: Mapping[str, Any] = item.fields
        for path, value in lists.items():
            fields = _with(fields, path.split("."), value[number])
        turn = Item(fields, f"{item.place} ({each[0]} {number})", earlier)
        yield turn
        earlier = (*earlier, turn)


def _with(fields: Mapping[str, Any], keys: Sequence[str], value: Any) -> Mapping[str, Any]:
    """The fields with another value at a path."""
    if len(keys) > 1:
        value = _with(fields[keys[0]], keys[1:], value)
    return {**fields, keys[0]: value}


def _prepared(folder: Path, split: str) -> Iterator[Item]:
    """The examples of a prepared TFDS directory."""
    for number, fields in enumerate(prepared_examples(folder, split), 1):
        yield Item(fields, f"{folder} {split} {number}")


def read_jsonl(path: Path) -> list[Item]:
    """The objects of a JSONL file; blank lines are skipped.

    Raises:
        DataError: it cannot be read, holds nothing, or a line is not UTF-8 or not an object.
    """
    try:
        lines = read_file(path).splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = parse_json(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON: {error.msg}") from None
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{place}: not a JSON object but {type(value).__name__}")
        items.append(Item(value, place))
    if not items:
        raise DataError(f"{path}: no items in this file")
    return items
