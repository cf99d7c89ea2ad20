"""A trained run opened to be asked something: weights, tokenizer, and held-out text on demand.

Shared by `glam eval` and `glam generate`. What a run is, is read from its checkpoint, so a recipe
file edited since changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glamcli import hugepages
from glamcli.config.load import load_mixture, load_recipe
from glamcli.config.schema import Pipeline, Recipe, Runtime
from glamcli.config.sharding import check_divides, indivisible_widths
from glamcli.config.sizes import count
from glamcli.errors import CheckpointError, DataError, GlamError
from glamcli.progress import Progress

if TYPE_CHECKING:
    from glamcli.data.tokenizer import Tokenizer
    from glamcli.hosts.join import Host
    from glamcli.model.decoder import Decoder


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint."""

    recipe: Recipe
    decoder: Decoder
    params: Any
    tokenizer: Tokenizer
    identity: Mapping[str, Any]
    """of the weights, for JSON: run, step, hashes of recipe and data."""
    run_dir: Path | None
    """None for a checkpoint that lies in no run folder."""
    progress: Progress

    @property
    def dispatch(self) -> Any:
        """How tokens reach experts when the model is asked; None for a dense model."""
        return None if self.recipe.moe is None else self.recipe.moe.eval_dispatch

    def documents(self) -> dict[str, list[str]]:
        """Held-out documents by source, prepared again if the cache has lost them."""
        from glamcli.data.open import open_data

        dataset = open_data(self.recipe, self.progress)
        if dataset.fingerprint["sources"] != self.identity["data"]["sources"]:
            self.progress.warn(
                "the mixture's documents changed since the run was trained:"
                " held-out ones may not be the same"
            )
        return {name: dataset.prepared.heldout_documents(name) for name in dataset.source_names}


def open_trained(path: Path, progress: Progress, host: Host | None = None) -> Trained:
    """The newest model of a run folder, or the one of a checkpoint.

    On one device where the weights fit it, else over all of them; of a `host` of several processes,
    split over the devices of all of them as the recipe says.

    Raises:
        CheckpointError: there is none, it cannot be read, or its tokenizer has changed.
    """
    _refuse_what_is_no_run(path)
    from glamcli.checkpoint import find_step, restore_params
    from glamcli.model.decoder import Decoder
    from glamcli.parallel.axes import Layout

    several = host is not None and host.count > 1
    folder = find_step(path)
    if host is not None:  # a training run may be saving another one right now
        folder = Path(host.gather("checkpoint", str(folder))[0])
    with progress.phase("restoring"):
        params, meta = restore_params(folder, layout=_over_all_devices if several else _by_size)
    recipe = _recipe(meta, folder)
    keep_compiled_programs(recipe)

    run_dir = _run_dir(folder)
    tokenizer = _tokenizer(recipe, run_dir, meta["data"]["tokenizer"], progress)
    if tokenizer.fingerprint != meta["data"]["tokenizer"]:
        raise CheckpointError(
            f"{path}: its tokenizer is not the one it was trained with",
            hint="set `data.tokenizer.path` back to that file, or train again",
        )
    identity = {
        "run": str(run_dir or path),
        "step": meta["step"],
        "recipe_hash": meta["recipe_hash"],
        "data": {name: meta["data"][name] for name in ("tokenizer", "sources")},
    }
    decoder = Decoder(recipe.model, recipe.moe, layout=Layout.of(recipe.mesh))
    return Trained(recipe, decoder, params, tokenizer, identity, run_dir, progress)


def prepare_process(path: Path) -> Runtime:
    """Applies the run's huge-page setting, to be called before jax is imported; the run's settings
    of this kind.

    They are read from the run's recipe file, which needs no jax; a bare checkpoint gets the
    defaults.
    """
    try:
        runtime = load_recipe(path / "recipe.yaml", check=False).recipe.runtime
    except GlamError:
        runtime = Runtime()
    hugepages.apply(runtime.huge_pages == "auto")
    return runtime


def keep_compiled_programs(recipe: Recipe) -> None:
    """Programs that took long to compile are found again by the next start."""
    if recipe.runtime.compile_cache:
        import jax

        from glamcli.data.cache import cache_dir, compiled_dir

        jax.config.update("jax_compilation_cache_dir", str(compiled_dir(cache_dir(recipe))))


def _refuse_what_is_no_run(path: Path) -> None:
    inside = _runs_in(path)
    if inside and not (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"{path} holds runs and is none itself", hint=f"for example {inside[-1]}"
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


def _by_size(meta: Mapping[str, Any]) -> Any:
    """Shardings of the parameters: one device where they fit it, else as `mesh: auto` would have
    them, without stages."""
    import jax

    from glamcli.model.decoder import Decoder
    from glamcli.parallel.axes import Layout
    from glamcli.parallel.mesh import make_mesh
    from glamcli.train import automesh

    recipe = _recipe(meta, Path("checkpoint"))
    decoder = Decoder(recipe.model, recipe.moe, layout=Layout.of(recipe.mesh))
    room, num_devices = automesh.device_bytes(), jax.local_device_count()
    if num_devices == 1 or 4 * count(recipe).total <= automesh.ROOM * room:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: here, decoder.shapes)
    plain = recipe.mesh.model_copy(update={"slice": 1, "stage": 1})
    asked = recipe.model_copy(update={"mesh": plain, "pipeline": Pipeline()})
    mesh = make_mesh(automesh.choose(asked, num_devices, room).mesh)
    return decoder.layout.shardings(mesh, decoder.axes)


def _over_all_devices(meta: Mapping[str, Any]) -> Any:
    """Shardings of the parameters as in training, with as many data shards as there are devices."""
    from glamcli.model.decoder import Decoder
    from glamcli.parallel.axes import Layout
    from glamcli.parallel.mesh import make_mesh

    recipe = _recipe(meta, Path("checkpoint"))
    layout = Layout.of(recipe.mesh)
    decoder = Decoder(recipe.model, recipe.moe, layout=layout)
    mesh = make_mesh(recipe.mesh.model_copy(update={"data": "auto"}))
    check_divides(indivisible_widths(recipe, dict(mesh.shape)))
    return layout.shardings(mesh, decoder.axes)


def _recipe(meta: Mapping[str, Any], folder: Path) -> Recipe:
    try:
        return Recipe.model_validate(meta["recipe"])
    except (KeyError, ValueError):  # pydantic's errors are ValueErrors
        raise CheckpointError(
            f"{folder}: its recipe cannot be read by this version", hint="use the version it names"
        ) from None


def _tokenizer(
    recipe: Recipe, run_dir: Path | None, fingerprint: str, progress: Progress
) -> Tokenizer:
    """The run's own copy; where it has none that is whole, what its recipe names."""
    from glamcli.data.cache import cache_dir
    from glamcli.data.tokenizer import TOKENIZER_FILE, Bytes, load_sentencepiece
    from glamcli.data.vocabulary import open_tokenizer

    if recipe.data.tokenizer.kind == "bytes":
        return Bytes()
    if run_dir is not None:
        with contextlib.suppress(DataError):
            kept = load_sentencepiece(run_dir / TOKENIZER_FILE)
            if kept.fingerprint == fingerprint:
                return kept
    return open_tokenizer(recipe, load_mixture(recipe.data.mixture), cache_dir(recipe), progress)


def _run_dir(step_folder: Path) -> Path | None:
    """The run a checkpoint belongs to: RUN/checkpoints/STEP."""
    run = step_folder.parent.parent
    return run if step_folder.parent.name == "checkpoints" else None
