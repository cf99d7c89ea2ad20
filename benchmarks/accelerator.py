"""Measures kernels, training and evaluation on the accelerator at hand, one GPU or TPU chip.

    python benchmarks/accelerator.py                    # about 20 minutes on an H200
    python benchmarks/accelerator.py --transformers VENV/bin/python
    python benchmarks/accelerator.py --tiny             # whether the script works, on a CPU

Parts, in this order: every kernel against a float32 reference; one expert layer by every dispatch;
attention by every implementation; the training step of 0.1B/64E and of the deepest 1.7B/64E that
fits; scoring and generation. Each is a process of its own with a time limit, so that one that
fails or hangs costs no other. The report (Markdown, with date, device and versions) is written
again after each part. Exit status 1 if a kernel is wrong or a part failed.

Useful work counts no recomputation, padding or masked pair; the peak is a measured bfloat16
product. MFU is of the chip's published peak (`glamcli/config/chips.toml`).
"""

import argparse
import datetime
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from compiled import markdown
from forms import attention_forms, expert_forms

from glamcli.config.sizes import flops_per_token

BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
"""Norm of an error allowed, over that of the reference. (Single numbers may differ more: relu has
another slope where rounding moves its argument across zero.)"""
LIMITS = {"kernels": 240, "layer": 300, "attention": 180, "step": 600, "evaluation": 240}
"""Seconds of each part."""
TITLES = {
    "kernels": "Kernels against the float32 reference",
    "layer": "One expert layer, forward and backward",
    "attention": "Attention, forward and backward",
    "step": "Training step, bfloat16",
    "evaluation": "Scoring and generation, 0.1B/64E in bfloat16",
}

Row = dict[str, str]


def seconds_of(run: Callable[[], object], at_least: float = 1.0) -> float:
    """Median time of one call that has been compiled and run before."""
    jax.block_until_ready(run())
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < at_least:
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@functools.cache
def peak() -> float:
    from train_step import matmul_peak

    return matmul_peak("bfloat16", size=8192 if jax.default_backend() != "cpu" else 512)


def kernels(tiny: bool) -> Iterator[Row]:
    """The largest relative error among every form's results and gradients."""
    for dtype, bound in BOUNDS.items():
        for name, forms in (("experts", expert_forms(tiny)), ("attention", attention_forms(tiny))):
            with jax.default_matmul_precision("highest"):
                expected = forms.pop("reference")(jnp.float32)
            for form, run in forms.items():
                row = {"kernel": name, "implementation": form, "dtype": dtype}
                with guarded(row):
                    errors = [error(*pair) for pair in zip(run(dtype), expected, strict=True)]
                    row["error"] = f"{max(errors):.1e}"
                    row["bound"] = f"{bound:.0e}"
                    row["verdict"] = "right" if max(errors) <= bound else "WRONG"
                yield row


def error(found: jax.Array, expected: jax.Array) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def layer(tiny: bool) -> Iterator[Row]:
    """Milliseconds and useful TFLOP/s of each dispatch, for few and many experts."""
    from moe_layer import candidate

    sizes = (512, 64, 128) if tiny else (16_384, 2048, 8192)
    tokens, M, H = sizes
    options = Namespace(
        tokens=tokens, model_dim=M, ffn_dim=H, capacity_factor=2.0, group_tokens=min(1024, tokens)
    )
    useful = 6 * tokens * 2 * 2 * M * H
    for num_experts in (4,) if tiny else (8, 64):
        for dispatch in ("gather", "einsum", "dropless"):
            row = {"E": str(num_experts), "dispatch": dispatch}
            with guarded(row):
                run, dropped, compile_seconds = candidate(
                    options, num_experts, "bfloat16", dispatch
                )
                row |= timed(run, useful) | {"dropped": f"{dropped:.1%}"}
                row["compile s"] = f"{compile_seconds:.1f}"
            yield row


def attention(tiny: bool) -> Iterator[Row]:
    """Milliseconds and useful TFLOP/s (pairs under the causal mask) of each implementation."""
    rows = 1 if tiny else 8
    N, S, D = (2, 256, 64) if tiny else (16, 1024, 128)
    useful = 3 * 4 * rows * N * D * S * (S + 1) / 2
    for name, run in attention_forms(tiny, rows).items():
        if name != "reference":
            row = {"implementation": name}
            with guarded(row):
                row |= timed(lambda run=run: run(jnp.bfloat16), useful)
            yield row


