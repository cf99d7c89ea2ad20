"""What a run is: the JSON written beside its weights, and what may differ when it is resumed.

A checkpoint records the resolved recipe, the data seen so far, the software and the devices.
Resuming with another recipe or other data would silently be another run, so it is refused; other
software, devices or layouts are allowed, but the bits will differ from an uninterrupted run, and
the user is warned.
"""

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import glamcli
from glamcli.config.schema import Recipe
from glamcli.config.sharding import MESH_AXES
from glamcli.data.cache import json_digest
from glamcli.data.open import Dataset
from glamcli.data.workers import num_cores
from glamcli.errors import RecipeError, first_of
from glamcli.hosts.join import Host

# Settings that may differ between the processes of a run: the data is compared by content.
MAY_DIFFER_BETWEEN_PROCESSES = (
    "about",
    "notes",
    "data.mixture",
    "data.cache_dir",
    "data.prepare_processes",
    "data.tokenizer.path",
)
# Settings that change only the order of sums and the draws of second experts.
LAYOUT = ("mesh", "pipeline", "model.attention")
# All that a resumed run may change: the others change neither a step's rows nor its arithmetic. The
# mixture and the tokenizer are compared by content, how heads are factored by the shapes of the
# optimizer's state.
MAY_CHANGE = (
    *MAY_DIFFER_BETWEEN_PROCESSES,
    *LAYOUT,
    "train.steps",
    "train.max_bad_steps",
    "optimizer.factor_heads",
    "guard",
    "run",
    "every",
    "checkpoints",
    "heldout",
    "eval",
    "finish",
    "runtime",
)
SHOWN_PROCESSES = 4
SHOWN_SETTINGS = 4
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")


def identity(recipe: Recipe, dataset: Dataset, mesh: Mesh) -> dict[str, Any]:
    """Everything about a run except its step, for JSON."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe_hash(recipe),
        "data": dataset.fingerprint,
        "versions": versions(),
        "topology": topology(mesh),
    }


def at_step(identity: Mapping[str, Any], dataset: Dataset, step: int) -> dict[str, Any]:
    """The identity a checkpoint of `step` carries: with the history of rows up to there."""
    history = dataset.schedule.history(step * dataset.batch_rows)
    return {**identity, "data": {**identity["data"], "history": history}}


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 over every resolved value."""
    return json_digest(recipe.model_dump(mode="json"))


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that compute, by name."""
    own = {"glamcli": glamcli.__version__, "python": platform.python_version()}
    return own | {library: version(library) for library in _LIBRARIES}


def topology(mesh: Mesh) -> dict[str, Any]:
    """The devices; and the threads, because on a CPU the order of a sum depends on them."""
    device = mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "threads": num_cores() if device.platform == "cpu" else None,
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why a run with identity `now` may not continue a checkpoint; empty when it may. Both are
    those `at_step` of the checkpoint."""
    return recipe_differences(saved, now["recipe"]) + _data(saved["data"], now["data"])


def recipe_differences(saved: Mapping[str, Any], recipe: dict[str, Any]) -> list[str]:
    """The same as far as it is known before the data is opened."""
    settings = _settings(saved["recipe"], recipe)
    return [text for key, text in settings if not _is_under(key, MAY_CHANGE)]


