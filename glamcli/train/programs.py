"""The programs of a run, before they are compiled: the training step and the held-out step.

They are lowered from shapes alone, so the same text compiles for devices at hand, devices that are
only described, and a state that was restored. The executable refuses a wrong shape, dtype or
sharding where `jit` would silently compile once more.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered, Traced

from glamcli import faults
from glamcli.config.schema import Recipe
from glamcli.config.sharding import check_divides, indivisible
from glamcli.config.xla_flags import WHOLE_PRODUCTS
from glamcli.data.rows import TOKEN_FIELDS
from glamcli.errors import RecipeError
from glamcli.model.decoder import Decoder
from glamcli.parallel.axes import Layout
from glamcli.train.state import abstract_state, state_shardings
from glamcli.train.step import make_heldout_step, make_train_step


def make_decoder(recipe: Recipe, mesh_shape: Mapping[str, int]) -> Decoder:
    """The recipe's model for a mesh of this shape, checked to split over it.

    Raises: RecipeError when weights or rows do not divide over the mesh's axes.
    """
    check_divides(indivisible(recipe, mesh_shape))
    decoder = Decoder(recipe.model, recipe.moe, recipe.train.remat, Layout.of(recipe.mesh))
    return decoder.for_one_device() if math.prod(mesh_shape.values()) == 1 else decoder


def trace_train_step(
    decoder: Decoder,
    recipe: Recipe,
    num_sources: int,
    mesh: Mesh,
    restarts: tuple[int, ...] = (),
) -> Traced:
    """The training step (state, batch) -> (state, sums), to be lowered and compiled; its operations
    can be counted. The state is updated in place. `restarts` as `make_train_step` has them."""
    state = abstract_state(decoder, recipe.optimizer, mesh)
    step = jax.jit(
        make_train_step(decoder, recipe, num_sources, restarts),
        donate_argnums=0,
        out_shardings=(state_shardings(decoder, recipe.optimizer, mesh), _everywhere(mesh)),
    )
    with jax.set_mesh(mesh):
        return step.trace(state, training_batch(recipe, mesh))


def compiler_options(recipe: Recipe, mesh: Mesh) -> dict[str, Any]:
    """Options of XLA for both programs: what the recipe's own settings mean, and its
    `runtime.xla_flags`."""
    off = recipe.mesh.collective_matmul == "off" and mesh.devices.flat[0].platform == "tpu"
    name, size = WHOLE_PRODUCTS
    whole = {name: str(size)} if off else {}
    return whole | recipe.runtime.xla_flags


def compiled(lowered: Lowered, options: Mapping[str, Any]) -> Compiled:
    """The executable.

    Raises: RecipeError when this compiler does not know one of the options or refuses its value.
    """
    try:
        return lowered.compile(dict(options))
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        named = re.search(r"(?:No such compile option: '|While setting option )(\w+)", said)
        if named is None or named[1] not in options:
            raise
        key = "runtime.xla_flags"
        hint = "`glam doctor` lists flags that are known for the devices here"
        raise RecipeError(f"the compiler refuses a flag of `{key}`: {said}", hint, key) from error


def lower_heldout_step(decoder: Decoder, recipe: Recipe, num_sources: int, mesh: Mesh) -> Lowered:
    """The held-out step (params, batch of `heldout_rows` rows) -> sums."""
    params = abstract_state(decoder, recipe.optimizer, mesh).params
    step = jax.jit(make_heldout_step(decoder, recipe, num_sources), out_shardings=_everywhere(mesh))
    with jax.set_mesh(mesh):
        return step.lower(params, abstract_batch(recipe, mesh, heldout_rows(recipe)))


def heldout_rows(recipe: Recipe) -> int:
    """Rows of a held-out batch: as many as training puts through the model at once."""
    return recipe.batch.rows // recipe.batch.accumulate


def training_batch(recipe: Recipe, mesh: Mesh) -> dict[str, ShapeDtypeStruct]:
    """Shapes and layout of a batch that is trained on."""
    batch = abstract_batch(recipe, mesh, recipe.batch.rows)
    if faults.scales_loss():
        source = batch["source"]
        batch[faults.LOSS_FACTOR] = source.update(dtype=jnp.float32)
    return batch


def abstract_batch(recipe: Recipe, mesh: Mesh, num_rows: int) -> dict[str, ShapeDtypeStruct]:
    """Shapes and layout of a batch; rows are split and their tokens stay together."""
    tokens = (num_rows, recipe.batch.row_tokens)
    shapes = {**dict.fromkeys(TOKEN_FIELDS, tokens), "source": (num_rows,)}
    rows = Layout.of(recipe.mesh).sharding(mesh, ("batch",))
    return {
        name: ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name, shape in shapes.items()
    }


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
