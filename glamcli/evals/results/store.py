"""Results on disk: RUN/eval/NAME.json, and its items beside it, written, found and read again."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

from glamcli import atomic
from glamcli.errors import DataError, GlamError, RecipeError
from glamcli.evals.results.scores import RESULTS_FORMAT, Failure, Results, file_name
from glamcli.progress import Progress
from glamcli.storage import is_url
from glamcli.stored_runs import RESULTS_FOLDER
from glamcli.untrusted import parse_as, parse_json, read_file

_NAME = re.compile(r"(?P<kind>.*)-step(?P<step>\d+)(-(?P<number>\d+))?\Z")
"""what was asked, and of which step"""


def keep_results(results: Results, run_dir: Path, progress: Progress) -> Path | None:
    """Writes results into their run's folder; the file, or None after a warning that the disk is
    full or read-only.

    What is there is replaced by the same evaluation of the same weights only. One that differs in
    what its name does not contain (weights, the files of the suite, items) becomes NAME-2.
    """
    if not results.scores:
        return None
    items = (item for score in results.scores for item in score.items)
    is_same, folder = partial(_says_all_of, results), run_dir / RESULTS_FOLDER
    asked = {name: getattr(results, name) for name in ("preset", "shots", "limit", "seed")}
    name = file_name(results.suite, results.model, **asked)
    return _keep(folder, name, is_same, results.to_json(), items, progress)


def keep_harness(
    content: Mapping[str, Any],
    items: Iterable[Mapping[str, Any]],
    run_dir: Path,
    name: str,
    progress: Progress,
) -> None:
    """The same for lm-eval's results, whose tasks and items must be the same."""
    is_same = partial(_is_same, content, ("configs", "task_hashes", "config.glam.params_digest"))
    _keep(run_dir / RESULTS_FOLDER / "harness", name, is_same, content, items, progress)


