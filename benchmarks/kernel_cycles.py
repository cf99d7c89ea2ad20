"""How near the kernels of a recipe's step come to the peak, from the compiler's own final bundles.

    python benchmarks/kernel_cycles.py glam_1.7b_64e --target v4-256
    python benchmarks/kernel_cycles.py test-tiny --target v5e-4 --set model.head_dim=128

Needs libtpu and no TPU. A kernel issues one bundle of instructions per cycle. Those of its grid's
body count once per step; those under a condition (`pl.when`) as often as it holds over the grid,
where that depends on the step alone; those of a loop with products as often as it runs, which is
what the kernel states as its operations over those of its body. Stalls, and copies that are not
hidden, are left out. So this is an estimate; its last line is for `chips.toml`.
"""

from __future__ import annotations

import argparse
import math
import operator
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_OTHER_STEPS = 64
"""Steps of a dimension of the grid that is known at run time only."""

_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})?: *(>*) *\{")
_SKIP = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_REGION = re.compile(r"(?:Start region|Start/End empty region) (\d+)")
_EVALUATED: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "sub")},
    "add": operator.add,
    "mul": operator.mul,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "convert_element_type": lambda x: x,
}


@dataclass(frozen=True)
class Body:
    """A kernel as it was traced: operations of matrix products of a step outside of loops, and of
    one round of those within."""

    name: str
    flops: float
    bytes: float
    straight: float
    looped: float
    steps: int | None
    """of the grid, None where that is known at run time."""
    is_parallel: bool
    """whether two cores that act as one share the grid."""
    conditions: tuple[float, ...]
    """of what runs under a condition and has no products: the share of steps in which it does."""

    @property
    def rounds(self) -> float:
        """How often a step goes around a loop with products in it, on average."""
        if not self.looped:
            return 0.0
        return (self.flops / self.steps - self.straight) / self.looped if self.steps else 1.0

    @property
    def step_flops(self) -> float:
        return self.straight + self.rounds * self.looped


def bodies(jaxpr: Any) -> Iterator[Body]:
    """The kernels of a traced function that state their cost."""
    from glamcli.plan.compile import matrix_flops

    for equation in jaxpr.eqns:
        params = equation.params
        inner = [each for value in params.values() for each in _jaxprs(value)]
        if equation.primitive.name != "pallas_call":
            for each in inner:
                yield from bodies(each)
        elif (cost := params["cost_estimate"]) is not None:
            kernel = params["jaxpr"]
            looped = sum(matrix_flops(each, 1) for each in _loops(kernel))
            grid = params["grid_mapping"].grid
            is_known = all(isinstance(size, int) for size in grid)
            order = getattr(params["compiler_params"], "dimension_semantics", None) or ()
            yield Body(
                params["name"],
                cost.flops,
                cost.bytes_accessed,
                matrix_flops(kernel, 1) - looped,
                looped,
                math.prod(grid) if is_known else None,
                any("parallel" in str(each).lower() for each in order),
                tuple(conditions(kernel, grid)),
            )


def conditions(kernel: Any, grid: tuple[Any, ...]) -> Iterator[float]:
    """The share of steps in which each condition without products holds, 1 where it depends on
    more than the step."""
    from glamcli.plan.compile import matrix_flops

    sizes = [size if isinstance(size, int) else _OTHER_STEPS for size in grid]
    steps, known = np.indices(sizes), {}
    for equation in kernel.eqns:
        name, params = equation.primitive.name, equation.params
        values = [each.val if hasattr(each, "val") else known.get(each) for each in equation.invars]
        if name == "cond":
            if not any(matrix_flops(branch.jaxpr, 1) for branch in params["branches"]):
                yield 1.0 if values[0] is None else float(np.mean(values[0]))
        elif name in ("program_id", "num_programs"):
            axis = params["axis"]
            known[equation.outvars[0]] = steps[axis] if name == "program_id" else sizes[axis]
        elif name in _EVALUATED and all(each is not None for each in values):
            known[equation.outvars[0]] = _EVALUATED[name](*values)


def _jaxprs(value: Any) -> Iterator[Any]:
    for each in value if isinstance(value, tuple | list) else (value,):
        if hasattr(each, "eqns"):
            yield each
        elif hasattr(each, "jaxpr"):
            yield each.jaxpr


def _loops(jaxpr: Any) -> Iterator[Any]:
    """Bodies of loops, wherever they are; loops in loops count with the outer one."""
    for equation in jaxpr.eqns:
        inner = [each for value in equation.params.values() for each in _jaxprs(value)]
        if equation.primitive.name in ("while", "scan"):
            yield from inner
        else:
            for each in inner:
                yield from _loops(each)


@dataclass
class Bundles:
    """What a step of a kernel's grid issues, as the compiler wrote it."""

    straight: int = 0
    """outside of loops and conditions."""
    loops: int = 0
    """in loops with matrix products, a round of each."""
    other_loops: int = 0
    conditional: list[int] = field(default_factory=list)
    """under conditions without products that store something, in order."""