def timed(run: Callable[[], object], useful: float) -> Row:
    """The columns of a time and what it is worth."""
    seconds = seconds_of(run)
    return {
        "ms": f"{1e3 * seconds:.3g}",
        "useful TFLOP/s": f"{useful / seconds / 1e12:.3g}",
        "of matmul peak": f"{useful / seconds / peak():.1%}",
    }


@contextmanager
def guarded(row: Row) -> Iterator[None]:
    """Notes in the row why it has no numbers, most often for want of memory."""
    try:
        yield
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def step(tiny: bool) -> Iterator[Row]:
    """Tokens per second and MFU of the whole step, updates included."""
    if tiny:
        yield step_row("test-tiny", ("model.activation_dtype=bfloat16",))
        return
    for rows in (16, 32, 64):
        yield step_row("glam_0.1b_64e", (f"batch.rows={rows}",))
    for layers in range(16, 0, -2):
        row = step_row("glam_1.7b_64e", (f"model.num_layers={layers}", "batch.rows=16"))
        yield row
        if "failed" not in row:
            break


def step_row(name: str, sets: tuple[str, ...]) -> Row:
    from glamcli.config.load import load_recipe
    from glamcli.parallel.mesh import make_mesh
    from glamcli.train import programs
    from glamcli.train.speed import model_speed
    from glamcli.train.state import init_state

    row = {"recipe": f"{name} {' '.join(sets)}"}
    one = ("mesh.expert=1", "mesh.data=1", "mesh.model=1", "batch.accumulate=1")
    recipe = load_recipe(name, (*one, *sets)).recipe
    with guarded(row):
        mesh = make_mesh(recipe.mesh, jax.devices()[:1])
        decoder = programs.make_decoder(recipe, mesh.shape)
        start = time.perf_counter()
        lowered = programs.trace_train_step(decoder, recipe, 1, mesh).lower()
        compiled = programs.compiled(lowered, programs.compiler_options(recipe, mesh))
        compile_seconds = time.perf_counter() - start
        state = init_state(decoder, recipe.optimizer, recipe.seed, mesh)
        rng = np.random.default_rng(0)
        shape = (recipe.batch.rows, recipe.batch.row_tokens + 1)
        tokens = rng.integers(0, recipe.model.vocab_size, shape, dtype=np.int32)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": np.ones_like(tokens[:, 1:]),
            "source": np.zeros(shape[0], np.int32),
        }
        placed = {
            key: jax.device_put(array, each.sharding)
            for (key, array), each in zip(
                batch.items(), map(programs.training_batch(recipe, mesh).get, batch), strict=True
            )
        }

        def run() -> object:
            nonlocal state
            state, sums = compiled(state, placed)
            return state, sums

        seconds = seconds_of(run, 10.0 if jax.default_backend() != "cpu" else 0.0)
        per_second = batch["targets"].size / seconds
        speed = model_speed(recipe, jax.devices()[:1], per_second)
        useful = flops_per_token(recipe).training * per_second
        used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        row |= {
            "ms": f"{1e3 * seconds:.4g}",
            "tokens/s": f"{per_second:,.0f}",
            "useful TFLOP/s": f"{useful / 1e12:.3g}",
            "MFU": f"{speed['mfu']:.1%}" if speed else "",
            "of matmul peak": f"{useful / peak():.1%}",
            "GiB": f"{used / 2**30:.1f}" if used else "",
            "compile s": f"{compile_seconds:.0f}",
        }
    return row


def evaluation(tiny: bool) -> Iterator[Row]:
    """Tokens per second of four kinds of work, as `eval_speed.py` has them."""
    import eval_speed

    from glamcli.config.load import load_recipe

    name = "test-tiny" if tiny else "glam_0.1b_64e"
    sets = ("model.vocab_size=8192", "batch.row_tokens=1024", "mesh.expert=1")
    recipe = load_recipe(name, sets).recipe
    with tempfile.TemporaryDirectory() as folder:
        run = eval_speed.glam(recipe, Path(folder))
        for work in ("short", "generate") if tiny else eval_speed.WORK:
            row = {"work": work}
            with guarded(row):
                tokens = eval_speed.write(work, Path(folder))
                first = run(work)["seconds"]
                best = min(run(work)["seconds"] for _ in range(1 if tiny else 3))
                row |= {
                    "tokens": f"{tokens:,}",
                    "tokens/s": f"{tokens / best:,.0f}",
                    "first turn s": f"{first:.1f}",
                }
            yield row


