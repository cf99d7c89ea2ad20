"""Which file a name or a path means: shipped recipes and mixtures, and files of the user.

A name without a slash or suffix is a shipped file; everything else is a path, relative to the file
that names it. `~/` is the home folder; environment variables are not expanded.
"""

import difflib
import os
import re
from pathlib import Path

import glamcli
from glamcli.conditional import SCHEMES
from glamcli.config.yaml import shown
from glamcli.errors import RecipeError
from glamcli.storage import Remote, place

_NOUN = {"recipes": "recipe", "data_mixtures": "mixture"}
_SUFFIXES = (".yaml", ".yml", ".json")


def shipped(kind: str) -> dict[str, Path]:
    """Files that come with the program, by name, in alphabetical order. `kind` is their folder:
    recipes, data_mixtures, evals/suites or evals/suites/tasks.

    An installed package carries them inside; a checkout has them beside the package.
    """
    package = Path(glamcli.__file__).resolve().parent
    folders = (package / kind, package.parent / kind)
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(kind: str, name_or_path: str, beside: Path | None = None) -> Path:
    """The file meant by a shipped name or a path. Raises: RecipeError with near names."""
    names = shipped(kind)
    if "\0" in name_or_path or "\n" in name_or_path:
        raise RecipeError(f"not a {_NOUN[kind]} name or path: `{shown(name_or_path)}`")
    if not is_path(name_or_path):
        if name_or_path in names:
            return names[name_or_path]
        local = (beside or Path()) / f"{name_or_path}.yaml"
        if name_or_path and os.path.isfile(local):
            hint = f"for the file in the current folder write `./{shown(local.name)}`"
        else:
            hint = _near(name_or_path, names)
        raise RecipeError(f"no shipped {_NOUN[kind]} is called `{shown(name_or_path)}`", hint)
    path = place(absolute(name_or_path, beside or Path.cwd()))
    if isinstance(path, Remote):  # without asking whether it is there; reading it will tell
        is_run = kind == "recipes" and path.suffix not in _SUFFIXES
        return path / "recipe.yaml" if is_run else path
    if kind == "recipes" and os.path.isfile(path / "recipe.yaml"):
        return path / "recipe.yaml"  # a run folder
    if not os.path.exists(path):
        what = f"no such {_NOUN[kind]} file: `{shown(name_or_path)}`"
        raise RecipeError(what, _near(path.stem, names))
    return path


def _near(name: str, names: dict[str, Path]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    if near:
        return "shipped and near: " + ", ".join(f"`{each}`" for each in near)
    return "shipped: " + ", ".join(f"`{each}`" for each in names)


def is_path(text: str) -> bool:
    """Whether a text means a path; else it is a shipped name."""
    return "/" in text or "\\" in text or text.endswith(_SUFFIXES) or text == "~"


def absolute(text: str, folder: Path) -> str:
    """A path made absolute against a folder, local or remote; a URL as it is."""
    if "://" in text:
        return text
    path = Path(text)
    if path.parts[:1] == ("~",):
        path = Path.home().joinpath(*path.parts[1:])
    if isinstance(folder, Remote):
        return str((folder / path).resolve())
    return str(Path(folder.absolute(), path))


def run_folder(text: str | Path) -> Path:
    """The path of a run folder, or the URL of a run in a bucket.

    Raises: RecipeError for other URLs (docs/storage.md), and for what no file can be called.
    """
    if str(text).startswith(SCHEMES):
        if re.fullmatch(r"\w+://[^/]+/*", str(text)):
            what = f"a run cannot be a whole bucket: {text}"
            raise RecipeError(what, f"name a folder in it: {str(text).rstrip('/')}/NAME")
        return place(str(text))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(text)):
        hint = "runs are on disks or in buckets, gs:// and s3://, which write on the condition that"
        hint += " nobody else has: mount a bucket of another kind to use it"
        if meant := re.match(r"(?i)(?:gc?s|(s3)a?):/+(?=[^/])", str(text)):
            hint = f"did you mean `{'s3' if meant[1] else 'gs'}://{str(text)[meant.end() :]}`?"
        raise RecipeError(f"a run folder cannot be a URL: {text}", hint)
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name too long, a link to itself, a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"{shown(text)}: {str(reason).lower()}") from None
    return Path(text)


def display(path: Path) -> str:
    """The path as one would type it here: relative when it is below the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
