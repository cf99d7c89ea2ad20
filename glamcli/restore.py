"""The state or the parameters of a step folder, compared with what is asked for before it is read.

A restore of orbax casts silently, so names, shapes and dtypes are compared first.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from glamcli.errors import CheckpointError
from glamcli.hosts.join import ALONE, Host
from glamcli.named_leaves import described_leaves, difference, named_leaves, nested
from glamcli.step_folders import Meta, complete_meta
from glamcli.stored_arrays import read_arrays

# What Adafactor kept for attention's weights before format 3.
FACTORS_BEFORE_3 = re.compile(r"opt_state/slots/.*\battention/(query|key|value|out)/v(_row|_col)?")
# What the guard remembers, which checkpoints before format 4 do not have.
SINCE_4 = re.compile(r"window")


def restore_state(
    folder: Path, target: Any, host: Host, warn: Callable[[str], object], meta: Meta
) -> Any:
    """The state in a step folder that `meta` describes, placed as `target` says, on any number of
    devices.

    `target` is the abstract state: every leaf has shape, dtype and sharding, so nothing depends on
    the devices of the process that saved. Of a checkpoint of format 2 the statistics that have
    another shape today start at 0, and `warn` is called with that.

    Raises:
        DamagedCheckpoint: it cannot be read, or is not as it was saved.
        CheckpointError: names, shapes or dtypes are not those of `target`; the first of them.
    """
    wanted = named_leaves(target)
    saved, described = meta["tree"], described_leaves(wanted)
    every = {*saved, *described}
    other = {name for name in every if saved.get(name) != described.get(name)}
    factors = {name for name in other if FACTORS_BEFORE_3.fullmatch(name)}
    factors = factors if meta["format"] < 3 else set()
    anew = factors | {name for name in other if SINCE_4.fullmatch(name)}
    _refuse_differences(folder, saved, described, anew)
    kept = {name: leaf for name, leaf in wanted.items() if name not in anew}
    arrays = read_arrays(folder, kept, meta, host, warn)
    for name in anew & wanted.keys():
        arrays[name] = jnp.zeros_like(wanted[name], device=wanted[name].sharding)
    if factors:
        num_weights = len({name.rpartition("/")[0] for name in factors})
        warn(
            f"{folder} is of format {meta['format']}: weights are carried over, but Adafactor's"
            f" statistics of {num_weights} attention weights start from zero"
            " (`optimizer.factor_heads: separate` keeps them)"
        )
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])


def restore_params(
    folder: Path,
    target: Callable[[Meta], Any],
    host: Host = ALONE,
    meta: Meta | None = None,
) -> tuple[dict[str, Any], Meta]:
    """The parameters alone and the meta of a step folder, for scoring and generation.

    `target` makes abstract parameters (a nested dict with shapes, dtypes and shardings) from the
    meta, which knows the recipe (read here, if None). All processes of `host` must call this alike.

    Raises:
        DamagedCheckpoint: they cannot be read, or are not as they were saved.
        CheckpointError: the names, shapes or dtypes in the checkpoint are others.
    """
    meta = meta or complete_meta(folder)
    wanted = named_leaves({"params": target(meta)})
    saved = {name: it for name, it in meta["tree"].items() if name.startswith("params/")}
    _refuse_differences(folder, saved, described_leaves(wanted), anew=set())
    return nested(read_arrays(folder, wanted, meta, host))["params"], meta


def _refuse_differences(
    folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], anew: set[str]
) -> None:
    every = sorted({*saved, *wanted} - anew)
    if names := [name for name in every if saved.get(name) != wanted.get(name)]:
        raise CheckpointError(
            f"checkpoint {folder}: {len(names)} arrays differ from this recipe's: "
            + difference(saved, wanted, names),
            hint="continue with the recipe that wrote it (`recipe` in its meta)",
        )
