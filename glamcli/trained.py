"""A trained model as one value, and how it is opened from a run folder or a checkpoint.

Training hands a `Trained` out; evaluation, generation, the analyses and the Python interface take
it. What a run is, is read from its checkpoint, so a recipe file edited since changes nothing.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import glamcli
from glamcli import step_folders
from glamcli.config.load import load_mixture
from glamcli.config.schema import Pipeline, Recipe
from glamcli.config.sharding import check_divides, indivisible_widths
from glamcli.config.sizes import count
from glamcli.data.cache import cache_dir, compiled_dir
from glamcli.data.open import open_data
from glamcli.data.tokenizer import TOKENIZER_FILE, Bytes, Tokenizer, load_sentencepiece
from glamcli.data.vocabulary import open_tokenizer
from glamcli.errors import CheckpointError, DamagedCheckpoint, DataError
from glamcli.generate import Generator, unlooped
from glamcli.hosts.join import Host
from glamcli.model.decoder import Decoder
from glamcli.model.digest import digest
from glamcli.named_leaves import named_leaves
from glamcli.parallel.axes import Layout
from glamcli.parallel.mesh import make_mesh
from glamcli.progress import Progress, Silent
from glamcli.restore import restore_params
from glamcli.step_folders import Meta, find_steps, good_steps
from glamcli.storage import Remote
from glamcli.stored_arrays import newest_usable
from glamcli.stored_runs import local, run_of
from glamcli.train import automesh

OTHER_DOCUMENTS = (
    "the mixture's documents changed since the run was trained: held-out ones may not be the same"
)


@dataclass(frozen=True)
class Trained:
    """A trained model, with what is needed to use it and to say which one it is."""

    recipe: Recipe
    decoder: Decoder
    params: Any
    """nested dicts of float32 arrays, stacked over layers as in checkpoints."""
    tokenizer: Tokenizer
    identity: Mapping[str, Any] = field(default_factory=dict)
    """of the weights, for JSON: run, step, hashes of recipe and data."""
    documents: Callable[[], dict[str, list[str]]] | None = None
    """reads the held-out documents by source; prepares them again if the cache has lost them."""
    run_dir: Path | None = None
    """where the run is, perhaps a URL; None for a checkpoint outside of a run folder."""
    host: Host = field(default_factory=Host)
    """this process among those that hold the weights; all of them must use the model alike."""

    @property
    def window(self) -> int:
        """Tokens of context at most: the row length it was trained with."""
        return self.recipe.batch.row_tokens

    @cached_property
    def generator(self) -> Generator:
        return Generator(*self.unlooped, self.tokenizer)

    @cached_property
    def unlooped(self) -> tuple[Decoder, Any]:
        """The decoder and its weights in the form that scores and generates (`generate.py`)."""
        return unlooped(self.decoder, self.params)

    @cached_property
    def _digest(self) -> str:
        return digest(self.params)

    def at(self, run: Path) -> Trained:
        """The same model as that of a run in this place."""
        return replace(self, run_dir=run, identity={**self.identity, "run": str(run)})

    def described(self) -> dict[str, Any]:
        """For results: the identity, and what they depend on besides. All processes must call it:
        the digest of sharded parameters is one program of all of them."""
        return {
            **self.identity,
            "params_digest": self._digest,
            "tokenizer": self.tokenizer.fingerprint,
            "window": self.window,
            "dispatch": self.decoder.eval_dispatch,
            "dtype": self.decoder.model.activation_dtype,
            "backend": jax.default_backend(),
            "versions": {
                "glam": glamcli.__version__,
                "jax": jax.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }


def open_trained(
    path: Path,
    progress: Progress,
    host: Host | None = None,
    step: int | None = None,
    strict: bool = False,
) -> Trained:
    """The model of a run folder at a step (by default the newest), or of a checkpoint folder.

    Its weights are on one device if they fit there, else over all devices of this process; with
    a `host` of several processes, over the devices of all of them as the recipe says. Where the
    newest step is damaged, the newest that is not is taken with a warning, unless `strict`.

    Raises:
        CheckpointError: there is none, it cannot be read, is damaged, holds weights that are not
            finite, or its tokenizer has changed.
    """
    host = host or Host()
    _refuse_what_is_no_run(path)
    target = _as_trained if host.count > 1 else _by_size

    def read(folder: Path, meta: Meta) -> tuple[Path, dict[str, Any], Meta]:
        try:
            with progress.phase("restoring"):
                made = restore_params(folder, lambda meta: target(meta, folder), host, meta)
        except DamagedCheckpoint:
            find()  # the step may have been deleted in the bucket
            raise
        return folder, *made

    # A training run may be saving and deleting steps right now.
    warn, find = (progress if host.is_first else Silent()).warn, partial(local, path, metrics=False)
    found = newest_usable(lambda: find_steps(find(), step), read, host, warn, strict)
    folder, params, meta = found
    _warn_of_bad_streak(folder, meta, warn)
    _refuse_not_finite(folder, params)
    recipe, decoder = _model(meta, folder)
    keep_compiled_programs(recipe)
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else None
    run = run_of(path) if isinstance(path, Remote) else run_dir
    with step_folders.describing(folder):
        data = {name: meta["data"][name] for name in ("tokenizer", "sources")}
    tokenizer = _tokenizer(recipe, run_dir, data["tokenizer"], progress)
    if tokenizer.fingerprint != data["tokenizer"]:
        raise CheckpointError(
            f"{path}: its tokenizer is not the one it was trained with",
            hint="set `data.tokenizer.path` back to that file, or train again",
        )

    def documents() -> dict[str, list[str]]:
        dataset = open_data(recipe, progress)
        if dataset.fingerprint["sources"] != data["sources"]:
            progress.warn(OTHER_DOCUMENTS)
        return dataset.heldout_documents()

    about = {"step": meta["step"], "recipe_hash": meta.get("recipe_hash"), "data": data}
    identity = {"run": str(run or path), **about}
    return Trained(recipe, decoder, params, tokenizer, identity, documents, run, host)


def keep_compiled_programs(recipe: Recipe) -> None:
    """Makes jax keep programs that took long to compile for the next start."""
    if recipe.runtime.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(compiled_dir(cache_dir(recipe))))


def _refuse_what_is_no_run(path: Path) -> None:
    if isinstance(path, Remote):
        return  # `local` says so
    inside = _runs_in(path)
    if inside and not (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"{path} is a folder of runs, not a run", hint=f"for example {inside[-1]}"
        )
    if path.is_dir():
        return
    known = _runs_in(Path("runs"))
    hint = f"for example {known[-1]}" if known else "`glam train quickstart` makes one"
    if path.exists():
        raise CheckpointError(f"{path} is a file, not a run or checkpoint folder", hint=hint)
    raise CheckpointError(f"no run folder or checkpoint {path}", hint=hint)


def _runs_in(folder: Path) -> list[Path]:
    return sorted(each.parent.parent for each in folder.glob("*/checkpoints/*"))


def _model(meta: Mapping[str, Any], folder: Path) -> tuple[Recipe, Decoder]:
    try:
        recipe = Recipe.model_validate(meta["recipe"])
    except (KeyError, ValueError):  # pydantic's errors are ValueErrors
        raise CheckpointError(
            f"{folder}: its recipe cannot be read by this version",
            hint="`versions` in its metadata names the version that can",
        ) from None
    return recipe, Decoder(recipe.model, recipe.moe, layout=Layout.of(recipe.mesh))


def _warn_of_bad_streak(folder: Path, meta: Meta, warn: Callable[[str], object]) -> None:
    if not meta.get("good", True):
        good = good_steps(folder.parent)
        newest = f"the newest good step is {folder.parent / str(good[0])}" if good else None
        instead = newest or "no good step is left"
        warn(
            f"step {meta['step']} was saved in a bad streak, while updates were refused; {instead}"
        )


def _refuse_not_finite(folder: Path, params: Any) -> None:
    named = named_leaves(params)
    sums = jax.device_get(_sums(named))  # one is not finite also where finite ones are huge
    for name in [name for name, total in sums.items() if not np.isfinite(total)]:
        if not jnp.isfinite(named[name]).all():
            raise CheckpointError(
                f"checkpoint {folder}: weights are not finite, `{name}` for one",
                hint="name the folder of an older step, RUN/checkpoints/STEP",
            )


_sums = jax.jit(lambda named: {name: jnp.sum(leaf) for name, leaf in named.items()})


def _by_size(meta: Mapping[str, Any], folder: Path) -> Any:
    """Abstract parameters: on one device where they fit it, else as `mesh: auto` would have
    them, without stages."""
    recipe, decoder = _model(meta, folder)
    memory, num_devices = automesh.device_bytes(), jax.local_device_count()
    if num_devices == 1 or 4 * count(recipe).total <= automesh.ROOM * memory:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return _placed(decoder, jax.tree.map(lambda _: here, decoder.shapes))
    plain = recipe.mesh.model_copy(update={"slice": 1, "stage": 1})
    unstaged = recipe.model_copy(update={"mesh": plain, "pipeline": Pipeline()})
    mesh = make_mesh(automesh.choose(unstaged, num_devices, memory).mesh)
    return _placed(decoder, decoder.layout.shardings(mesh, decoder.axes))


def _placed(decoder: Decoder, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        decoder.shapes,
        shardings,
    )


def _as_trained(meta: Mapping[str, Any], folder: Path) -> Any:
    """Abstract parameters as in training, with as many data shards as there are devices."""
    recipe, decoder = _model(meta, folder)
    mesh = make_mesh(recipe.mesh.model_copy(update={"data": "auto"}))
    check_divides(indivisible_widths(recipe, dict(mesh.shape)))
    return _placed(decoder, decoder.layout.shardings(mesh, decoder.axes))


def _tokenizer(
    recipe: Recipe, run_dir: Path | None, fingerprint: str, progress: Progress
) -> Tokenizer:
    """The run's own copy; where it has none that is whole, what its recipe names."""
    if recipe.data.tokenizer.kind == "bytes":
        return Bytes()
    if run_dir is not None:
        with contextlib.suppress(DataError):
            copy = load_sentencepiece(run_dir / TOKENIZER_FILE)
            if copy.fingerprint == fingerprint:
                return copy
    return open_tokenizer(recipe, load_mixture(recipe.data.mixture), cache_dir(recipe), progress)
