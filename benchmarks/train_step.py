"""Times one training step of the common workload, for several numbers of experts.

    python benchmarks/train_step.py                          # E = 8, 16, 64, 128 in float32
    python benchmarks/train_step.py --experts 8 64 --dispatch gather einsum
    python benchmarks/train_step.py --experts 8 64 --rival transformers=VENV/bin/python

A rival is a script beside this one, rival_NAME.py, and a Python that has what it says it needs.

The workload: 4 layers (two of experts), M=256, H=1024, 8 heads of 32, top-2, capacity factor 2.0,
V=8192, 8 rows of 256 tokens, Adafactor. Each setting lives in a process of its own, so that peak
memory is its own, and all take turns of a few steps, so that whatever else the machine does meets
all of them. Reported: lower quartile and median of the step time, tokens/s, useful FLOP/s (active
parameters and attention, forward and backward), that as a share of the matrix product peak
measured in the same process and dtype, peak memory, and seconds to compile.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from turns import take_turns

ROWS, ROW_TOKENS = 8, 256


def recipe_values(options: argparse.Namespace) -> dict:
    return {
        "model": {
            "num_layers": 4,
            "model_dim": 256,
            "ffn_dim": 1024,
            "num_heads": 8,
            "head_dim": 32,
            "vocab_size": 8192,
            "activation_dtype": options.dtype,
        },
        "moe": {
            "num_experts": options.num_experts,
            "capacity_factor": 2.0,
            "group_tokens": options.group_tokens,
            "dispatch": options.dispatch,
        },
        "batch": {"rows": ROWS, "row_tokens": ROW_TOKENS},
        "train": {"steps": 100, "remat": options.remat},
        "data": {"mixture": "quickstart"},
    }


def useful_flops(recipe) -> float:
    """Multiplications and additions a step needs: 6 per active parameter and token, attention.

    Embedding look-ups are free and the tied softmax is counted once, as 2VM per token.
    """
    m, moe = recipe.model, recipe.moe
    attention = 4 * m.model_dim * m.num_heads * m.head_dim
    dense, expert = 3 * m.model_dim * m.ffn_dim, 2 * m.model_dim * m.ffn_dim
    pairs = m.num_layers // 2
    per_pair = 2 * attention + dense + moe.experts_per_token * expert
    active = pairs * (per_pair + m.model_dim * moe.num_experts) + m.vocab_size * m.model_dim
    tokens = ROWS * ROW_TOKENS
    scores = m.num_layers * 2 * m.num_heads * m.head_dim * ROW_TOKENS * tokens  # causal or not
    return 6 * active * tokens + 6 * scores


def matmul_peak(dtype: str, seconds: float = 2.0, size: int = 2048) -> float:
    """Best FLOP/s of a product of square matrices in this process, with float32 sums."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def time_one(options: argparse.Namespace) -> None:
    """One setting, in this process."""
    from glamcli import libtpu

    libtpu.quiet()
    import jax
    import numpy as np

    from glamcli.config.schema import Recipe
    from glamcli.parallel.mesh import make_mesh
    from glamcli.train.programs import make_decoder
    from glamcli.train.state import init_state
    from glamcli.train.step import make_train_step

    recipe = Recipe.model_validate(recipe_values(options))
    decoder = make_decoder(recipe, make_mesh(recipe.mesh).shape)
    state = init_state(decoder, recipe.optimizer, recipe.seed)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, recipe.model.vocab_size, (ROWS, ROW_TOKENS + 1), dtype=np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((ROWS, ROW_TOKENS), np.int32),
        "source": np.zeros(ROWS, np.int32),
    }
    start = time.perf_counter()
    jitted = jax.jit(make_train_step(decoder, recipe, 1), donate_argnums=0)
    compiled = jitted.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, sums = compiled(state, batch)
        jax.block_until_ready((state, sums))
        return time.perf_counter() - start

    def summary() -> dict[str, float]:
        return {
            "useful_flops": useful_flops(recipe),
            "matmul_peak": matmul_peak(options.dtype),
            "compile_seconds": compile_seconds,
        }

    take_turns(step, options.steps, summary)


class Setting:
    """One line of the table: a process that steps when told to."""

    def __init__(self, name: str, command: list[str], *, huge_pages: bool):
        environment = dict(os.environ)
        if huge_pages:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        self.name = name
        self.seconds: list[float] = []
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()  # it has compiled, with the machine to itself

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with exit status {self.process.wait()}")
        return json.loads(line)

    def turn(self, *, counted: bool) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds = self._read()
        if counted:
            self.seconds += seconds

    def row(self) -> str:
        self.process.stdin.close()
        summary = self._read()
        self.process.wait()
        seconds = sorted(self.seconds)
        quartile, median = seconds[len(seconds) // 4], statistics.median(seconds)
        rate = summary["useful_flops"] / quartile
        peak = f"{rate / summary['matmul_peak']:.0%}" if "matmul_peak" in summary else ""
        return (
            f"| {self.name} | {seconds[0]:.3f} | {quartile:.3f} | {median:.3f} "
            f"| {ROWS * ROW_TOKENS / quartile:,.0f} | {rate / 1e9:.0f} | {peak} "
            f"| {summary['peak_bytes'] / 2**30:.2f} | {summary['compile_seconds']:.1f} |"
        )


def settings_of(options: argparse.Namespace) -> list[Setting]:
    settings = []
    for dtype in options.dtypes:
        for dispatch in options.dispatch:
            for num_experts in options.experts:
                chosen = vars(options) | {
                    "dtype": dtype,
                    "dispatch": dispatch,
                    "num_experts": num_experts,
                }
                name = f"glam, {dispatch} | {num_experts} | {dtype}"
                command = [sys.executable, __file__, "--one", json.dumps(chosen)]
                settings.append(Setting(name, command, huge_pages=options.huge_pages))
        for rival, num_experts in itertools.product(options.rival, options.experts):
            name, _, python = rival.partition("=")
            script = Path(__file__).with_name(f"rival_{name}.py")
            command = [python, str(script), "--turns", "--steps", str(options.steps)]
            command += ["--experts", str(num_experts), "--dtypes", dtype, "--optimizers", "adamw"]
            name = f"{name}, AdamW | {num_experts} | {dtype}"
            settings.append(Setting(name, command, huge_pages=options.huge_pages))
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--dispatch", nargs="+", default=["auto"])
    parser.add_argument("--remat", default="none")
    parser.add_argument("--group-tokens", type=int, default=ROWS * ROW_TOKENS)
    parser.add_argument("--steps", type=int, default=4, help="steps of one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-huge-pages", dest="huge_pages", action="store_false")
    parser.add_argument(
        "--rival", action="append", default=[], metavar="NAME=PYTHON", help="time it as well"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        time_one(argparse.Namespace(**json.loads(options.one)))
        return
    settings = settings_of(options)
    for turn in range(options.turns + 1):
        for setting in settings:
            setting.turn(counted=turn > 0)  # in the first one memory is fresh
    print(
        "| program | E | dtype | fastest s | lower quartile | median | tokens/s | useful GFLOP/s "
        "| of matmul peak | peak GB | compile s |\n|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for setting in settings:
        print(setting.row(), flush=True)


if __name__ == "__main__":
    main()
