"""Recipes and other settings from YAML files, with the origin of every value.

A recipe file holds what differs from its one parent (`extends: NAME_OR_PATH`); `--set a.b=c` edits
on top. Sections merge key by key, everything else is replaced, and `null` drops a section. A name
without a slash or suffix is a shipped file; everything else is a path, relative to the file that
names it (`~/` is the home folder; variables are not expanded). How YAML is read: `tree.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from glamcli.config import check as rules
from glamcli.config import yaml
from glamcli.config.explain import (
    Problem,
    Refused,
    refuse,
    validate,
)
from glamcli.config.files import absolute, display, find, is_path
from glamcli.config.files import shipped as shipped
from glamcli.config.mixtures import load_mixture as load_mixture
from glamcli.config.schema import Recipe
from glamcli.config.yaml import shown
from glamcli.errors import GlamError, RecipeError

T = TypeVar("T", bound=BaseModel)

MAX_PARENTS = 16

# Keys that hold a path; True when a shipped name is also possible.
_PATHS = {
    ("data", "mixture"): True,
    ("data", "tokenizer", "path"): False,
    ("data", "cache_dir"): False,
    ("finish", "suite"): True,
}

# What `mesh: auto` stands for, whatever the parent says.
_AUTO_MESH = {"auto": True, "data": "auto", "expert": 1, "model": 1}


@dataclass(frozen=True)
class Origin:
    """Who decided a value: a file, `--set`, or nobody (`kind` default)."""

    kind: Literal["default", "file", "set"]
    place: yaml.Place | None = None

    def __str__(self) -> str:
        return "default" if self.place is None else str(self.place)


@dataclass(frozen=True)
class Loaded:
    """A recipe, where it came from, and where each of its values came from."""

    recipe: Recipe
    origins: dict[str, Origin]
    """by dotted key, for every leaf of the recipe; a list is one leaf."""
    path: Path
    parents: tuple[Path, ...] = ()
    """files it extends, nearest first."""
    sets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    def place(self, key: str) -> str:
        """`file:line` or `--set` of a key for a message; the recipe's file for a default."""
        origin = self.origins.get(key)
        return display(self.path) if origin is None or origin.place is None else str(origin)

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Puts the place before an error that knows only the key: one of devices, say, that no
        file names."""
        try:
            yield
        except GlamError as error:
            if error.key is not None:
                error.what, error.key = f"{self.place(error.key)}: {error.what}", None
            raise


def load_recipe(name_or_path: str | Path, sets: Sequence[str] = (), check: bool = True) -> Loaded:
    """The resolved recipe of a shipped name or a file; `check` also proves that its fields and
    its mixture agree.

    Raises: RecipeError with every problem.
    """
    path = find("recipes", str(name_or_path))
    root, parents = _with_parents(path)
    for assignment in sets:
        root = _set(root, assignment)
    recipe = validate(root, Recipe)
    loaded = Loaded(recipe, _origins(recipe, root), path, parents, tuple(sets))
    if check:
        refuse(problems(loaded))
    return loaded


def problems(loaded: Loaded) -> list[Problem]:
    """Every contradiction in a recipe, its mixture, and between the two."""
    try:
        mixture = load_mixture(loaded.recipe.data.mixture)
    except Refused as error:
        return [*rules.check(loaded), *error.problems]
    except RecipeError as error:
        place = loaded.place("data.mixture")
        return [*rules.check(loaded), Problem(place, error.what, error.hint)]
    return rules.check(loaded, mixture)


def read_settings(path: Path, kind: type[T]) -> T:
    """The settings of one strict YAML file, for kinds that are neither recipe nor mixture."""
    return validate(yaml.read_tree(path, display(path)), kind)


def _with_parents(path: Path) -> tuple[yaml.Mapping, tuple[Path, ...]]:
    """The merged tree of a recipe file and its parents, and the parents, nearest first."""
    chain: list[Path] = []
    roots: list[yaml.Mapping] = []
    following: Path | None = path
    while following is not None:
        chain.append(following)
        root = yaml.read_tree(following, display(following))
        following, root = _take_parent(root, following, chain)
        roots.append(_normal(root, chain[-1].parent))
    merged = roots[-1]
    for root in reversed(roots[:-1]):
        merged = merge(merged, root)
    return merged, tuple(chain[1:])


def _take_parent(
    root: yaml.Mapping, path: Path, chain: list[Path]
) -> tuple[Path | None, yaml.Mapping]:
    """The file that `extends` names, checked, and the tree without that key."""
    if "extends" not in root.entries:
        return None, root
    node, place = root.entries["extends"], root.keys["extends"]
    if not isinstance(node, yaml.Scalar) or not isinstance(node.value, str) or not node.value:
        raise RecipeError(f"{place}: `extends` must be one recipe name or path")
    try:
        parent = find("recipes", node.value, path.parent)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error.what}", error.hint) from error
    if any(parent.resolve() == each.resolve() for each in chain):
        raise RecipeError(f"{place}: `extends` comes back to `{shown(node.value)}`")
    if len(chain) > MAX_PARENTS:
        raise RecipeError(f"{place}: more than {MAX_PARENTS} recipes extend each other")
    entries = {key: value for key, value in root.entries.items() if key != "extends"}
    return parent, replace(root, entries=entries)


def merge(parent: yaml.Node, child: yaml.Node) -> yaml.Mapping:
    """The parent with everything the child says; `null` in the child replaces a section."""
    assert isinstance(parent, yaml.Mapping)
    assert isinstance(child, yaml.Mapping)
    entries, keys = dict(parent.entries), dict(parent.keys)
    for key, node in child.entries.items():
        before = entries.get(key)
        both = isinstance(before, yaml.Mapping) and isinstance(node, yaml.Mapping)
        entries[key] = merge(before, node) if both and before is not None else node
        keys[key] = child.keys[key]
    return yaml.Mapping(entries, keys, child.place)


def _normal(root: yaml.Mapping, folder: Path) -> yaml.Mapping:
    """The tree of one file with paths absolute and shorthands written out."""
    for keys, may_be_name in _PATHS.items():
        root = _edit(root, keys, partial(_absolute_node, folder=folder, may_be_name=may_be_name))
    return _edit(root, ("mesh",), _whole_mesh)


def _whole_mesh(node: yaml.Node) -> yaml.Node:
    if not isinstance(node, yaml.Scalar) or node.value != "auto":
        return node
    entries: dict[str, yaml.Node] = {
        name: yaml.Scalar(value, node.place) for name, value in _AUTO_MESH.items()
    }
    return yaml.Mapping(entries, dict.fromkeys(entries, node.place), node.place)


def _absolute_node(node: yaml.Node, folder: Path, may_be_name: bool) -> yaml.Node:
    if not isinstance(node, yaml.Scalar) or not isinstance(node.value, str) or not node.value:
        return node
    if "\n" in node.value:
        raise RecipeError(f"{node.place}: a path cannot have a line end: `{shown(node.value)}`")
    if may_be_name and not is_path(node.value):
        return node
    return replace(node, value=absolute(node.value, folder))


def _edit(root: yaml.Mapping, keys: Sequence[str], change: Any) -> yaml.Mapping:
    """The tree with the node at a path changed; unchanged when there is none."""
    node = root.entries.get(keys[0])
    if node is None:
        return root
    if len(keys) > 1:
        if not isinstance(node, yaml.Mapping):
            return root
        node = _edit(node, keys[1:], change)
    else:
        node = change(node)
    return replace(root, entries={**root.entries, keys[0]: node})


def _set(root: yaml.Mapping, assignment: str) -> yaml.Mapping:
    """The tree with one `--set key.key=value`; the value is read as YAML, the key checked later
    with all the others."""
    dotted, equals, text = assignment.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        raise RecipeError(
            f"--set: expected key=value, got `{shown(assignment)}`",
            hint="for example `--set batch.rows=16`",
        )
    if keys == ("extends",):
        raise RecipeError("--set: `extends` belongs into a recipe file")
    place = yaml.Place("--set")
    value = _text(text)
    node: yaml.Node = yaml.parse(value, "--set") if value else yaml.Scalar(None, place)
    for key in reversed(keys):
        node = yaml.Mapping({key: node}, {key: place}, place)
    assert isinstance(node, yaml.Mapping)
    merged = merge(root, _normal(node, Path.cwd()))
    return replace(merged, place=root.place)


def _text(value: str) -> str:
    if any(not char.isprintable() and char not in "\n\t" for char in value):
        raise RecipeError(f"--set: control characters in `{shown(value)}`")
    return value


def leaves(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in the settings that is not a section."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _origins(recipe: Recipe, root: yaml.Mapping) -> dict[str, Origin]:
    return {key: _origin(root, key.split(".")) for key, _ in leaves(recipe)}


def _origin(root: yaml.Mapping, keys: Sequence[str]) -> Origin:
    node: yaml.Node = root
    place = root.place
    for key in keys:
        if not isinstance(node, yaml.Mapping) or key not in node.entries:
            return Origin("default")
        place = node.keys[key]
        node = node.entries[key]
    return Origin("set" if place.file == "--set" else "file", place)
