"""Results on disk: RUN/eval/NAME.json, and its items beside it, written, found and read again."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from glamcli import atomic
from glamcli.errors import DataError, GlamError, RecipeError
from glamcli.evals.results.scores import (
    RESULTS_FORMAT,
    Average,
    Failure,
    Measured,
    Reported,
    Results,
    Score,
    Subset,
)
from glamcli.progress import Progress

_Kind = TypeVar("_Kind")

RESULTS_FOLDER = "eval"
"""of a run folder"""
_NAME = re.compile(r"(?P<kind>.*)-step(?P<step>\d+)(-(?P<number>\d+))?")


def keep_results(results: Results, run_dir: Path, progress: Progress) -> None:
    """Writes results into their run's folder; a full or read-only disk costs a warning."""
    if not results.scores:
        return
    folder = run_dir / RESULTS_FOLDER
    try:
        summary, items = _write_results(results, folder)
    except OSError as error:
        progress.warn(f"results were not kept: {error.strerror or error}: {folder}")
        return
    progress.say(f"kept in {summary}, items in {items.name}")


def keep_harness(
    content: Mapping[str, Any],
    lines: Iterable[Mapping[str, Any]],
    run_dir: Path,
    name: str,
    progress: Progress,
) -> None:
    """Writes lm-eval's results and items as NAME.json and NAME.items.jsonl, or NAME-2 where the
    results of other items have the name; a full or read-only disk costs a warning."""
    folder = run_dir / RESULTS_FOLDER / "harness"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        keys = ("configs", "task_hashes")
        summary = _free_path(folder, name, partial(_is_same, content, keys))
        items = _items_path(summary)
        with items.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        summary.write_text(text, encoding="utf-8")
    except OSError as error:
        progress.warn(f"results were not kept: {error.strerror or error}: {folder}")
        return
    progress.say(f"kept in {summary}, items in {items.name}")


def keep_analysis(content: Mapping[str, Any], folder: Path, name: str, progress: Progress) -> None:
    """Writes an analysis as NAME.json, or NAME-2 where one that was asked something else has the
    name; a full or read-only disk costs a warning."""
    keys = [key for key in ("asked",) if key in content]
    try:
        path = _free_path(folder, name, partial(_is_same, content, keys))
        atomic.write(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        progress.warn(f"not kept: {error.strerror or error}: {folder}")
        return
    progress.say(f"kept in {path}")


def _is_same(content: Mapping[str, Any], keys: Sequence[str], path: Path) -> bool:
    """Whether a file holds the same under these keys."""
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        return all(other[key] == content[key] for key in keys)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_results(results: Results, folder: Path) -> tuple[Path, Path]:
    """Writes NAME.json and NAME.items.jsonl into the folder; both paths.

    What is there is replaced by the same evaluation only. One that differs in what its name
    does not contain (the files of the suite, the items) becomes NAME-2.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = _free_path(folder, results.name, partial(_says_all_of, results))
    items = _items_path(summary)
    lines = (_json(item) for score in results.scores for item in score.items)
    atomic.write(items, "".join(line + "\n" for line in lines).encode(errors="replace"))
    text = _json(results.to_json(), indent=2) + "\n"
    atomic.write(summary, text.encode(errors="replace"))
    return summary, items


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
    """Whether results hold every score of the file, by the same conventions on the same items."""
    try:
        others = _conditions(load_results(path))
    except DataError:
        return False
    return others.items() <= _conditions(results).items()


def _conditions(results: Results) -> dict[tuple[str, str], str]:
    """The conventions of every score, as text: JSON has no tuples. Where its items were read from
    does not matter, their digest is among them."""
    return {
        (score.task, score.setting): json.dumps(
            {**score.conditions, "items_from": None}, sort_keys=True
        )
        for score in results.scores
    }


def find_results(path: Path, suite: str | None = None) -> Path:
    """The file of results at a path: the file itself, or of a run folder the newest of a suite.

    Raises:
        RecipeError: there is none, or there are several and no suite was named.
    """
    if path.is_file():
        return path
    folder = path / RESULTS_FOLDER if (path / RESULTS_FOLDER).is_dir() else path
    found: dict[str, Path] = {}
    for each in sorted(folder.glob("*.json"), key=_age) if folder.is_dir() else []:
        found[_kind(each)] = each
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


def _kind(path: Path) -> str:
    """The name without the step: what was asked."""
    named = _NAME.fullmatch(path.stem)
    return named["kind"] if named else path.stem


def _age(path: Path) -> tuple[int, int]:
    """For sorting files of results: by step, and those of a step as they were made."""
    named = _NAME.fullmatch(path.stem)
    return (int(named["step"]), int(named["number"] or 1)) if named else (-1, 1)


def load_results(path: Path) -> Results:
    """Results without their items.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > RESULTS_FORMAT:
            raise DataError(f"{path}: written by a newer version (format {content['format']})")
        return _results(content)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path} holds no results of `glam eval`", hint="give RUN/eval/NAME.json, or RUN"
        ) from None


def load_items(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of the items beside a file of results, by task and setting.

    Raises:
        DataError: the file is missing or damaged.
    """
    beside = _items_path(path)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    number = 0
    try:
        with beside.open(encoding="utf-8") as lines:
            for line in lines:
                number += 1
                record = json.loads(line)
                found.setdefault((record["task"], record["setting"]), []).append(record)
    except OSError as error:
        raise DataError(f"cannot read {beside}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{beside}:{number}: not the record of an item") from None
    return found


def _results(content: Mapping[str, Any]) -> Results:
    failures = [
        Failure(each["task"], each["setting"], GlamError(each["error"], each["hint"]))
        for each in content["failures"]
    ]
    return Results(
        suite=content["suite"],
        model=content["model"],
        scores=tuple(_from_json(Score, each) for each in content["scores"]),
        failures=tuple(failures),
        averages=tuple(_from_json(Average, each) for each in content["averages"]),
        averaging=content["averaging"],
        preset=content["preset"],
        shots=None if content.get("shots") is None else tuple(content["shots"]),
        seed=content["seed"],
        limit=content["limit"],
    )


_PARTS = {"measured": Measured, "published": Reported, "subsets": Subset}
"""Fields that hold tuples of these."""


def _from_json(kind: type[_Kind], content: Mapping[str, Any]) -> _Kind:
    values = {
        name: tuple(_from_json(_PARTS[name], each) if name in _PARTS else each for each in value)
        if isinstance(value, list)
        else value
        for name, value in content.items()
    }
    return kind(**values)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
