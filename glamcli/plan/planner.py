"""A plan: everything that can be said about a recipe on a target before renting it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from glamcli.config.schema import Recipe
from glamcli.config.sizes import count, flops_per_token, tokens_per_step
from glamcli.errors import PlanError
from glamcli.parallel.mesh import mesh_shape
from glamcli.plan import cost, formula, topology
from glamcli.plan.collectives import collectives
from glamcli.plan.compile import Program, TooLarge, compile_step
from glamcli.plan.cost import Cost
from glamcli.plan.hlo import Module
from glamcli.plan.memory import ArrayLayout, StateBytes, groups, state_bytes
from glamcli.plan.network import Network
from glamcli.plan.schedule import Time, by_kind, step_time
from glamcli.plan.topology import Target
from glamcli.train import automesh
from glamcli.train.programs import make_decoder

GIB = 2**30


@dataclass(frozen=True)
class Prices:
    """What a chip costs and draws; None is the price in the table of chips."""

    dollars: float | None = None
    watts: float = cost.WATTS_PER_CHIP
    pue: float = cost.PUE


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
    def headroom_frac(self) -> float | None:
        """Share of a device's memory that is left; None where its size is not known."""
        if self.target.chip is None:
            return None
        return 1 - self.total_bytes / self.target.chip.hbm_bytes

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
            },
            "cost": self.cost and asdict(self.cost),
            "arrays": [asdict(array) for array in self.arrays],
            "compile_seconds": self.compile_seconds,
            "compile_cpu_seconds": self.compile_cpu_seconds,
        }


def make_plan(recipe: Recipe, target: Target, prices: Prices) -> Plan:
    """The recipe on the target: compiled, or for GPUs by formula.

    Raises:
        RecipeError, PlanError: when recipe, mesh and target do not go together, or the step does
            not fit, with its bytes by group.
    """
    num_devices = target.num_devices
    if target.kind == "local":
        num_devices = len(topology.devices(target))
    recipe = _laid_out(recipe, target, num_devices)
    if target.kind == "gpu":
        return _by_formula(recipe, target, prices)
    shape = mesh_shape(recipe.mesh, num_devices)
    _check_slices(target, shape)
    make_decoder(recipe, shape)  # refuses what does not divide
    state = state_bytes(recipe, shape)
    _refuse_state(recipe, target, state, shape)
    try:
        program = compile_step(recipe, target)
    except TooLarge as error:
        raise _does_not_fit(recipe, target, shape, _refused_bytes(state, error)) from error
    bytes_by_group = groups(state, recipe, program)
    chip = target.chip
    if chip is not None and program.total > chip.usable_bytes:
        raise _does_not_fit(recipe, target, shape, bytes_by_group)
    return _compiled_plan(recipe, target, shape, state, program, bytes_by_group, prices)


def _laid_out(recipe: Recipe, target: Target, num_devices: int) -> Recipe:
    """The recipe with the mesh that training would choose for `mesh: auto`."""
    if not recipe.mesh.auto:
        return recipe
    chip = target.chip
    room = automesh.device_bytes() if chip is None else int(chip.usable_bytes)
    chosen = automesh.choose(recipe, num_devices, room).mesh
    return recipe.model_copy(update={"mesh": chosen})


def _compiled_plan(
    recipe: Recipe,
    target: Target,
    shape: dict[str, int],
    state: StateBytes,
    program: Program,
    bytes_by_group: dict[str, int],
    prices: Prices,
) -> Plan:
    module = Module(program.hlo)
    time = None
    if target.chip is not None and target.chip.clock is not None:
        time = step_time(module, Network(target, program.mesh, shape))
    return Plan(
        recipe=recipe,
        target=target,
        mesh=shape,
        method="compiled",
        bytes=bytes_by_group,
        arrays=state.arrays,
        collectives=by_kind(collectives(module, shape)),
        hardware_flops=program.matrix_flops,
        time=time,
        cost=time and _cost(recipe, target, time.total, prices),
        compile_seconds=program.seconds,
        compile_cpu_seconds=program.cpu_seconds,
    )