PARTS = {
    "kernels": kernels,
    "layer": layer,
    "attention": attention,
    "step": step,
    "evaluation": evaluation,
}


def rows_of(part: str, options: Namespace) -> Iterator[Row]:
    """The rows of one part as they come, from a process of its own."""
    command = [sys.executable, __file__, "--part", part, *(["--tiny"] if options.tiny else [])]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        ending = threading.Timer(LIMITS[part], process.kill)
        ending.start()
        for line in process.stdout or ():
            if line.startswith("{"):
                yield json.loads(line)
        ending.cancel()
        if process.wait():
            said.seek(0)
            errors = [line for line in said if "Error" in line.partition(":")[0]]
            reason = (errors or ["no error was printed"])[-1].strip()[:200]
            yield {"failed": f"exit status {process.returncode} within {LIMITS[part]} s: {reason}"}


def rival_rows(options: Namespace) -> Iterator[Row]:
    """The step of 0.1B/64E in transformers, as `rival_transformers.py` says."""
    if not options.transformers:
        return
    script = str(Path(__file__).with_name("rival_transformers.py"))
    for rows in (2,) if options.tiny else (16, 32, 64):
        tokens = 64 if options.tiny else 1024
        shape = ["--shape", "common"] if options.tiny else ["--shape", "0.1b"]
        shape += ["--rows", str(rows), "--row-tokens", str(tokens), "--experts", "64"]
        row = {"recipe": f"transformers, AdamW, {' '.join(shape)}"}
        with guarded(row):
            done = subprocess.run(
                [options.transformers, script, "--dtypes=bfloat16", "--optimizers=adamw", *shape],
                check=True,
                capture_output=True,
                text=True,
                timeout=LIMITS["step"] / 3,
            )
            seconds = float(done.stdout.split(" s/step")[0].split()[-1])
            row |= {"ms": f"{1e3 * seconds:.4g}", "tokens/s": f"{rows * tokens / seconds:,.0f}"}
        yield row


def about() -> str:
    """What ran, and on what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "optax"))
    device = jax.devices()[0]
    return (
        f"{datetime.date.today()}, {device.device_kind} ({device.platform}), Python "
        f"{platform.python_version()}, {packages}; bfloat16 product {peak() / 1e12:.3g} TFLOP/s"
    )


def table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    words = ("recipe", "dispatch", "implementation", "dtype", "work", "kernel", "failed", "verdict")
    named = " | ".join(name if name in words else f">{name}" for name in columns)
    return markdown(named, [[row.get(name, "") for name in columns] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes: tries the script")
    parser.add_argument("--out", type=Path, help="the report (default: benchmarks/results)")
    parser.add_argument("--transformers", metavar="PYTHON", help="times its step as well")
    parser.add_argument("--part", choices=[*PARTS, "about"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "about":
        print(about())
        return
    if options.part:
        for row in PARTS[options.part](options.tiny):
            print(json.dumps(row), flush=True)
        return
    # In processes of their own, as this one must not hold the device.
    command = [sys.executable, __file__, "--part", "about"]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    results = Path(__file__).with_name("results")
    out = options.out or results / f"accelerator_{datetime.date.today()}.md"
    text, all_rows = f"# {said.strip()}\n", []
    for part in options.parts:
        start, rows = time.monotonic(), []
        transformers = rival_rows(options) if part == "step" else ()
        for row in itertools.chain(rows_of(part, options), transformers):
            print(part, row, flush=True)
            rows.append(row)
        took = f"{time.monotonic() - start:.0f} s"
        text += f"\n## {TITLES[part]} ({took})\n\n{table(rows)}\n"
        out.write_text(text)
        all_rows += rows
    print(f"wrote {out}")
    if any("failed" in row or row.get("verdict", "right") != "right" for row in all_rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
