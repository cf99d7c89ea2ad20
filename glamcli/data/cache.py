"""The cache folder: where it is, what is in it, and the error when it cannot be written.

    rows/<source>-<key>/    prepared rows of a source (`prepare.py`)
    tokenizers/<key>.model  tokenizers trained on a mixture (`vocabulary.py`)
    heldout/<key>.json      the first documents of a source, by hash (`split.py`)
    mixtures/<key>.json     which rows some settings were last given (`open.py`)
    compiled/               programs that jax compiled for devices of this machine
    plans/<key>.json.gz     what the compiler said of a planned program (`plan/compile.py`)
    eval/                   files of the shipped tasks, by `glam eval data` (`evals/tasks/`)
    runs/<key>/<owner>/     the working folder of a run in a bucket (`train/bucket.py`)
    copies/<key>/           what was read of one (`stored_runs.py`)

A key is a digest of everything the entry depends on; nothing is ever changed in place.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from glamcli.config.schema import Recipe
from glamcli.errors import DataError
from glamcli.storage import Remote, is_url

ANOTHER_CACHE = (
    "name another cache folder with `data.cache_dir` or the environment variable XDG_CACHE_HOME"
)
"""hint where the cache folder cannot be written."""
_SUFFIXES = {"rows": "", "tokenizers": ".model", "plans": ".json.gz"}
# A full disk; these errors come without the name of a file.
_DISK = (errno.ENOSPC, errno.EDQUOT)


def user_cache_dir() -> Path:
    """`glam` in the user's cache folder, which XDG_CACHE_HOME may move."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard ignores relative paths.
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return base / "glam"


def cache_dir(recipe: Recipe) -> Path:
    """The cache folder of a recipe on this machine: its `data.cache_dir`, or the user's where there
    is none or it is a URL."""
    folder = recipe.data.cache_dir
    return user_cache_dir() if folder is None or is_url(folder) else Path(folder)


def shared_cache(recipe: Recipe) -> Remote | None:
    """What machines share: the `data.cache_dir` of a recipe where it is a URL (`shared.py`)."""
    folder = recipe.data.cache_dir
    return Remote(folder) if folder is not None and is_url(folder) else None


def cache_path(
    cache: Path, kind: Literal["rows", "tokenizers", "heldout", "mixtures", "plans"], key: str
) -> Path:
    """The file or folder of one entry."""
    return cache / kind / (key + _SUFFIXES.get(kind, ".json"))


def compiled_dir(cache: Path) -> Path:
    """The folder of jax's own cache of compiled programs."""
    return cache / "compiled"


def json_digest(content: Any) -> str:
    """SHA-256 of a JSON value, in hex; the order of keys does not count."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def task_data_dir() -> Path:
    """The folder of the files that shipped tasks read; always in the user's cache folder."""
    return user_cache_dir() / "eval"


@contextmanager
def writing_cache(cache: Path) -> Iterator[None]:
    """Turns failed writes of the cache folder into errors with a hint.

    Raises: DataError in place of an OSError that is about a file of the cache or a full disk.
    """
    try:
        yield
    except OSError as error:
        # pathlib names the file; a folder above the cache may be what is in the way.
        path = Path(error.filename) if isinstance(error.filename, str | os.PathLike) else None
        related = path is not None and (path.is_relative_to(cache) or cache.is_relative_to(path))
        if not related and error.errno not in _DISK:
            raise
        raise DataError(
            f"the cache folder {cache} cannot be written: {error.strerror or error}",
            ANOTHER_CACHE,
        ) from error
