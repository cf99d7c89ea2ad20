"""`mesh: auto`: a layout for the devices at hand.

Of all ways to divide the devices into `data` x `expert` x `model` that divide the recipe's rows and
widths, the one with the smallest `model` with which the state takes at most `ROOM` of a device
(splitting matrices costs collectives of activations in every layer), then the largest `expert`
(experts that stay on their devices exchange tokens, where `data` would gather their weights): see
docs/parallelism.md. Where none leaves that much room, the one that takes least is chosen; where
that is more than a device has, the run is refused. `slice` and `stage` stay as the recipe says.

A mesh that the recipe gives is taken as it is, unless devices that tell their memory do not have
what weights, gradients and optimizer state alone take.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from glamcli.config import schema
from glamcli.config.nearest import divisors
from glamcli.config.schema import Recipe
from glamcli.config.sharding import MESH_AXES, indivisible
from glamcli.errors import PlanError
from glamcli.hosts.join import Host
from glamcli.model.decoder import Decoder
from glamcli.parallel.axes import Layout
from glamcli.parallel.mesh import mesh_shape
from glamcli.parallel.pipeline import COPY_GRADIENTS
from glamcli.progress import Progress
from glamcli.train.state import abstract_state, state_axes

ROOM = 0.6
"""Share of a device that the state may take; the rest is for activations and what XLA adds."""


@dataclass(frozen=True)
class Choice:
    """A layout, and what it needs on every device."""

    mesh: schema.Mesh
    num_bytes: int
    """weights, gradients, optimizer state, one layer pair's weights gathered, copies of a stage."""
    device_bytes: int

    def __str__(self) -> str:
        sizes = {axis: getattr(self.mesh, axis) for axis in MESH_AXES}
        used = [f"{axis} {size}" for axis, size in sizes.items() if size != 1]
        mib = 2**20
        return (
            f"mesh: {' x '.join(used) or 'one device'}; weights, gradients and optimizer state "
            f"take {self.num_bytes / mib:,.1f} of {self.device_bytes / mib:,.0f} MiB per device"
        )


def choose(recipe: Recipe, num_devices: int, device_bytes: int) -> Choice:
    """The layout of the recipe on `num_devices` of `device_bytes` memory each (rule above).

    Raises:
        PlanError: nothing divides, or nothing fits.
    """
    needs = _needs(recipe, num_devices)
    found = [
        Choice(mesh, sum(needs(mesh)), device_bytes) for mesh in _candidates(recipe, num_devices)
    ]
    if not found:
        raise PlanError(
            f"no layout over {num_devices} devices divides the recipe's rows ({recipe.batch.rows}) "
            "and widths",
            hint=f"raise `batch.rows` to a multiple of {num_devices}, or set the mesh by hand",
        )
    fit = [each for each in found if each.num_bytes <= ROOM * device_bytes]
    if fit:
        return min(fit, key=lambda each: (each.mesh.model, -each.mesh.expert))
    least = min(found, key=lambda each: each.num_bytes)
    if least.num_bytes > device_bytes:
        need = num_devices * least.num_bytes / device_bytes / ROOM
        raise PlanError(
            f"too large for {num_devices} devices: {least}",
            hint=f"about {need:,.0f} devices would hold it",
        )
    return least


def layout(recipe: Recipe, host: Host, progress: Progress) -> schema.Mesh:
    """The mesh of a run: the recipe's, or for `mesh: auto` the choice for the devices of all
    processes, which must call this alike.

    Raises: PlanError when it does not fit them, with one that does.
    """
    num_devices = jax.device_count()
    if recipe.mesh.auto:
        room = min(host.gather("device memory", device_bytes()))
        choice = choose(recipe, num_devices, room)
        progress.say(str(choice))
        return choice.mesh
    told = host.gather("device memory", _told_bytes())
    if None not in told:
        _refuse_too_large(recipe, num_devices, min(told))
    return recipe.mesh


def _refuse_too_large(recipe: Recipe, num_devices: int, device_bytes: int) -> None:
    """
    Raises: PlanError when weights, gradients and optimizer state, which are all in memory when the
        update begins, take more than devices of this memory have in the recipe's own mesh.
    """
    mesh = recipe.mesh.model_copy(update=mesh_shape(recipe.mesh, num_devices))
    held, _ = _needs(recipe, num_devices)(mesh)
    if held <= device_bytes:
        return
    try:
        fits = choose(recipe, num_devices, device_bytes).mesh
        axes = (f"--set mesh.{axis}={getattr(fits, axis)}" for axis in ("data", "expert", "model"))
        hint = f"by this arithmetic another mesh fits: {' '.join(axes)}"
    except PlanError as error:
        hint = error.hint
    raise PlanError(f"too large: {Choice(mesh, held, device_bytes)}", hint, key="mesh.data")


def device_bytes() -> int:
    """Memory of one device of this process; simulated devices share the machine's."""
    if (told := _told_bytes()) is not None:
        return told
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // jax.local_device_count()


def _told_bytes() -> int | None:
    """What an accelerator says of its memory; of simulated devices nothing is known."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def _needs(recipe: Recipe, num_devices: int) -> Callable[[schema.Mesh], tuple[int, int]]:
    """Gives, for a mesh, bytes on one device: of weights, gradients and optimizer state, and of
    what is copied of them beside (one layer pair's weights gathered, copies of a stage)."""
    decoder = Decoder(recipe.model, recipe.moe, recipe.train.remat, Layout.of(recipe.mesh))
    state = abstract_state(decoder, recipe.optimizer)
    axes = state_axes(decoder, recipe.optimizer)

    blocks = (decoder.shapes["blocks"], decoder.axes["blocks"])
    gathered = recipe.mesh.rules.model_copy(update={"embed": (), "expert_embed": ()})
    whole = Layout.of(recipe.mesh.model_copy(update={"rules": gathered}))
    inner = decoder.layout.without(decoder.layout.data_axes if recipe.mesh.stage > 1 else ())
    copied_times = (decoder.dtype.itemsize + COPY_GRADIENTS) / 4 if recipe.mesh.stage > 1 else 0

    def needs(mesh: schema.Mesh) -> tuple[int, int]:
        sizes, own = mesh_shape(mesh, num_devices), decoder.layout.bytes_per_device
        held = own(sizes, state, axes) + own(sizes, state.params, axes.params)  # and gradients
        copies = inner.bytes_per_device(sizes, *blocks)  # without a pipeline what is held
        more = whole.bytes_per_device(sizes, *blocks) - copies
        return held, int(copied_times * copies) + more * mesh.stage // decoder.num_blocks

    return needs


def _candidates(recipe: Recipe, num_devices: int) -> Iterator[schema.Mesh]:
    """Every mesh over `num_devices` that the recipe's rows and widths divide over."""
    left, rest = divmod(num_devices, recipe.mesh.slice * recipe.mesh.stage)
    if rest:
        mesh_shape(recipe.mesh, num_devices)  # raises, with the sizes
    for model in divisors(left):
        for expert in divisors(left // model) if recipe.moe else (1,):
            sizes = {"data": left // model // expert, "expert": expert, "model": model}
            mesh = recipe.mesh.model_copy(update={"auto": False, **sizes})
            laid_out = recipe.model_copy(update={"mesh": mesh})
            if next(indivisible(laid_out, mesh_shape(mesh, num_devices)), None) is None:
                yield mesh
