"""Task and suite files: found by name or path, read with their variants, hashed.

A task file may hold, besides the keys of `Task`, two sections of changes to it: `with_shots`, for
prompts behind demonstrations, and `presets`, by name: `--preset gpt3` applies `presets.gpt3`.
Changes are merged key by key, and `null` removes a key. The keys outside of `presets` are the
preset `glam`.
"""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from glamcli.config import yaml
from glamcli.config.explain import validate
from glamcli.config.files import display
from glamcli.config.load import merge, read_settings
from glamcli.config.nearest import did_you_mean
from glamcli.config.schema import Recipe
from glamcli.errors import GlamError, RecipeError
from glamcli.evals.tasks.schema import Suite, Task
from glamcli.storage import is_url, place

SUITES = Path(__file__).parents[1] / "suites"
TASKS = SUITES / "tasks"
_DEFAULT_PRESET = "glam"


@dataclass(frozen=True)
class TaskFile:
    """A task of a suite: read, or the reason why it cannot be."""

    name: str
    path: Path
    task: Task | None
    sha256: str
    error: GlamError | None = None
    with_shots: Task | None = None
    """the task as it is asked behind demonstrations."""
    presets: tuple[str, ...] = ()
    """the presets it has changes for."""

    def at(self, shots: int) -> Task:
        """The task as it is asked behind this many demonstrations.

        Raises:
            GlamError: the file could not be read.
        """
        if self.error is not None:
            raise self.error
        task = self.with_shots if shots else self.task
        assert task is not None
        return task


@dataclass(frozen=True)
class SuiteFile:
    """A suite, or one task as a suite, with its tasks read."""

    name: str
    path: Path
    sha256: str
    settings: Suite
    tasks: tuple[TaskFile, ...]
    preset: str


def shipped_suites() -> dict[str, Path]:
    """Suites that come with the package, by name."""
    return {path.stem: path for path in sorted(SUITES.glob("*.yaml"))}


def _shipped_tasks() -> dict[str, Path]:
    """Tasks that come with the package, by name."""
    return {path.stem: path for path in sorted(TASKS.glob("*.yaml"))}


def load_suite(name_or_path: str, preset: str = _DEFAULT_PRESET) -> SuiteFile:
    """A suite by name or path; a single task, by name or path, is a suite of one.

    A task file that cannot be read does not stop the others: its error is stored instead.

    Raises:
        RecipeError: no such suite or preset, or the suite file itself is malformed.
    """
    path = _find(name_or_path)
    text = yaml.read_bytes(path, display(path))
    if re.search(rb"^[\"']?tasks[\"']?\s*:", text, re.MULTILINE):
        settings = read_settings(path, Suite)
        tasks = tuple(_task_file(_find_task(each, path), preset) for each in settings.tasks)
    else:
        settings = Suite(tasks=(path.name,))
        tasks = (_task_file(path, preset),)
    known = sorted({_DEFAULT_PRESET, *(name for task in tasks for name in task.presets)})
    # A task that could not be read may know it.
    if preset not in known and not any(task.error for task in tasks):
        names = ", ".join(f"`{name}`" for name in known)
        raise RecipeError(f"no task of this suite has a preset `{preset}`", hint=f"known: {names}")
    sha256 = hashlib.sha256(text).hexdigest()
    return SuiteFile(path.stem, path, sha256, settings, tasks, preset)


def _find(name_or_path: str) -> Path:
    known = _shipped_tasks() | shipped_suites()
    if name_or_path in known:
        return known[name_or_path]
    path = place(os.path.expanduser(name_or_path))
    if is_url(path) or os.path.exists(path):
        return path
    raise RecipeError(
        f"no suite `{name_or_path}`: neither shipped nor a file",
        hint=did_you_mean(name_or_path, known, f"shipped: {', '.join(shipped_suites())}"),
    )


def _find_task(name: str, suite: Path) -> Path:
    beside = suite.parent / name
    if name.endswith((".yaml", ".yml")):
        return beside
    return _shipped_tasks().get(name) or beside.with_name(f"{beside.stem}.yaml")


def _task_file(path: Path, preset: str) -> TaskFile:
    file = TaskFile(path.stem, path, None, "")
    if not is_url(path) and not os.path.exists(path):
        what = f"no task `{path.stem}`: neither shipped nor the file {path}"
        return replace(file, error=RecipeError(what))
    try:
        data = yaml.read_bytes(path, display(path))
        file = replace(file, sha256=hashlib.sha256(data).hexdigest())
        root = yaml.read_tree(path, display(path))
        # Every variant is read, so that a mistake in one is found whichever is asked for.
        read = {
            name: (validate(zero, Task), validate(some, Task))
            for name, (zero, some) in _variants(root).items()
        }
    except GlamError as error:
        return replace(file, error=error)
    task, with_shots = read.get(preset, read[_DEFAULT_PRESET])
    return replace(file, task=task, with_shots=with_shots, presets=tuple(read)[1:])


def _variants(root: yaml.Mapping) -> dict[str, tuple[yaml.Mapping, yaml.Mapping]]:
    """The task without and with demonstrations, by the name of the preset."""
    base, presets = _taken(root, "presets")
    variants = {_DEFAULT_PRESET: base}
    for name, changes in presets.entries.items():
        at = f"{presets.keys[name]}: preset `{yaml.shown(name)}`"
        if name == _DEFAULT_PRESET:
            raise RecipeError(f"{at} is the keys outside of `presets`")
        if not re.fullmatch(r"[\w.-]+", name):  # it becomes a part of the names of files
            raise RecipeError(f"{at} has a name of more than letters, digits, `.`, `_` and `-`")
        if not isinstance(changes, yaml.Mapping):
            raise RecipeError(f"{at} must be a section of `key: value` lines")
        variants[name] = merge(base, changes)
    taken = {name: _taken(each, "with_shots") for name, each in variants.items()}
    return {name: (zero, merge(zero, changes)) for name, (zero, changes) in taken.items()}


def _taken(root: yaml.Mapping, key: str) -> tuple[yaml.Mapping, yaml.Mapping]:
    """The tree without a section, and the section; an empty one when there is none."""
    node = root.entries.get(key, yaml.Mapping({}, {}, root.place))
    if not isinstance(node, yaml.Mapping):
        raise RecipeError(f"{root.keys[key]}: `{key}` must be a section of `key: value` lines")
    rest = {name: each for name, each in root.entries.items() if name != key}
    return replace(root, entries=rest), node


def check_suites(recipe: Recipe) -> None:
    """Reads the recipe's suites, so that a mistake in one does not show after hours of training.

    Raises:
        RecipeError: a suite or one of its tasks cannot be read.
    """
    during = recipe.eval.suite if recipe.every.eval_steps is not None else None
    for suite in (during, recipe.finish.suite):
        for task in () if suite is None else load_suite(suite).tasks:
            if task.error is not None:
                raise task.error