def other_bits(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs so that a resumed run no longer equals an uninterrupted one bit for bit."""
    found = [
        f"{part} {key}: {_short(before)} then, {_short(after)} now"
        for part in ("versions", "topology")
        for key, before, after in _unequal(saved.get(part, {}), now.get(part, {}))
    ]
    bits = (*LAYOUT, "runtime.xla_flags")
    sizes = ("mesh.auto", *(f"mesh.{axis}" for axis in MESH_AXES))  # part of the topology
    settings = _settings(saved["recipe"], now["recipe"])
    found += [text for key, text in settings if _is_under(key, bits) and key not in sizes]
    if _draws(saved) != _draws(now):
        found.append("second experts are drawn differently")
    return found


def compared(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> dict[str, list[tuple[str, Any, Any]]]:
    """What differs between two runs: key and both values (None where absent), by the part of the
    identity it is in: recipe, versions, topology, data."""
    parts = ("recipe", "versions", "topology", "data")
    each = [{part: by_dotted_key(run.get(part) or {}) for part in parts} for run in (first, second)]
    return {part: _unequal(each[0][part], each[1][part]) for part in parts}


def _draws(run: Mapping[str, Any]) -> Any:
    """What the draws of second experts depend on besides seed, step and layer: in a pipeline they
    are made per microbatch and data shard."""
    moe, mesh = run["recipe"]["moe"], run["topology"].get("mesh", {})
    if moe is None or moe["second_policy"] == "all" or mesh.get("stage", 1) == 1:
        return None
    shards = [mesh[axis] for axis in ("slice", "data", "expert")]
    return run["recipe"]["pipeline"]["microbatches"], shards


def of_program(host: Host, recipe: Recipe) -> dict[str, Any]:
    """What must be the same in all processes of a run, for JSON: recipe, versions, code."""
    settings = {
        key: value
        for key, value in by_dotted_key(recipe.model_dump(mode="json")).items()
        if not _is_under(key, MAY_DIFFER_BETWEEN_PROCESSES)
    }
    return of_command(host, {"recipe": settings})


def of_command(host: Host, options: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a command that uses a trained model; its options by name, for JSON."""
    if host.count == 1:
        return {}
    mine = {**options, "versions": versions(), "code of glamcli": code_digest()}
    return json.loads(json.dumps(mine))  # as the others receive it: no tuples


def refuse_differences(host: Host, mine: Mapping[str, Any]) -> None:
    """Compares `mine` with that of all other processes.

    Raises: RecipeError naming the processes that differ from the others, and in what.
    """
    digests = host.gather("digests", json_digest(mine))
    # With as many on one side as on the other, process 0 is right.
    common = max(digests, key=digests.count)
    odd = [index for index, digest in enumerate(digests) if digest != common]
    if not odd:
        return
    # Only processes that will be compared send everything.
    is_compared = host.index in (*odd[:SHOWN_PROCESSES], digests.index(common))
    each = host.gather("differences", mine if is_compared else None)
    right = by_dotted_key(each[digests.index(common)])
    found = []
    for index in odd[:SHOWN_PROCESSES]:
        differing = [
            f"`{key.removeprefix('recipe.')}` is {_short(its)} there, {_short(others)} elsewhere"
            for key, its, others in _unequal(by_dotted_key(each[index]), right)
        ]
        found.append(f"{host.name(index)}: {', '.join(first_of(differing, SHOWN_SETTINGS))}")
    found += [f"and {len(odd) - SHOWN_PROCESSES} more processes"] * (len(odd) > SHOWN_PROCESSES)
    raise RecipeError(
        "the processes of this run differ: " + "; ".join(found),
        hint="start all of them with the same command, code and libraries, on the same data",
    )


def code_digest() -> str:
    """SHA-256 over the source files of this package."""
    code = hashlib.sha256()
    root = Path(glamcli.__file__).parent
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return code.hexdigest()[:16]


def _settings(saved: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    """Every setting that changed: its key, and from what to what."""
    # Settings added since the checkpoint was written get their defaults; a recipe with settings
    # that are gone is compared as it is (pydantic raises a ValueError).
    with contextlib.suppress(ValueError):
        saved = Recipe.model_validate(saved).model_dump(mode="json")
    return [
        (key, f"`{key}` was {_short(before)}, is {_short(after)}")
        for key, before, after in _unequal(by_dotted_key(saved), by_dotted_key(now))
    ]


def _is_under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _data(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    if saved["tokenizer"] != now["tokenizer"]:
        found.append("the tokenizer is another one")
    before, after = saved["history"], now["history"]
    for name, old, new in _unequal(before["num_rows"], after["num_rows"]):
        had = "was not read" if old is None else f"had {old} rows"
        has = "is not read" if new is None else f"has {new} rows"
        found.append(f"source `{name}` {had}, {has}")
    for name in before["num_rows"].keys() & after["num_rows"].keys():
        same_rows = before["num_rows"][name] == after["num_rows"][name]
        if same_rows and saved["sources"].get(name) != now["sources"].get(name):
            found.append(f"source `{name}` holds other rows")
    if before["stages"] != after["stages"]:
        was, now_is = _short(before["stages"]), _short(after["stages"])
        found.append(f"weights of the rows already seen were {was}, are {now_is}")
    return found


def _unequal(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = sorted({*before, *after})
    return [(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]


def by_dotted_key(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree of JSON objects, each by the keys that lead to it."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= by_dotted_key(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
