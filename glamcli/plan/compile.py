"""The executable that `glam train` would run on a target, compiled here.

The same function, state, batch and mesh as in `train/loop.py`; only the devices may be described
ones. A program too large for them is refused by the compiler, with its bytes.
"""

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import re
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

import glamcli
from glamcli import atomic
from glamcli.config.mixtures import load_mixture
from glamcli.config.schema import Recipe
from glamcli.data.cache import cache_dir, cache_path
from glamcli.errors import PlanError
from glamcli.parallel.mesh import make_mesh
from glamcli.plan import topology
from glamcli.plan.topology import Target
from glamcli.train import programs
from glamcli.untrusted import MAX_FILE_BYTES, parse_json, read_file

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """A compiled training step; sizes are bytes on one device."""

    hlo: str
    mesh: Mesh
    arguments: int
    temporaries: int
    outputs: int
    """results that do not reuse the memory of an argument."""
    code: int
    matrix_flops: float
    """of all devices together, everything computed twice counted twice."""
    seconds: float
    cpu_seconds: float


class TooLarge(PlanError):
    """The compiler refuses the step, which needs `needed` bytes where its message says so."""

    def __init__(self, message: str):
        self.message = message
        match = re.search(r"(?:\(|Used )([\d.]+)([KMGT])\)? (?:exceeds|of)", message)
        self.needed = float(match[1]) * _UNITS[match[2]] if match else 0.0
        super().__init__("the step does not fit")

    def temporaries(self, arguments: int) -> int:
        """What the program needs beside its arguments, as far as the message says."""
        needed = int(self.needed)
        return max(0, needed if "temporaries" in self.message else needed - arguments)


def compile_step(recipe: Recipe, target: Target) -> Program:
    """The training step of the recipe, compiled for the target.

    Raises:
        RecipeError, PlanError: when recipe, mesh and target do not go together.
        TooLarge: when the program needs more memory than a device has.
    """
    mesh = make_mesh(recipe.mesh, topology.devices(target))
    started, cpu_started = time.monotonic(), time.process_time()
    decoder = programs.make_decoder(recipe, mesh.shape)
    num_sources = len(load_mixture(recipe.data.mixture).sources)
    traced = programs.trace_train_step(decoder, recipe, num_sources, mesh)
    flops = matrix_flops(traced.jaxpr, mesh.size)
    lowered = traced.lower()
    options = programs.compiler_options(recipe, mesh)
    cached = _cache_file(recipe, target, lowered, options, mesh)
    if cached is not None and (found := _read_cached(cached)):
        return Program(mesh=mesh, matrix_flops=flops, **found)
    try:
        compiled, hlo = _compiled(lowered, target, options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLarge(str(error)) from error
        raise
    memory: Any = compiled.memory_analysis()
    found = {
        "hlo": hlo,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "code": memory.generated_code_size_in_bytes,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    if cached is not None:
        _write_cached(cached, found)
    return Program(mesh=mesh, matrix_flops=flops, **found)


def matrix_flops(jaxpr: Any, num_devices: int) -> float:
    """Operations of all matrix products on all devices; a multiplication and an addition are two.

    Counted before compiling, so nothing depends on how a compiler names its fusions: recomputed
    activations, the one-hot products of einsum dispatch and empty slots of experts are all there.
    A kernel counts what it states as its cost, or else its body once for every step of its grid.
    A loop of unknown length counts as one round; of a conditional the dearest branch counts.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "ragged_dot_general"):
            total += _product_flops(equation)
        elif name == "cond":
            total += max(matrix_flops(branch, num_devices) for branch in params["branches"])
        elif name == "pallas_call" and params["cost_estimate"] is not None:
            total += params["cost_estimate"].flops
        else:
            times = params.get("length", 1) if name == "scan" else 1
            # The body of a mapped function speaks of one device's part.
            times *= num_devices if name == "shard_map" else 1
            if name == "pallas_call":
                times = math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
            # Whatever the operation calls them; rules for gradients are not part of what runs.
            inner = [value for value in params.values() if hasattr(value, "eqns")]
            total += times * sum(matrix_flops(each, num_devices) for each in inner)
    return total


def _product_flops(equation: Any) -> float:
    """Operations of one product; of a ragged one, whose every row meets one group's matrix."""
    dims = equation.params.get("ragged_dot_dimension_numbers")
    (contracted, _), _ = (
        dims.dot_dimension_numbers if dims else equation.params["dimension_numbers"]
    )
    left = equation.invars[0].aval.shape
    inner = math.prod(left[dim] for dim in contracted)
    if dims and dims.lhs_ragged_dimensions[0] in contracted:  # each group has part of the rows
        inner /= equation.outvars[0].aval.shape[0]
    return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)


def _cache_file(
    recipe: Recipe, target: Target, lowered: Lowered, options: dict[str, Any], mesh: Mesh
) -> Path | None:
    """The file that caches what the compiler reports of this program: named by its text, by the
    coordinates of the devices, by the versions of the compiler, and by our own sources, because the
    names of scopes are not in the text. Off TPUs jax caches programs itself."""
    if target.kind != "tpu" or not recipe.runtime.compile_cache:
        return None
    coords = [(device.id, device.coords) for device in mesh.devices.flat]
    try:
        versions = [version(name) for name in ("jax", "jaxlib", "libtpu")]
    except PackageNotFoundError:  # a libtpu that no package installer knows
        return None
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    name = hashlib.sha256(repr((target.name, coords, versions, flags, options)).encode())
    name.update(lowered.as_text().encode())
    for source in sorted(Path(glamcli.__file__).parent.rglob("*.py")):
        name.update(source.read_bytes())
    return cache_path(cache_dir(recipe), "plans", name.hexdigest()[:32])


def _read_cached(path: Path) -> dict[str, Any] | None:
    """What `_write_cached` wrote; None where there is nothing or the file is damaged."""
    with contextlib.suppress(OSError, EOFError, ValueError, zlib.error):
        packed = gzip.GzipFile(fileobj=io.BytesIO(read_file(path)))
        return parse_json(packed.read(MAX_FILE_BYTES))
    return None


def _write_cached(path: Path, found: dict[str, Any]) -> None:
    """Writes it whole or not at all; a full disk only costs the next plan its time."""
    with contextlib.suppress(OSError):
        atomic.write(path, gzip.compress(json.dumps(found).encode()))


def _compiled(lowered: Lowered, target: Target, options: dict[str, Any]) -> tuple[Compiled, str]:
    """The executable and its optimized HLO.

    For TPUs the compiler writes the HLO into a file itself. `as_text` would hand it over to
    jaxlib, which cannot read programs with parts on SparseCores (jaxlib 0.10.2, libtpu 0.0.52:
    most programs for v5p, v6e and 7x).
    """
    if target.kind != "tpu":
        compiled = programs.compiled(lowered, options)
        return compiled, compiled.as_text() or ""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # With jax's own cache of programs on it writes these too, and cannot read them again.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = programs.compiled(lowered, {**options, **dump})
        written = sorted(Path(folder).glob("*.after_codegen.txt"))
        return compiled, written[-1].read_text() if written else compiled.as_text() or ""
