"""A plan: everything that can be said about a recipe on a target before renting it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from glamcli.config.schema import Recipe
from glamcli.config.sharding import check_divides, indivisible
from glamcli.config.sizes import count, flops_per_token, tokens_per_step
from glamcli.errors import PlanError
from glamcli.parallel.mesh import mesh_shape
from glamcli.plan import formula, topology
from glamcli.plan.candidates import remedy
from glamcli.plan.collectives import collectives
from glamcli.plan.compile import TooLarge, compile_step
from glamcli.plan.cost import Cost, Prices, run_cost
from glamcli.plan.hlo import Module
from glamcli.plan.memory import ArrayLayout, by_group, state_bytes
from glamcli.plan.network import Network
from glamcli.plan.schedule import Time, by_kind, step_time
from glamcli.plan.topology import Target
from glamcli.train import automesh

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A recipe on a target. Bytes are of one device; `time` and `cost` are estimates."""

    recipe: Recipe
    target: Target
    mesh: dict[str, int]
    method: str
    """`compiled` or `formula`."""
    bytes: dict[str, int]
    arrays: tuple[ArrayLayout, ...]
    collectives: list[tuple[str, tuple[str, ...], int, int]]
    hardware_flops: float
    """of a step on all devices."""
    time: Time | None
    cost: Cost | None
    compile_seconds: float | None = None
    compile_cpu_seconds: float | None = None

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def whole_bytes(self) -> float:
        """A device's memory, or what is needed where that is more or its size is not known."""
        chip = self.target.chip
        return max(self.total_bytes, chip.hbm_bytes if chip else 0)

    @property
    def headroom_frac(self) -> float | None:
        """Share of a device's memory that is left; None where its size is not known."""
        if self.target.chip is None:
            return None
        return 1 - self.total_bytes / self.target.chip.hbm_bytes

    @property
    def seconds_per_token(self) -> float:
        """By estimate; infinite where there is none."""
        return (self.time.total if self.time else math.inf) / tokens_per_step(self.recipe)

    @property
    def hardware_flops_per_token(self) -> float:
        return self.hardware_flops / tokens_per_step(self.recipe)

    def to_json(self) -> dict[str, Any]:
        """The plan as one object of JSON."""
        recipe = self.recipe
        sizes, flops = count(recipe), flops_per_token(recipe)
        return {
            "target": self.target.name,
            "target_words": self.target.words,
            "num_chips": self.target.num_chips,
            "num_devices": self.target.num_devices,
            "mesh": self.mesh,
            "method": self.method,
            "fits": True,
            "bytes_per_device": self.bytes,
            "total_bytes": self.total_bytes,
            "device_bytes": self.target.chip and round(self.target.chip.hbm_bytes),
            "headroom_frac": self.headroom_frac,
            "parameters": {"total": sizes.total, "active": sizes.active},
            "flops_per_token": {
                "useful": flops.training,
                "padded": flops.training_padded,
                "hardware": self.hardware_flops_per_token,
            },
            "collectives": [
                {"kind": kind, "axes": axes, "count": number, "bytes": size}
                for kind, axes, number, size in self.collectives
            ],
            "estimate": self.time
            and {
                "step_seconds": self.time.total,
                "compute_seconds": self.time.compute,
                "exposed_seconds": self.time.exposed,
                "network_seconds": self.time.network,
                "compute_by_part": self.time.scopes,
                "kernel_seconds": self.time.kernels,
                "kernels_without_cost": self.time.unpriced,
            },
            "cost": self.cost and asdict(self.cost),
            "arrays": [asdict(array) for array in self.arrays],
            "compile_seconds": self.compile_seconds,
            "compile_cpu_seconds": self.compile_cpu_seconds,
        }


