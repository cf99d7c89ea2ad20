"""Recipes and other settings from YAML files, with the origin of every value.

A recipe file holds what differs from its one parent (`extends: NAME_OR_PATH`); `--set a.b=c` edits
on top. Sections merge key by key, everything else is replaced, and `null` drops what the parent
says in a section. Which file a name or a path means: `files.py`; how YAML is read: `yaml.py`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from glamcli.config import check as rules
from glamcli.config import yaml
from glamcli.config.explain import Problem, Refused, find_node, refuse, validate
from glamcli.config.files import absolute, display, find, is_path
from glamcli.config.files import shipped as shipped
from glamcli.config.mixtures import Mixture, load_mixture
from glamcli.config.schema import Recipe
from glamcli.config.yaml import shown
from glamcli.errors import GlamError, RecipeError
from glamcli.storage import place

_Kind = TypeVar("_Kind", bound=BaseModel)

MAX_PARENTS = 16
DEFAULT = "default"

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
class Loaded:
    """A recipe, where it came from, and where each of its values came from."""

    recipe: Recipe
    origins: dict[str, str]
    """`file:line`, `--set` or `default` by dotted key, for every leaf of the recipe (a list is a
    leaf)."""
    path: Path

    @property
    def own_run(self) -> Path | None:
        """The run folder that keeps this recipe as `recipe.yaml`; None for other recipes."""
        folder = self.path.parent
        is_kept = self.path.name == "recipe.yaml" and (folder / "run.json").is_file()
        return place(display(folder)) if is_kept else None

    @property
    def name(self) -> str:
        """The recipe's or, of a recipe that a run keeps, the run's."""
        return self.path.stem if self.own_run is None else self.path.parent.name

    @property
    def run_dir(self) -> Path:
        """Where it is trained by default: the run that keeps it goes on."""
        return self.own_run or Path("runs") / self.name

    def place(self, key: str) -> str:
        """`file:line` or `--set` of a key for a message; the recipe's file for a default."""
        origin = self.origins.get(key, DEFAULT)
        return display(self.path) if origin == DEFAULT else origin

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Puts the place before an error that knows only the key, as one about devices does."""
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
    root = _with_parents(path)
    for assignment in sets:
        root = _set(root, assignment)
    _empty_dropped(root, Recipe)
    try:
        recipe = validate(root, Recipe)
    except Refused as error:
        if check:  # the mixture's problems as well
            refuse([*error.problems, *_mixture_of(root)[1]])
        raise
    located = {key: find_node(root, key.split(".")) for key, _ in leaves(recipe)}
    origins = {key: str(at.place) if at.node else DEFAULT for key, at in located.items()}
    loaded = Loaded(recipe, origins, path)
    if check:
        mixture, wrong = _mixture_of(root)
        refuse([*rules.check(recipe, loaded.place, mixture), *wrong])
    return loaded


def _mixture_of(root: yaml.Mapping) -> tuple[Mixture | None, list[Problem]]:
    """The mixture that a recipe names, or what is wrong with it."""
    name, place, _ = find_node(root, ("data", "mixture"))
    if not isinstance(name, yaml.Scalar) or not isinstance(name.value, str):
        return None, []
    try:
        return load_mixture(name.value), []
    except Refused as error:
        return None, list(error.problems)
    except RecipeError as error:
        return None, [Problem(str(place), error.what, error.hint)]


def _empty_dropped(root: yaml.Mapping, kind: type[BaseModel]) -> None:
    """Replaces every section that is `null` by an empty one, where a section has defaults."""
    for name, field in kind.model_fields.items():
        node, section = root.entries.get(name), field.annotation
        if not isinstance(section, type) or not issubclass(section, BaseModel):
            continue
        if isinstance(node, yaml.Mapping):
            _empty_dropped(node, section)
        elif isinstance(node, yaml.Scalar) and node.value is None and not field.is_required():
            root.entries[name] = yaml.Mapping({}, {}, root.keys[name])


def read_settings(path: Path, kind: type[_Kind]) -> _Kind:
    """The settings of one strict YAML file that is neither recipe nor mixture."""
    return validate(yaml.read_tree(path, display(path)), kind)


def _with_parents(path: Path) -> yaml.Mapping:
    """The merged tree of a recipe file and its parents."""
    files: list[Path] = []
    trees: list[yaml.Mapping] = []
    parent: Path | None = path
    while parent is not None:
        files.append(parent)
        root = yaml.read_tree(parent, display(parent))
        parent = _parent(root, files)
        root.entries.pop("extends", None)
        _normalise(root, files[-1].parent)
        trees.append(root)
    return reduce(merge, reversed(trees))


def _parent(root: yaml.Mapping, chain: Sequence[Path]) -> Path | None:
    """The file that `extends` names in the last file of the chain."""
    node, place, _ = find_node(root, ["extends"])
    if node is None:
        return None
    if not isinstance(node, yaml.Scalar) or not isinstance(node.value, str) or not node.value:
        raise RecipeError(f"{place}: `extends` must be one recipe name or path")
    try:
        parent = find("recipes", node.value, chain[-1].parent)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error.what}", error.hint) from error
    if any(parent.resolve() == each.resolve() for each in chain):
        raise RecipeError(f"{place}: `extends` forms a cycle through `{shown(node.value)}`")
    if len(chain) > MAX_PARENTS:
        raise RecipeError(f"{place}: more than {MAX_PARENTS} recipes extend each other")
    return parent


def merge(parent: yaml.Mapping, child: yaml.Mapping) -> yaml.Mapping:
    """The parent with the keys of the child on top; `null` in the child replaces a section."""
    entries = dict(parent.entries)
    for key, node in child.entries.items():
        before = entries.get(key)
        if isinstance(before, yaml.Mapping) and isinstance(node, yaml.Mapping):
            node = merge(before, node)
        entries[key] = node
    return yaml.Mapping(entries, parent.keys | child.keys, child.place)


def _normalise(root: yaml.Mapping, folder: Path) -> None:
    """Makes the paths of one file absolute and writes its shorthands out."""
    for (*sections, name), may_be_name in _PATHS.items():
        section, node = find_node(root, sections).node, find_node(root, (*sections, name)).node
        if not isinstance(section, yaml.Mapping) or not isinstance(node, yaml.Scalar):
            continue
        if not isinstance(node.value, str) or not node.value:
            continue
        if "\n" in node.value:
            raise RecipeError(f"{node.place}: a path cannot have a line end: `{shown(node.value)}`")
        if is_path(node.value) or not may_be_name:
            section.entries[name] = replace(node, value=absolute(node.value, folder))
    mesh = root.entries.get("mesh")
    if isinstance(mesh, yaml.Scalar) and mesh.value == "auto":
        values = {name: yaml.Scalar(value, mesh.place) for name, value in _AUTO_MESH.items()}
        root.entries["mesh"] = yaml.Mapping(
            {**values}, dict.fromkeys(values, mesh.place), mesh.place
        )


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
        raise RecipeError("--set: `extends` belongs in a recipe file")
    if any(not char.isprintable() and char not in "\n\t" for char in text):
        raise RecipeError(f"--set: control characters in `{shown(text)}`")
    place = yaml.Place("--set")
    node: yaml.Node = yaml.parse(text, "--set") if text else yaml.Scalar(None, place)
    for key in reversed(keys):
        node = yaml.Mapping({key: node}, {key: place}, place)
    assert isinstance(node, yaml.Mapping)
    _normalise(node, Path.cwd())
    return replace(merge(root, node), place=root.place)


def leaves(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in the settings that is not a section."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
