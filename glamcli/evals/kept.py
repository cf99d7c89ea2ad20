"""Results kept on disk, found and read again: RUN/eval/NAME.json and its items beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glamcli.errors import DataError, GlamError, RecipeError
from glamcli.evals.results import (
    FORMAT,
    ITEMS_SUFFIX,
    Average,
    Failure,
    Measured,
    Reported,
    Results,
    Score,
    Subset,
)

FOLDER = "eval"
"""of a run: where its results are."""


def find(path: Path, suite: str | None = None) -> Path:
    """The results a person means: a file, or of a run folder the newest of a suite.

    Raises:
        RecipeError: there is none, or there are several and no suite was named.
    """
    if path.is_file():
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    found: dict[str, tuple[int, Path]] = {}
    for each in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        name, _, step = each.stem.rpartition("-step")
        kind, number = (name, int(step)) if step.isdecimal() else (each.stem, -1)
        found[kind] = max(found.get(kind, (-1, each)), (number, each))
    if suite is not None and suite in found:
        return found[suite][1]
    if suite is None and len(found) == 1:
        return next(iter(found.values()))[1]
    if not found:
        hint = f"`glam eval {path}` makes them" if path.is_dir() else None
        raise RecipeError(f"no results of `glam eval` in {folder}", hint=hint)
    names = ", ".join(f"`{name}`" for name in found)
    if suite is not None:
        raise RecipeError(f"{folder} has no results of `{suite}`", hint=f"it has {names}")
    raise RecipeError(
        f"{folder} has results of several suites: {names}", hint="name one with `--suite`"
    )


def load(path: Path) -> Results:
    """Results without their items.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise DataError(f"{path}: written by a newer version (format {content['format']})")
        return _results(content)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path} holds no results of `glam eval`", hint="give RUN/eval/NAME.json, or RUN"
        ) from None


def items(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of the items beside a file of results, by task and setting.

    Raises:
        DataError: the file is missing or damaged.
    """
    beside = path.with_name(path.stem + ITEMS_SUFFIX)
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
    return Results(
        suite=content["suite"],
        model=content["model"],
        scores=tuple(_score(each) for each in content["scores"]),
        failures=tuple(
            Failure(each["task"], each["setting"], GlamError(each["error"], each["hint"]))
            for each in content["failures"]
        ),
        averages=tuple(
            Average(
                **{
                    **each,
                    "missing": tuple(each["missing"]),
                    "published": _published(each["published"]),
                }
            )
            for each in content["averages"]
        ),
        averaging=content["averaging"],
        preset=content["preset"],
        seed=content["seed"],
        limit=content["limit"],
    )


def _score(content: Mapping[str, Any]) -> Score:
    subsets = tuple(
        Subset(**{**each, "measured": _measured(each["measured"])}) for each in content["subsets"]
    )
    values = {**content, "measured": _measured(content["measured"]), "subsets": subsets}
    return Score(**{**values, "skipped": tuple(content["skipped"]), "items": ()})


def _measured(content: Any) -> tuple[Measured, ...]:
    found = []
    for each in content:
        interval = None if each["interval"] is None else tuple(each["interval"])
        published = _published(each["published"])
        found.append(Measured(**{**each, "interval": interval, "published": published}))
    return tuple(found)


def _published(content: Any) -> tuple[Reported, ...]:
    return tuple(Reported(**each) for each in content)