def make_plan(recipe: Recipe, target: Target, prices: Prices) -> Plan:
    """The recipe on the target: compiled, or for GPUs by formula.

    Raises:
        RecipeError, PlanError: when recipe, mesh and target do not go together, the step does not
            fit, with its bytes by group and what would fit, or the compiler's estimate is absurd.
    """
    given, (recipe, shape) = recipe, on_target(recipe, target)
    check_divides(indivisible(recipe, shape))
    state = state_bytes(recipe, shape)
    room = target.chip.usable_bytes if target.chip else math.inf
    method, seconds, cpu_seconds, time, found = "formula", None, None, None, []
    if target.kind == "gpu":
        guess = formula.estimate(recipe, state, Network(target, None, shape))
        sizes, flops, time = guess.bytes, guess.flops, guess.time
    else:
        # Weights, optimizer state and a gradient for every weight are all in memory when the update
        # begins: what that rules out is refused before compiling.
        least = {
            "weights": state.weights,
            "optimizer state": state.optimizer,
            "gradients": state.weights,
            "batch": state.batch,
        }
        if sum(least.values()) > room:
            raise _does_not_fit(given, target, least, "at least ")
        try:
            program = compile_step(recipe, target)
        except TooLarge as error:
            sizes = by_group(recipe, state, shape, error.temporaries(state.total))
            raise _does_not_fit(given, target, sizes) from error
        method, seconds, cpu_seconds = "compiled", program.seconds, program.cpu_seconds
        sizes = by_group(recipe, state, shape, program.temporaries + program.outputs)
        # Tiles of memory are larger than the arrays in them.
        sizes |= {"padding": program.arguments - state.total, "program code": program.code}
        flops, module = program.matrix_flops, Module(program.hlo)
        found = by_kind(collectives(module, shape))
        if target.chip is not None and target.chip.clock is not None:
            time = step_time(module, Network(target, program.mesh, shape))
    if sum(sizes.values()) > room:
        raise _does_not_fit(given, target, sizes)
    return Plan(
        recipe=recipe,
        target=target,
        mesh=shape,
        method=method,
        bytes=sizes,
        arrays=state.arrays,
        collectives=found,
        hardware_flops=flops,
        time=time,
        cost=time and run_cost(recipe, target, time.total, prices),
        compile_seconds=seconds,
        compile_cpu_seconds=cpu_seconds,
    )


def on_target(recipe: Recipe, target: Target) -> tuple[Recipe, dict[str, int]]:
    """The recipe with the mesh that `mesh: auto` chooses on the target, and its sizes.

    Raises: PlanError where the target cannot have such a mesh, with one that it can have.
    """
    chip, num_devices, laid_out = target.chip, target.num_devices, recipe
    if target.kind == "local":
        num_devices = len(topology.devices(target))
    try:
        if recipe.mesh.auto:
            room = automesh.device_bytes() if chip is None else int(chip.usable_bytes)
            mesh = automesh.choose(recipe, num_devices, room).mesh
            laid_out = recipe.model_copy(update={"mesh": mesh})
        shape = mesh_shape(laid_out.mesh, num_devices)
    except PlanError as error:
        if chip is None:
            raise
        hint = remedy(recipe, target) or error.hint
        raise PlanError(error.what, hint, key=error.key) from error
    if target.kind == "tpu" and shape["slice"] != target.num_slices:
        raise PlanError(
            f"`{target.name}` has {target.num_slices} slice(s), `mesh.slice` is {shape['slice']}",
            f"--set mesh.slice={target.num_slices}",
        )
    return laid_out, shape


def _does_not_fit(
    recipe: Recipe, target: Target, sizes: dict[str, int], bound: str = ""
) -> PlanError:
    chip = target.chip
    assert chip is not None
    parts = ", ".join(
        f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size >= 0.05 * GIB
    )
    return PlanError(
        f"the step needs {bound}{sum(sizes.values()) / GIB:.1f} GiB per {chip.device_name}, "
        f"{chip.name} has {chip.usable_bytes / GIB:.1f} ({parts})",
        remedy(recipe, target),
    )