def _keep(
    folder: Path,
    name: str,
    is_same: Callable[[Path], bool],
    content: Mapping[str, Any],
    items: Iterable[Mapping[str, Any]],
    progress: Progress,
) -> Path | None:
    """Writes NAME.json and NAME.items.jsonl, or NAME-2 where other results have the name."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    try:
        summary = _free_path(folder, name, is_same)
        beside = _items_path(summary)
        atomic.write(beside, "".join(lines).encode(errors="replace"))
        atomic.write(summary, text.encode(errors="replace"))
    except OSError as error:
        progress.warn(f"results were not kept: {error.strerror or error}: {folder}")
        return None
    progress.say(f"kept in {summary}, items in {beside.name}")
    return summary


def keep_analysis(content: Mapping[str, Any], folder: Path, name: str, progress: Progress) -> None:
    """Writes an analysis as NAME.json, or NAME-2 where one of other weights, or one that was asked
    something else, has the name; a full or read-only disk costs a warning."""
    keys = [key for key in ("asked", "params_digest") if key in content]
    try:
        path = _free_path(folder, name, partial(_is_same, content, keys))
        atomic.write(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        progress.warn(f"not kept: {error.strerror or error}: {folder}")
        return
    progress.say(f"kept in {path}")


def _is_same(content: Mapping[str, Any], keys: Sequence[str], path: Path) -> bool:
    """Whether a file holds the same under these keys; a dot leads into what is inside of one."""
    try:
        contents = (content, parse_json(read_file(path)))
        mine, other = ([reduce(getitem, key.split("."), c) for key in keys] for c in contents)
        return mine == other
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _items_path(summary: Path) -> Path:
    """The file of the items that belong to a file of results."""
    return summary.with_name(f"{summary.stem}.items.jsonl")


def _free_path(folder: Path, name: str, is_same: Callable[[Path], bool]) -> Path:
    """The first of NAME.json, NAME-2.json, ... that is not there or holds the same evaluation."""
    for number in itertools.count(1):
        path = folder / f"{name}{f'-{number}' if number > 1 else ''}.json"
        if not path.exists() or is_same(path):
            return path
    raise AssertionError  # counting does not end


def _says_all_of(results: Results, path: Path) -> bool:
    """Whether results hold every score of the file: of the same weights, by the same conventions,
    on the same items."""

    def conditions(results: Results) -> set[str]:
        # As text: JSON has no tuples. Where items were read from does not matter, their digest is
        # among the conditions.
        digest = results.model.get("params_digest")
        named = [
            [digest, each.task, each.setting, {**each.conditions, "items_from": None}]
            for each in results.scores
        ]
        return {json.dumps(each, sort_keys=True) for each in named}

    try:
        return conditions(load_results(path)) <= conditions(results)
    except DataError:
        return False


def find_results(path: Path, suite: str | None = None) -> Path:
    """The file of results at a path: the file itself, or of a run folder the newest of a suite.

    Raises:
        RecipeError: there is none, or there are several and no suite was named.
    """
    if path.is_file():
        return path
    if is_url(path):
        raise RecipeError(f"no results at {path}")
    folder = path / RESULTS_FOLDER if (path / RESULTS_FOLDER).is_dir() else path
    files = sorted(folder.glob("*.json"), key=_age)
    found = {_NAME.sub(r"\g<kind>", each.stem): each for each in files}
    meant = [name for name in found if suite is None or name.startswith(f"{suite}-")]
    if suite is not None and suite in found:
        return found[suite]
    if len(meant) == 1:
        return found[meant[0]]
    if not found:
        hint = f"`glam eval {path}` makes them" if path.is_dir() else None
        raise RecipeError(f"no results of `glam eval` in {folder}", hint=hint)
    names = ", ".join(f"`{name}`" for name in found)
    if suite is not None and not meant:
        raise RecipeError(f"{folder} has no results of `{suite}`", hint=f"it has {names}")
    raise RecipeError(
        f"{folder} has several results: {names}", hint="name one with `--suite`, or give its file"
    )


def results_of_suite(run: Path, suite: str, preset: str) -> list[Path]:
    """The results of a suite that a run has at its newest step, those of the usual seed first."""
    wanted = []
    for path in sorted((run / RESULTS_FOLDER).glob("*.json"), key=_age):
        try:
            results = load_results(path)
        except DataError:
            continue
        if (results.suite, results.preset) == (suite, preset):
            wanted.append((path, results))
    newest = max((results.model.get("step") or 0 for _, results in wanted), default=0)
    at_newest = [each for each in wanted if (each[1].model.get("step") or 0) == newest]
    return [path for path, results in sorted(at_newest, key=lambda each: each[1].seed)]


def _age(path: Path) -> tuple[int, int]:
    """For sorting files of results: by step, and those of a step as they were made."""
    named = _NAME.match(path.stem)
    return (int(named["step"]), int(named["number"] or 1)) if named else (-1, 1)


@dataclass(frozen=True)
class _Model:
    """What is read of the description of a model."""

    step: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Head:
    """What is read of a file of results before all of it."""

    format: int
    model: _Model


@dataclass(frozen=True)
class _StoredFailure:
    task: str
    setting: str | None
    error: str
    hint: str | None


@dataclass(frozen=True)
class _Stored(Results):
    """Results as their file has them."""

    failures: tuple[_StoredFailure, ...]  # pyright: ignore[reportIncompatibleVariableOverride]


def load_results(path: Path, with_items: bool = False) -> Results:
    """Results, with the records of their items or without.

    Raises:
        DataError: a file cannot be read, or holds something else.
    """
    try:
        data = read_file(path)
        version = parse_as(_Head, data).format
        if version > RESULTS_FORMAT:
            raise DataError(f"{path}: written by a newer version (format {version})")
        content = vars(parse_as(_Stored, data))
        failures = tuple(
            Failure(each.task, each.setting, GlamError(each.error, each.hint))
            for each in content["failures"]
        )
        results = Results(**{**content, "failures": failures})
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(
            f"{path} holds no results of `glam eval`: {error}",
            hint="give RUN/eval/NAME.json, or RUN",
        ) from None
    items = _load_items(path) if with_items else {}
    scores = (
        replace(each, items=tuple(items.get((each.task, each.setting), ())))
        for each in results.scores
    )
    return replace(results, scores=tuple(scores))


def _load_items(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of the items beside a file of results, by task and setting.

    Raises:
        DataError: the file is missing or damaged.
    """
    beside = _items_path(path)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    number = 0
    try:
        for line in read_file(beside).splitlines():
            number += 1
            record = parse_json(line)
            task, setting, _ = names = record["task"], record["setting"], record["key"]
            if not all(isinstance(each, str) for each in names):
                raise TypeError
            found.setdefault((task, setting), []).append(record)
    except OSError as error:
        raise DataError(f"cannot read {beside}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{beside}:{number}: not the record of an item") from None
    return found