def _by_formula(recipe: Recipe, target: Target, prices: Prices) -> Plan:
    shape = mesh_shape(recipe.mesh, target.num_devices)
    make_decoder(recipe, shape)  # refuses what does not divide
    state = state_bytes(recipe, shape)
    found = formula.estimate(recipe, state, Network(target, None, shape))
    chip = target.chip
    assert chip is not None
    if found.total > chip.usable_bytes:
        raise _does_not_fit(recipe, target, shape, found.bytes)
    time = Time(found.compute_seconds, found.network)
    return Plan(
        recipe=recipe,
        target=target,
        mesh=shape,
        method="formula",
        bytes=found.bytes,
        arrays=state.arrays,
        collectives=[],
        hardware_flops=found.flops,
        time=time,
        cost=_cost(recipe, target, time.total, prices),
    )


def _cost(recipe: Recipe, target: Target, seconds: float, prices: Prices) -> Cost:
    chip = target.chip
    assert chip is not None
    return cost.run_cost(
        recipe,
        flops_per_token(recipe),
        chip,
        target.num_chips,
        seconds,
        price=chip.price if prices.dollars is None else prices.dollars,
        watts=prices.watts,
        pue=prices.pue,
    )


def _check_slices(target: Target, shape: dict[str, int]) -> None:
    if shape["slice"] != target.num_slices:
        raise PlanError(
            f"`{target.name}` has {target.num_slices} slice(s), `mesh.slice` is {shape['slice']}",
            f"--set mesh.slice={target.num_slices}",
        )


def _refuse_state(recipe: Recipe, target: Target, state: StateBytes, shape: dict[str, int]) -> None:
    """Refuses before compiling what arithmetic shows to be impossible: weights, optimizer state
    and a gradient for every weight are all in memory when the update begins."""
    chip = target.chip
    known = {
        "weights": state.weights,
        "optimizer state": state.optimizer,
        "gradients": state.weights,
        "batch": state.batch,
    }
    if chip is not None and sum(known.values()) > chip.usable_bytes:
        raise _does_not_fit(recipe, target, shape, known, at_least=True)


def _refused_bytes(state: StateBytes, error: TooLarge) -> dict[str, int]:
    """Groups of a program that was never finished, from what the compiler told."""
    needed = int(error.needed or 0)
    if error.what_for != "temporaries":
        needed -= state.total
    gradients = min(state.weights, max(needed, 0))
    return {
        "weights": state.weights,
        "optimizer state": state.optimizer,
        "gradients": gradients,
        "activations and temporaries": max(needed - gradients, 0),
        "batch": state.batch,
    }


def _does_not_fit(
    recipe: Recipe,
    target: Target,
    shape: dict[str, int],
    found: dict[str, int],
    at_least: bool = False,
) -> PlanError:
    chip = target.chip
    assert chip is not None
    parts = ", ".join(
        f"{name} {size / GIB:.1f}" for name, size in found.items() if size >= 0.05 * GIB
    )
    device = "chip" if chip.devices == 1 else "core"
    more = "at least " if at_least else ""
    return PlanError(
        f"the step needs {more}{sum(found.values()) / GIB:.1f} GiB per {device}, "
        f"{chip.name} has {chip.usable_bytes / GIB:.1f} ({parts})",
        _remedy(recipe, shape, found),
    )


def _remedy(recipe: Recipe, shape: dict[str, int], found: dict[str, int]) -> str:
    """What to change first, by what is largest."""
    kept = sum(found.get(name, 0) for name in ("weights", "optimizer state", "gradients"))
    if kept >= found.get("activations and temporaries", 0):
        return "take a larger slice (`--all-targets` finds one), or let `--search` lay it out"
    if recipe.train.remat != "full":
        return "--set train.remat=full"
    shards = shape["slice"] * shape["data"] * shape["expert"]
    if recipe.batch.rows // recipe.batch.accumulate > shards:
        return f"--set batch.accumulate={2 * recipe.batch.accumulate}, or let `--search` lay it out"
    return f"--set mesh.model={2 * shape['model']}, or let `--search` lay it out"
