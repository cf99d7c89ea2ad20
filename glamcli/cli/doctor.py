"""`glam doctor`: what this machine offers to a run, and whether every mesh computes the same."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import click

from glamcli.cli.options import json_option, set_option
from glamcli.errors import PlanError, RecipeError, TrainError

if TYPE_CHECKING:
    from glamcli.doctor.parity import Difference


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine offers to a run: devices, memory, huge pages, folders, versions."""
    if ctx.invoked_subcommand is not None:
        return
    from glamcli.cli import render
    from glamcli.doctor import machine

    facts = machine.machine_facts()
    if as_json:
        click.echo(json.dumps(facts))
        return
    render.print_table(("", ""), list(facts.items()))


@command.command()
@click.argument("recipe", default="quickstart")
@set_option
@click.option("--only", default="", show_default=False, help="Meshes whose names contain this.")
@json_option
def parity(recipe: str, sets: tuple[str, ...], only: str, as_json: bool) -> None:
    """Check that RECIPE computes the same on every kind of mesh.

    A small version of it takes one step on one device and on eight simulated CPU devices, laid
    out in every way, in float32. Loss, balance loss, every gradient and every updated parameter
    must agree to a relative 1e-5. Exits with 6 when something does not.
    """
    from glamcli.cli import render
    from glamcli.config.load import load_recipe

    settings = load_recipe(recipe, sets).recipe
    _simulate_devices()
    import jax

    from glamcli.doctor import parity

    if len(jax.devices()) < parity.NUM_DEVICES:
        raise PlanError(f"parity needs {parity.NUM_DEVICES} devices, found {len(jax.devices())}")
    cases = tuple(case for case in parity.CASES if only in case.name)
    if not cases:
        names = ", ".join(f"`{case.name}`" for case in parity.CASES)
        raise RecipeError(f"no mesh has `{only}` in its name", hint=f"there are {names}")
    compared = parity.Parity(settings)
    found: list[Difference] = []
    progress = render.make_progress(as_json)
    total = len(cases) * len(parity.dispatches(settings))
    with progress.phase("comparing", total=total, unit="meshes") as bar:
        for each in compared.differences(cases):
            found.append(each)
            bar.advance()
            if as_json:
                render.emit("mesh", equal=each.equal, **vars(each))
    if not as_json:
        render.print_table(
            ("mesh", "devices", "dispatch", ">loss", ">balance", ">gradients", ">weights", "worst"),
            [_row(each) for each in found],
            title=f"relative differences from one device ({recipe}, small, float32)",
        )
    different = [each for each in found if not each.equal]
    if different:
        worst = max(different, key=lambda each: each.error)
        raise TrainError(
            f"{len(different)} of {len(found)} meshes differ from one device by more than "
            f"{parity.LIMIT:g}; `{worst.name}` by {worst.error:.1e}"
        )


def _row(each: Difference) -> list[str]:
    numbers = (each.loss, each.balance_loss, each.gradient, each.parameters)
    return [
        each.name,
        " x ".join(f"{axis} {size}" for axis, size in each.mesh.items()),
        each.dispatch or "-",
        *(f"{number:.0e}" if number else "0" for number in numbers),
        "equal" if each.equal else f"{each.worst_gradient} DIFFERS",
    ]


def _simulate_devices() -> None:
    """Eight CPU devices in this process, whatever the machine has; must come before jax."""
    if "jax" in sys.modules:
        return
    from glamcli.config.xla_flags import fast_compilation

    flags = f"{fast_compilation()} --xla_force_host_platform_device_count=8"
    os.environ |= {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
