"""Where the values of a run's recipe came from: noted when the run starts, told of it later."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glamcli.config.files import display
from glamcli.config.load import Loaded, leaves
from glamcli.config.schema import Recipe
from glamcli.errors import redacted
from glamcli.untrusted import parse_json, read_file


def origins_to_note(loaded: Loaded) -> dict[str, str]:
    """What a run that starts with this recipe notes: `file:line`, `--set` or `default` by dotted
    key. Values of a recipe that a run keeps come from where that run has noted."""
    before = _before(loaded)
    own = display(loaded.path)
    return {
        key: redacted(before.get(key, origin) if origin.rpartition(":")[0] == own else origin)
        for key, origin in loaded.origins.items()
    }


def noted_origins(about: Any, recipe: Recipe) -> dict[str, str]:
    """The origins in a run's `run.json`, of values that the recipe still has."""
    try:
        then = dict(leaves(Recipe.model_validate(about["recipe"])))
        noted = {str(key): str(origin) for key, origin in about["origins"].items()}
    except (LookupError, TypeError, AttributeError, ValueError):
        return {}
    now = dict(leaves(recipe)).items()
    return {key: noted[key] for key, value in now if key in noted and (key, value) in then.items()}


def _before(loaded: Loaded) -> Mapping[str, str]:
    if loaded.own_run is None:
        return {}
    try:
        return noted_origins(parse_json(read_file(loaded.path.parent / "run.json")), loaded.recipe)
    except (OSError, ValueError):
        return {}


def short_origins(origins: Iterable[str]) -> dict[str, str]:
    """Every `file:line` with no more of the path's end than tells its file from the others."""
    parts = {origin: Path(origin.rpartition(":")[0] or origin).parts for origin in origins}
    files = set(parts.values())
    short = {}
    for origin, file in parts.items():
        lengths = range(1, len(file) + 1)
        unique = (n for n in lengths if sum(each[-n:] == file[-n:] for each in files) == 1)
        length = next(unique, len(file))  # `b.yaml` is the end of `a/b.yaml`
        short[origin] = "/".join(Path(origin).parts[-length:])
    return short