def read_bundles(text: str) -> Bundles:
    """Takes the text of final bundles apart: `>` marks the depth of loops, of which the outermost
    is the grid's, and a branch ahead skips what is under a condition."""
    found = Bundles()
    # (position, bundles, products, stores), while open by the region where it ends.
    skips: dict[str, list[int]] = {}
    ranges: list[list[int]] = []
    loop = products = 0
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        depth = len(match[1]) if match else 0
        is_product = "vmatmul" in line
        if match is not None and loop and (depth < 2 or " LB:" in line):
            found.loops, found.other_loops = (
                (found.loops + loop, found.other_loops)
                if products
                else (found.loops, found.other_loops + loop)
            )
            loop = products = 0
        if depth > 1:
            loop, products = loop + 1, products + is_product
        elif depth == 1:
            found.straight += 1
            for each in skips.values():
                each[1] += 1
        for each in skips.values():
            each[2] += is_product
            each[3] += " vst " in line
        ranges += [skips.pop(region) for region in _REGION.findall(line) if region in skips]
        if depth == 1:
            for region in _SKIP.findall(line):
                skips.setdefault(region, [found.straight, 0, 0, 0])
    end = 0
    for start, count, products, stores in sorted(ranges):
        # What stores nothing only starts or awaits copies of the pipeline.
        if start >= end and stores and not products:
            found.conditional.append(count)
            end = start + count
    found.straight -= sum(found.conditional)
    return found


def efficiency(body: Body, text: str, chip: Any) -> tuple[float, str]:
    """The share of the peak, and how it came about."""
    found = read_bundles(text)
    if body.looped and not found.loops:  # unrolled by the compiler
        found.straight += found.other_loops
        found.other_loops = 0
    held, sizes = body.conditions, found.conditional
    if len(sizes) > len(held):  # the pipeline around the body has its own, before and after
        own = slice(1, 1 + len(held))
        found.straight += sum(sizes) - sum(sizes[own])
        sizes = sizes[own]
    if len(sizes) < len(held):  # some became selections
        held = (1.0,) * len(sizes)
    count = found.straight + body.rounds * found.loops + found.other_loops
    count += sum(share * size for share, size in zip(held, sizes, strict=True))
    cores = chip.cores / chip.devices  # of a device; all work at once, or one
    per_bundle = chip.peak / chip.clock / chip.cores
    share = body.step_flops / (count * per_bundle) / (1 if body.is_parallel else cores)
    how = f"{found.straight} + {body.rounds:.1f} x {found.loops} + {found.other_loops} bundles"
    how += "".join(f" + {share:.2g} x {size}" for share, size in zip(held, sizes, strict=True))
    return min(1.0, share), f"{body.step_flops:.3g} FLOPs a step in {count:,.0f} bundles ({how})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--target", required=True)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles"
        )
        os.environ["JAX_PLATFORMS"] = "cpu"
        show(asked, Path(folder))


def show(asked: argparse.Namespace, folder: Path) -> None:
    from glamcli import libtpu

    libtpu.quiet()

    from glamcli.config.chips import load_chips
    from glamcli.config.load import load_recipe
    from glamcli.config.mixtures import load_mixture
    from glamcli.parallel.mesh import make_mesh
    from glamcli.plan import topology
    from glamcli.plan.compile import compile_step
    from glamcli.train import programs

    recipe = load_recipe(asked.recipe, ["runtime.compile_cache=false", *asked.sets]).recipe
    target = topology.parse_target(asked.target, load_chips())
    mesh = make_mesh(recipe.mesh, topology.devices(target))
    decoder = programs.make_decoder(recipe, mesh.shape)
    sources = len(load_mixture(recipe.data.mixture).sources)
    traced = programs.trace_train_step(decoder, recipe, sources, mesh)
    report(compile_step(recipe, target).hlo, traced.jaxpr, target.chip, folder)


def report(hlo: str, jaxpr: Any, chip: Any, folder: Path) -> None:
    """Prints a line per kernel and shape, and each kernel's share over all of them."""
    from glamcli.plan.hlo import Module
    from glamcli.plan.kernels import kernels

    module = Module(hlo)
    found = {(each.name, each.flops, each.bytes): each for each in bodies(jaxpr)}
    ideal: Counter[str] = Counter()
    needed: Counter[str] = Counter()
    for line in (line for lines in module.computations.values() for line in lines):
        for kernel in kernels(module, line) if line.opcode == "custom-call" else ():
            body = found.get((kernel.name, kernel.flops, kernel.bytes))
            texts = sorted(folder.glob(f"*-{line.name}-*-final_bundles.txt"))
            if body is None or not texts:
                if kernel.name not in ideal:  # of two that are alike one is compiled
                    print(f"{kernel.name}: no bundles or no stated cost")
                continue
            share, how = efficiency(body, texts[0].read_text(), chip)
            ideal[kernel.name] += body.flops
            needed[kernel.name] += body.flops / share
            print(f"{chip.name} {kernel.name}: {100 * share:.0f} %, {how}")
    shares = {name: math.floor(100 * ideal[name] / needed[name]) / 100 for name in ideal}
    print(f"kernels = {{ {', '.join(f'{name} = {share}' for name, share in shares.items())} }}")


if __name__ == "__main__":
    main()
